import json
import re
import runpy
import signal
import subprocess
import sys
import sysconfig
import time
from pathlib import Path

import cv2
import pytest
import yaml
from anomalib.cli.cli import AnomalibCLI
from anomalib.data.datasets.image.mvtecad import CATEGORIES

from cflow_plugin.commands.cli import main
from cflow_plugin.data.textures import draw
from cflow_plugin.model.backbones import BACKBONES

from .brightness import save_brightness_model
from .conftest import ROOT, run_command

# Folders named as the subcommand of `cflow-plugin` that their configs are for; all others are for anomalib's.
OURS = sorted(path for name in ("benchmark", "compare") for path in (ROOT / "configs" / name).glob("*.yaml"))
CONFIGS = sorted(set((ROOT / "configs").rglob("*.yaml")) - set(OURS))
FIRST = {"demo", "spade", "scene_01"}  # a second each: others are for the long run
MVTEC_AD_SIZES = {"transistor": 128} | dict.fromkeys(("cable", "capsule", "hazelnut", "metal_nut", "pill"), 256)
FEW = ["--data.resolution", "64", "--data.train_good", "6", "--data.test_good", "2", "--data.test_defect", "1"]
FEW += ["--data.val_good", "2", "--data.val_defect", "1"]
QUICK = ["--model.backbone", "gabor", "--model.image_size", "[64, 64]", "--model.epochs", "2"]
QUICK += ["--model.steps_per_epoch", "2", "--model.coupling_blocks", "2"]
CPU = ["--trainer.accelerator", "cpu"]


def name_of(path):
    return str(path.relative_to(ROOT / "configs"))


@pytest.fixture(scope="module")
def parse():
    """anomalib's own command line, without building what was asked for; its parser takes a second to build."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(AnomalibCLI, "before_instantiate_classes", lambda self: None)
        patch.setattr(AnomalibCLI, "instantiate_classes", lambda self: None)
        parser = AnomalibCLI(args=["train", "--model", "CflowPlugin", "--data", "Textures"], run=False).parser

    def parse(*arguments):
        return parser.parse_args(["train", *map(str, arguments)])["train"]

    return parse


def form_of(given):
    """Keys and types, whatever the values."""
    if isinstance(given, dict):
        return {key: form_of(value) for key, value in given.items()}
    return [form_of(value) for value in given] if isinstance(given, list) else type(given).__name__


def one_of_each_form():
    forms = {}
    for path in sorted(CONFIGS, key=lambda path: path.stem not in FIRST):
        forms.setdefault((path.parent.name, str(form_of(yaml.safe_load(path.read_text())))), path)
    return sorted(forms.values())


# A second each; where only values differ, which they are is what other tests look at.
@pytest.mark.parametrize(
    "path",
    [pytest.param(path, marks=[pytest.mark.long] * (path.stem not in FIRST)) for path in one_of_each_form()],
    ids=name_of,
)
def test_every_config_is_understood(parse, path):
    data = ["--data", "MVTecAD"] if path.parent.name in {"ablation", "encoders"} else []
    config = parse("--config", path, *data)
    assert config.model.class_path == "cflow_plugin." + ("Spade" if path.stem == "spade" else "CflowPlugin")
    given = yaml.safe_load(path.read_text())
    for part in ("model", "data"):
        for key, value in given.get(part, {}).get("init_args", {}).items():
            understood = config[part].init_args[key]
            understood = list(understood) if isinstance(understood, tuple) else understood
            assert (
                understood == value
                or hasattr(understood, "class_path")
                or str(understood) in (str(value), str(Path(str(value))))
            )


def holds(understood, given):
    """Whether all that is given is there; what is not given may have been filled in."""
    if isinstance(given, dict):
        return all(holds(understood[key], value) for key, value in given.items())
    if isinstance(given, list):
        return len(understood) == len(given) and all(map(holds, understood, given))
    return understood == given


@pytest.mark.parametrize("path", OURS, ids=name_of)
def test_every_config_of_our_commands_is_understood(path, capsys):
    given = yaml.safe_load(path.read_text())
    data = ["--data", "[{name: MVTecAD}]"] if path.parent.name == "compare" and "data" not in given else []
    with pytest.raises(SystemExit):
        main([path.parent.name, "--config", str(path), *data, "--print_config"])
    assert holds(yaml.safe_load(capsys.readouterr().out), given)


def test_a_config_for_each_category_at_the_paper_s_resolution(parse):
    paths = {path.stem: path for path in CONFIGS if path.parent.name == "mvtec_ad"}
    assert set(paths) == set(CATEGORIES)
    for category, path in paths.items():
        given = yaml.safe_load(path.read_text())
        size = MVTEC_AD_SIZES.get(category, 512)
        assert given["data"]["init_args"]["category"] == category
        assert given["model"]["init_args"]["image_size"] == [size, size]


def test_ablations_are_what_their_names_say():
    for path in (path for path in CONFIGS if path.parent.name == "ablation"):
        backbone, blocks, _, layers, _, size, *rest = path.stem.split("-")
        settings = yaml.safe_load(path.read_text())["model"]["init_args"]
        assert settings["backbone"] == backbone
        assert settings["coupling_blocks"] == int(blocks)
        assert settings["layers"] == list(BACKBONES[backbone].layers[: int(layers)])
        assert settings["image_size"] == [int(size)] * 2
        assert settings.get("condition_dims", 128) == (0 if rest == ["uflow"] else 128)
    for title, variant in yaml.safe_load((ROOT / "configs/compare/ablation.yaml").read_text())["variants"].items():
        blocks, layers, size, *rest = title.split(", ")
        settings = variant["settings"]
        assert f"{settings['coupling_blocks']} blocks" == blocks
        assert f"{len(settings['layers'])} layers" == layers
        assert settings.get("image_size", [256, 256]) == [int(size)] * 2
        assert settings.get("condition_dims", 128) == (0 if rest == ["UFLOW"] else 128)


def test_configs_combine(parse):
    config = parse("--config", ROOT / "configs/mvtec_ad/screw.yaml", "--config", ROOT / "configs/paper.yaml")
    assert config.model.init_args.backbone == "wide_resnet50_2"
    assert config.model.init_args.epochs == 100
    assert config.data.init_args.category == "screw"
    assert config.data.init_args.train_augmentations.init_args.degrees == [-5, 5]


def test_a_config_for_each_scene_of_shanghaitech(parse):
    paths = {path.stem: path for path in CONFIGS if path.stem.startswith("scene_")}
    assert set(paths) == {f"scene_{scene:02d}" for scene in range(1, 13)}
    for name, path in paths.items():
        given = yaml.safe_load(path.read_text())
        assert given["data"]["init_args"]["scene"] == int(name[-2:])
        assert given["model"]["init_args"]["backbone"] == "wide_resnet50_2"
    config = parse("--config", ROOT / "configs/paper.yaml", "--config", paths["scene_07"], "--data.frame_step", "1")
    assert config.model.init_args.epochs == 100
    assert config.data.class_path.endswith("ShanghaiTechFrames")
    assert config.data.init_args.scene == 7
    assert config.data.init_args.train_augmentations.init_args.degrees == [-5, 5]


@pytest.mark.parametrize("name", ["CflowPlugin", "cflow_plugin.CflowPlugin"])
def test_short_and_full_name(parse, name):
    config = parse("--model", name, "--model.backbone", "gabor", "--data", "Textures", "--data.category", "grille")
    assert config.model.init_args.backbone == "gabor"
    assert config.data.class_path.endswith("Textures")


@pytest.mark.long
def test_train_test_and_predict(tmp_path):
    model = ["--model", "CflowPlugin", *QUICK, *CPU]
    data = ["--data", "Textures", *FEW]
    out = run_command("anomalib", "train", *model, *data, cwd=tmp_path)
    assert "image_AUROC" in out
    results = tmp_path / "results/CflowPlugin/Textures/weave/latest"
    metrics = json.loads((results / "metrics.json").read_text())
    assert "pixel_AUPRO" in metrics
    tested = list((tmp_path / "datasets/Textures/weave/test").rglob("*.png"))
    assert len(list((results / "images").rglob("*.png"))) == len(tested) > 2
    checkpoint = results / "weights/lightning/model.ckpt"

    out = run_command("anomalib", "test", *model, *data, "--ckpt_path", checkpoint, cwd=tmp_path)
    tested_again = re.search(r"pixel_AUROC\D+([\d.]+)", out)
    assert float(tested_again[1]) == pytest.approx(metrics["pixel_AUROC"], abs=1e-5)

    pictures = set((tmp_path / "results").rglob("*.png"))
    images = tmp_path / "datasets/Textures/weave/train/good"
    run_command("anomalib", "predict", *model, "--data", images, "--ckpt_path", checkpoint, cwd=tmp_path)
    assert len(set((tmp_path / "results").rglob("*.png")) - pictures) == len(list(images.iterdir()))


@pytest.mark.long
def test_benchmark(tmp_path):
    config = {
        "accelerator": ["cpu"],
        "benchmark": {
            "seed": 0,
            "model": {
                "class_path": "CflowPlugin",
                "init_args": {"backbone": "gabor", "image_size": [64, 64], "epochs": 1, "steps_per_epoch": 2},
            },
            "data": {"class_path": "Textures", "init_args": {"resolution": 64, "train_good": 6, "test_good": 4}},
        },
    }
    (tmp_path / "benchmark.yaml").write_text(yaml.safe_dump(config))
    run_command("anomalib", "benchmark", "--config", "benchmark.yaml", cwd=tmp_path)
    [table] = tmp_path.rglob("*.csv")
    assert "CflowPlugin" in table.read_text()


EACH_ALONE = """
import os, sys
from importlib import import_module

import anomalib.deploy, anomalib.engine, cflow_plugin.data

from cflow_plugin.commands.cli import _COMMANDS

failed = []
for module in _COMMANDS.values():
    child = os.fork()
    if child == 0:
        import_module(module)
        os._exit(0)
    if os.waitpid(child, 0)[1]:
        failed.append(module)
        break
sys.exit(f"cannot be imported first: {failed}" if failed else 0)
"""


@pytest.mark.long
def test_each_command_can_be_imported_before_all_others(tmp_path):
    run_command("python", "-c", EACH_ALONE, cwd=tmp_path)


@pytest.mark.parametrize("path", sorted((ROOT / "benchmarks").glob("*.py")), ids=lambda path: path.stem)
def test_benchmarks_explain_themselves(path, capsys, monkeypatch):
    monkeypatch.setattr("sys.argv", [str(path), "--help"])
    monkeypatch.syspath_prepend(path.parent)
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(path), run_name="__main__")
    assert ended.value.code == 0
    out = capsys.readouterr().out
    assert f"usage: {path.name}" in out
    assert "No help" not in out


@pytest.mark.long
def test_errors_of_settings_are_one_sentence(tmp_path):
    model = "{class_path: CflowPlugin, init_args: {backbone: gabor}}"
    (tmp_path / "config.yaml").write_text(f"model: {model}\ndata: Textures\n")
    for setting, value, words in (
        ("layers", "[scale9]", "has no layer 'scale9'; choose from"),
        ("target_false_alarm_rate", "1.5", "must lie between 0 and 1"),
        ("condition_dims", "7", "positive multiple of four"),
        ("smallest_region", "100000", "the map has 256×256"),
        ("clamp", "-1", "clamp must be above 0"),
    ):
        command = ["anomalib", "train", "--config", "config.yaml", f"--model.{setting}", value]
        out = run_command(*command, cwd=tmp_path, expect=1)
        assert "Traceback" not in out
        assert out.strip().splitlines()[-1].startswith("error: ")
        assert words in out
        assert len(out) < 1000


@pytest.mark.long
def test_an_interrupt_is_one_sentence(tmp_path):
    for number in range(400):
        picture = draw("weave", "good", "test", number % 8, size=256).image
        cv2.imwrite(str(tmp_path / f"{number}.png"), picture)
    model = save_brightness_model(tmp_path / "model.xml")
    command = [Path(sys.executable).parent / "cflow-plugin", "score", "--model", model, "--source", tmp_path]
    command += ["--batch", "4", "--threads", "1", "--output", tmp_path / "out"]
    for _ in range(2):
        wanted = len(list(tmp_path.glob("out/*.parquet"))) + 2  # then it is at work
        with (tmp_path / "log").open("w") as log:
            run = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT)
        while len(list(tmp_path.glob("out/*.parquet"))) < wanted and run.poll() is None:
            time.sleep(0.001)
        run.send_signal(signal.SIGINT)
        assert run.wait(60) == 128 + signal.SIGINT
        said = (tmp_path / "log").read_text()
        assert "Traceback" not in said
        assert "Interrupted; what was written before is kept." in said


@pytest.mark.long
def test_a_signal_to_end_is_no_success(tmp_path):
    command = [Path(sys.executable).parent / "anomalib", "train", "--model", "CflowPlugin", "--data", "Textures", *FEW]
    command += ["--model.backbone", "gabor", "--model.image_size", "[64,64]", "--trainer.max_epochs", "5000"]
    with (tmp_path / "log").open("w") as log:
        run = subprocess.Popen(command, cwd=tmp_path, stdout=log, stderr=subprocess.STDOUT)
    try:
        while not list(tmp_path.rglob("last.ckpt")) and run.poll() is None:
            time.sleep(0.2)
        run.terminate()
        assert run.wait(120) == 128 + signal.SIGTERM
    finally:
        run.kill()
    said = " ".join((tmp_path / "log").read_text().split())
    assert "Ended by the system's signal in epoch" in said
    assert "Traceback" not in said


@pytest.mark.long
@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--model.weights", "absent.pth", "--data", "Textures", *FEW], ["no weights file", "--model.weights"]),
        (["--model.pre_trained", "false", "--data", "MVTecAD"], ["download failed", "--data.root"]),
        (["--data", "Textures", *FEW], ["could not be fetched", "--model.weights FILE", "--model.pre_trained false"]),
    ],
    ids=["no weights file", "no data set", "no hub"],
)
def test_errors_are_one_sentence(tmp_path, arguments, words):
    offline = {
        "HF_HOME": str(tmp_path / "hub"),
        "HF_ENDPOINT": "http://127.0.0.1:9",
        "https_proxy": "http://127.0.0.1:9",
    }
    command = ["anomalib", "train", "--model", "CflowPlugin", *arguments]
    # The hub's settings are read when its library is imported.
    out = run_command(*command, cwd=tmp_path, expect=1, fresh="fetched" in words[0], **offline)
    assert "Traceback" not in out
    last = out.strip().splitlines()[-1]
    assert last.startswith("error: ")
    assert all(word in last for word in words), last


@pytest.mark.long
def test_the_wheel_in_a_clean_environment(wheel, tmp_path):
    """Nothing of this checkout or of an editable install is in reach there; the dependencies are borrowed."""
    run_command("python", "-m", "venv", tmp_path / "clean", cwd=tmp_path)
    clean = tmp_path / "clean/bin/python"
    run_command(clean, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", wheel, cwd=tmp_path)
    [packages] = (tmp_path / "clean/lib").glob("python3*/site-packages")
    # A path named in a .pth file is searched after this environment's own, and its own .pth files are not run.
    (packages / "borrowed.pth").write_text(sysconfig.get_path("purelib") + "\n")
    where = run_command(clean, "-c", "import cflow_plugin; print(cflow_plugin.__file__)", cwd=tmp_path, PYTHONPATH="")
    assert str(packages) in where
    code = "import sys; from anomalib.cli.cli import main; sys.argv[0] = 'anomalib'; main()"
    out = run_command(
        clean, "-c", code, "train", "--config", ROOT / "configs/demo.yaml", *FEW, *QUICK, *CPU,
        "--model.layers", "null",
        cwd=tmp_path, PYTHONPATH="",
    )  # fmt: skip
    assert "pixel_AUPRO" in out
    assert (tmp_path / "results/CflowPlugin/Textures/weave/latest/metrics.json").is_file()
