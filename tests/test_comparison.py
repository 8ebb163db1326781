import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
import yaml
from anomalib.data import ImageBatch
from anomalib.metrics import AUPRO
from PIL import Image
from sklearn.metrics import auc, f1_score, roc_auc_score, roc_curve

from cflow_plugin.commands.compare.cell import Cell, EncoderChoice, Job, Variant, build_model, run_cell
from cflow_plugin.commands.compare.record import Recorder, _bin, _value
from cflow_plugin.commands.compare.tables import accuracy_tables, published_tables, summary_table
from cflow_plugin.commands.configs import find_config

from .conftest import QUICK, call_in_a_copy, once, run_command

SMALL = {**QUICK, "image_size": [64, 64], "epochs": 1, "steps_per_epoch": 4}
DATA = {
    "name": "Textures",
    "categories": ["weave"],
    "settings": {"resolution": 64, "train_good": 6, "test_good": 3, "test_defect": 1, "val_good": 1, "val_defect": 1},
}


VARIANTS = {
    "small": {"model": "CflowPlugin", "settings": SMALL},
    "UFLOW": {"model": "CflowPlugin", "settings": {**SMALL, "condition_dims": 0}},
}


def config_file(folder: Path, **settings: object) -> str:
    config = {
        "data": [DATA],
        "models": [],
        "variants": VARIANTS,
        "encoders": [{"backbone": "gabor"}],
        "threads": 1,
        "output": "out",
        **settings,
    }
    (folder / "compare.yaml").write_text(yaml.safe_dump(config, sort_keys=False))
    return "compare.yaml"


def compared_once(common: Path) -> Path:
    """A folder with a comparison, the first of whose cells failed: a process for each cell takes long to start."""

    def compare(folder: Path) -> None:
        broken = {"broken": {"model": "CflowPlugin", "settings": {**SMALL, "noise": -1.0}}}
        name = config_file(folder, variants={**broken, **VARIANTS})
        out = run_command("cflow-plugin", "compare", "--config", name, cwd=folder, expect=1)
        (folder / "log.txt").write_text(out)

    return once(common / "compared", compare)


@pytest.fixture(scope="module")
def compared(common):
    return compared_once(common)


def assert_complete(report: str, results: pd.DataFrame) -> None:
    for row in results.itertuples():
        assert f"{row.pixel_AUROC:.4f}" in report
    assert "98.62" in report
    assert "CutPaste" in report


@pytest.mark.long
@pytest.mark.timeout(900)
def test_the_command(compared):
    results = pd.read_csv(compared / "out/results.csv")
    assert [(row.model, row.seed) for row in results.itertuples()] == [("small", 0), ("UFLOW", 0)]
    assert results["settings"].nunique() == 2
    for metric in ("image_AUROC", "pixel_AUROC", "pixel_AUPRO"):
        assert results[metric].between(0, 1).all()
    assert (results[["train_seconds", "test_seconds", "peak_memory_mb", "size_mb"]] > 0).all(axis=None)
    # What the file says is what the recorded scores say.
    for row in results.itertuples():
        with np.load(compared / "out/cells" / row.key / "record.npz") as record:
            exact = roc_auc_score(record["image_labels"], record["image_scores"])
        assert row.image_AUROC == pytest.approx(exact, abs=1e-6)
        assert not (compared / "out/cells" / row.key / "training").exists()
    html = (compared / "out/report.html").read_text()
    assert not re.findall(r'(?:src|href)="(?!data:|#)', html), "the report must not need other files"
    text = (compared / "out/report.md").read_text()
    for report in (html, text):
        assert_complete(report, results)
    for picture in re.findall(r"!\[.*?\]\((.*?)\)", text):
        assert (compared / "out" / picture).stat().st_size > 1000
    rows = re.findall(r"^\| (small|UFLOW) +\|", text, flags=re.MULTILINE)
    assert rows[:2] == ["small", "UFLOW"]
    assert "the last epoch" in (compared / "log.txt").read_text()


@pytest.mark.long
@pytest.mark.timeout(900)
def test_one_failure_does_not_cost_the_others(compared):
    out = (compared / "log.txt").read_text()
    assert out.strip().splitlines()[-1].startswith("error: 1 of 3 cells failed")
    assert list(pd.read_csv(compared / "out/results.csv")["model"]) == ["small", "UFLOW"]


@pytest.mark.long
@pytest.mark.timeout(900)
def test_a_killed_comparison_goes_on(compared, tmp_path):
    """Only what is not there yet is trained: of two seeds the second one, and that one again if it was cut off."""
    shutil.copytree(compared / "out", tmp_path / "out")
    file, cells = tmp_path / "out/results.csv", tmp_path / "out/cells"
    first = pd.read_csv(file)
    written = {path: path.stat().st_mtime_ns for path in cells.rglob("record.npz")}
    name = config_file(tmp_path, variants={"small": VARIANTS["small"]}, seeds=[0, 1])
    program = Path(sys.executable).parent / "cflow-plugin"
    process = subprocess.Popen(
        [program, "compare", "--config", name], cwd=tmp_path, start_new_session=True, stdout=subprocess.DEVNULL
    )
    deadline = time.monotonic() + 300
    while not list(cells.glob("*/training")) and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    pd.testing.assert_frame_equal(pd.read_csv(file), first)
    assert list(cells.glob("small-*-1-*/training"))

    out = run_command("cflow-plugin", "compare", "--config", name, cwd=tmp_path)
    assert "1 of 2 cells are done already" in out
    assert {path: path.stat().st_mtime_ns for path in written} == written
    assert not list(cells.glob("*/training"))
    results = pd.read_csv(file)
    assert [(row.model, row.seed) for row in results.itertuples()] == [("small", 0), ("UFLOW", 0), ("small", 1)]
    pd.testing.assert_frame_equal(results.head(2), first, check_dtype=False)
    mean = results[results["model"] == "small"]["pixel_AUROC"].mean()
    for report in ("report.html", "report.md"):
        assert f"{mean:.4f} ± " in (tmp_path / "out" / report).read_text()


@pytest.mark.long
def test_mistakes_are_named(tmp_path):
    name = config_file(tmp_path, models=["Padam"])
    out = run_command("cflow-plugin", "compare", "--config", name, cwd=tmp_path, expect=1)
    assert "no model 'Padam'" in out
    encoders = [{"backbone": "resnet18", "weights": "none.safetensors"}]
    name = config_file(tmp_path, encoders=encoders)
    out = run_command("cflow-plugin", "compare", "--config", name, cwd=tmp_path, expect=1)
    assert "no weights file" in out
    assert not (tmp_path / "out/results.csv").exists()
    help_text = " ".join(run_command("cflow-plugin", "compare", "--help", cwd=tmp_path).split())
    assert "what is there already is not run again" in help_text


def _run_padim(folder: str, encoder: dict, settings: dict) -> None:
    settings = {"num_workers": 0, **settings, "category": "weave"}
    cell = Cell("Padim", Variant("Padim"), EncoderChoice(**encoder), "Textures", settings, "weave", 0, (64, 64))
    row = run_cell(cell, Job(Path(folder, "out"), threads=1, keep_weights=False))
    Path(folder, "row.json").write_text(json.dumps(row))


@pytest.mark.long
def test_padim_is_what_anomalib_trains(tmp_path):
    padim = {"backbone": "resnet18", "layers": ["layer1", "layer2"], "pre_trained": False}
    settings = {**DATA["settings"], "test_good": 6, "test_defect": 3}
    call_in_a_copy(_run_padim, str(tmp_path), padim, {**settings, "root": str(tmp_path / "datasets/Textures")})
    ours = json.loads((tmp_path / "row.json").read_text())
    config = {
        "seed_everything": 0,
        "model": {"class_path": "Padim", "init_args": {**padim, "evaluator": True, "pre_processor": {
            "class_path": "anomalib.pre_processing.PreProcessor",
            "init_args": {"transform": {"class_path": "torchvision.transforms.v2.Compose", "init_args": {"transforms": [
                {"class_path": "torchvision.transforms.v2.Resize", "init_args": {"size": [64, 64], "antialias": True}},
                {"class_path": "torchvision.transforms.v2.Normalize",
                 "init_args": {"mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225]}},
            ]}}},
        }}},
        "data": {"class_path": "Textures", "init_args": {**settings, "category": "weave", "num_workers": 0}},
        "trainer": {"logger": False, "accelerator": "cpu"},
        "default_root_dir": "anomalib",
    }  # fmt: skip
    (tmp_path / "padim.yaml").write_text(yaml.safe_dump(config, sort_keys=False))
    out = run_command("anomalib", "train", "--config", "padim.yaml", cwd=tmp_path)
    for metric in ("image_AUROC", "pixel_AUROC"):
        [theirs] = re.findall(rf"{metric}\s*[│|]\s*([0-9.]+)", out)
        assert ours[metric] == pytest.approx(float(theirs), abs=1e-6)


def test_bins_keep_the_order_of_scores():
    values = np.sort(np.random.default_rng(0).standard_cauchy(10_000).astype(np.float32))
    bins = _bin(values)
    assert (np.diff(bins) >= 0).all()
    assert (_value(bins) <= values).all()
    np.testing.assert_allclose(_value(bins), values, rtol=2.0**-10)


def test_recorded_curves(tmp_path):
    generator = np.random.default_rng(0)
    maps = generator.random((6, 1, 40, 40), dtype=np.float32)
    masks = np.zeros((6, 40, 40), dtype=bool)
    masks[0, 3:9, 4:20] = masks[1, 30:34, 5:8] = masks[1, 0:3, 0:3] = masks[2, 10:30, 10:30] = True
    maps[:, 0][masks] += 0.4
    labels = masks.any((1, 2))
    scores = maps.max((1, 2, 3))
    paths = []
    for index in range(6):
        folder = tmp_path / ("bad" if labels[index] else "good")
        folder.mkdir(exist_ok=True)
        paths.append(str(folder / f"{index}.png"))
        Image.fromarray(generator.integers(0, 255, (40, 40, 3), dtype=np.uint8)).save(paths[-1])
    recorder = Recorder()
    for part in (slice(0, 4), slice(4, 6)):
        batch = ImageBatch(
            image=torch.zeros(len(paths[part]), 3, 40, 40),
            image_path=paths[part],
            gt_label=torch.from_numpy(labels[part]),
            gt_mask=torch.from_numpy(masks[part]),
            pred_score=torch.from_numpy(scores[part]),
            anomaly_map=torch.from_numpy(maps[part]),
        )
        recorder.on_test_batch_start()
        recorder.on_test_batch_end(None, None, batch, batch)
    facts = recorder.save(tmp_path / "record.npz")
    with np.load(tmp_path / "record.npz") as file:
        record = dict(file)
    truth, found = masks.ravel(), maps[:, 0].ravel()
    false, true, _ = roc_curve(truth, found)
    fpr, tpr = record["roc"]
    np.testing.assert_allclose(tpr[1:], np.interp(fpr[1:], false, true), atol=2e-3)
    best = max(f1_score(truth, found >= threshold) for threshold in np.quantile(found, np.linspace(0.5, 0.999, 200)))
    assert facts["pixel_F1"] >= best - 1e-3
    assert f1_score(truth, found >= record["pixel_threshold"]) == pytest.approx(facts["pixel_F1"], abs=2e-3)
    reference = AUPRO(fields=["anomaly_map", "gt_mask"])
    reference.update(
        ImageBatch(image=torch.zeros(6, 3, 40, 40), anomaly_map=torch.from_numpy(maps), gt_mask=torch.from_numpy(masks))
    )
    x, y = record["pro"]
    assert auc(x, y) / 0.3 == pytest.approx(reference.compute().item(), abs=3e-3)
    assert record["sample_names"].tolist() == ["bad", "good"]
    assert facts["images"] == 6


def row(**values: object) -> dict:
    return {
        "key": "k", "model": "CflowPlugin", "anomalib_model": "CflowPlugin", "settings": "{}", "layers": "",
        "encoder": "wide_resnet50_2", "data": "MVTecAD", "category": "screw", "size": "512×512", "seed": 0,
        "image_AUROC": 0.9, "pixel_AUROC": 0.99, "pixel_AUPRO": 0.95, "image_ms": 10.0, "train_seconds": 1.0,
        "peak_memory_mb": 1.0, "size_mb": 1.0, **values,
    }  # fmt: skip


def test_published_figures_stand_beside_measured_ones():
    eight, flat = json.dumps({"coupling_blocks": 8}), json.dumps({"coupling_blocks": 8, "condition_dims": 0})
    rows = [
        row(settings=eight),
        row(model="flat", settings=flat, pixel_AUROC=0.5),
        row(settings=eight, category="tile"),
    ]
    tables = published_tables(pd.DataFrame(rows))
    columns = tables[0].texts.set_index("class").loc["screw"]
    assert columns["wide_resnet50_2, 8 blocks, 3 layers, 512"] == "98.86 ± 0.02 (99.00, +0.14)"
    assert columns["wide_resnet50_2, 8 blocks, 3 layers, 512, UFLOW"] == "98.78 ± 0.01 (50.00, -48.78)"
    assert columns["wide_resnet50_2, 8 blocks, 3 layers, 256"] == "98.1 ± 0.05 (—)"
    # What else differs is said.
    assert "wide_resnet50_2 at 512×512 with 3 layers" in tables[0].note
    assert "CFLOW-AD, the paper's in brackets: permutation swap (random), " in tables[0].note
    as_published = yaml.safe_load(find_config("paper").read_text())["model"]["init_args"]
    [ablation, *_] = published_tables(pd.DataFrame([row(settings=json.dumps(as_published))]))
    assert "CFLOW-AD: as in the paper" in ablation.note
    # The default has another number of blocks than the paper's model of this encoder, layers and size.
    [ablation, *_] = published_tables(pd.DataFrame([row()]))
    assert "coupling_blocks 4 (8)" in ablation.note
    assert "(99.00" not in ablation.texts.to_string()
    # A mean over some of the classes is not the mean over all of them.
    assert ["CFLOW-AD", "98.26 (—)", "98.62 (—)", "94.6 (—)"] in tables[2].texts.to_numpy().tolist()


def test_means_and_standard_deviations():
    values = {("a", 0): 0.5, ("b", 0): 0.7, ("a", 1): 0.6, ("b", 1): 0.9}
    table = summary_table(
        pd.DataFrame(
            [row(category=category, seed=seed, image_AUROC=value) for (category, seed), value in values.items()]
        )
    )
    means = [np.mean([0.5, 0.7]), np.mean([0.6, 0.9])]
    assert table.texts["image AUROC"][0] == f"{np.mean(means):.4f} ± {np.std(means, ddof=1):.4f}"


def test_a_mean_over_some_categories_is_named_as_such():
    rows = [row(category="a"), row(category="b"), row(model="half", category="a", image_AUROC=1.0)]
    table = summary_table(pd.DataFrame(rows))
    assert table.texts["model"].tolist() == ["CflowPlugin", "half (1 of 2 categories)"]
    assert not table.best.any(axis=None)


def test_the_best_stand_in_bold():
    rows = [row(model=model, category="a|b", pixel_AUROC=value) for model, value in (("<low>", 0.9), ("high", 0.95))]
    [_, table, _] = accuracy_tables(pd.DataFrame(rows))
    assert table.title == "pixel AUROC, wide_resnet50_2, 512×512"
    assert "one seed" in table.to_markdown()
    assert "| **0.9500** |" in table.to_markdown()
    assert "0.9000" in table.to_markdown()
    assert "**0.9000**" not in table.to_markdown()
    html = table.to_html()
    assert ">&lt;low&gt;</th>" in html
    assert "<b>0.9500</b>" in html
    assert "<b>0.9000</b>" not in html
    assert html.count("<b>") == 1


def test_another_setting_is_another_cell():
    cell = Cell("a", Variant("CflowPlugin"), EncoderChoice(), "MVTecAD", {}, "screw", 0, (256, 256))
    keys = {cell.key, cell.key}
    others = (
        {"seed": 1}, {"image_size": (128, 128)}, {"variant": Variant("CflowPlugin", {"noise": 0.0})},
        {"data_settings": {"root": "elsewhere"}}, {"encoder": EncoderChoice("wide_resnet50_2")}, {"category": "tile"},
    )  # fmt: skip
    for other in others:
        keys.add(Cell(**{**cell.__dict__, **other}).key)
    assert len(keys) == 1 + len(others)
    assert all(re.fullmatch(r"[\w.-]+", key) for key in keys)


def test_models_share_the_encoder(tmp_path):
    torch.manual_seed(1)
    source = build_model(
        Variant("CflowPlugin", {"neighbourhood": 1}),
        EncoderChoice("resnet18", ["layer1", "layer2"], pre_trained=False),
        (64, 64),
    )
    torch.save(source.model.encoder.network.state_dict(), tmp_path / "weights.pth")
    encoder = EncoderChoice("resnet18", ["layer1", "layer2"], tmp_path / "weights.pth")
    images = torch.rand(2, 3, 64, 64)
    padim = build_model(Variant("Padim"), encoder, (64, 64)).model.feature_extractor(images)
    cflow = build_model(Variant("Cflow"), encoder, (64, 64)).model.encoder.eval()(images)
    for name, features in zip(source.model.encoder.layers, source.model.encoder(images), strict=True):
        torch.testing.assert_close(padim[name], features)
        torch.testing.assert_close(cflow[name], features)


REPORT = """
import sys


def look(cell, job):
    from nncf.telemetry import wrapper

    return type(wrapper.telemetry).__name__


if __name__ == "__main__":
    import cflow_plugin.commands.compare

    module = sys.modules["cflow_plugin.commands.compare.compare"]
    module.run_cell = look
    [(_, found)] = module._run([None], None, lambda _: None)
    print(found)
"""


@pytest.mark.long
def test_nncf_reports_nothing_from_a_cell_s_process(tmp_path):
    (tmp_path / "report.py").write_text(REPORT)
    assert run_command("python", "report.py", cwd=tmp_path, PYTHONWARNINGS="ignore").splitlines()[-1] == "MagicMock"
