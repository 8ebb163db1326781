"""``cflow-plugin check``: files that are as they should be, and each way in which one may not be."""

import json
from pathlib import Path

import numpy as np
import onnx
import openvino as ov
import pytest
import torch
from anomalib.data import Folder
from anomalib.deploy import CompressionType
from lightning import seed_everything
from openvino import opset13 as operations
from openvino.preprocess import PrePostProcessor
from PIL import Image

from cflow_plugin import CflowError, CflowPlugin, __version__
from cflow_plugin.commands.check import check
from cflow_plugin.commands.check.comparison import alarms_expected, reference_scores_hold
from cflow_plugin.commands.check.file import check_file
from cflow_plugin.commands.check.runtimes import NotHereError, runtimes_for
from cflow_plugin.decisions.conformal import threshold_rank
from cflow_plugin.decisions.reference_scores import KEY, read_reference_scores
from cflow_plugin.deploy import export as export_module
from cflow_plugin.deploy.fingerprint import (
    FINGERPRINT,
    RELEASE,
    decision_threshold,
    fingerprint_of,
    patterns,
    tensor_of,
)
from cflow_plugin.deploy.runtime import note_of

from .brightness import save_brightness_model
from .conftest import SHARED, make_engine, make_textures, once, run_command
from .test_ends import small_model

KINDS = ["openvino", "onnx"]


def checked(path, folder, expect, **arguments):
    """Check a file; what was found, by what was looked at."""
    output = folder / "check.json"
    output.unlink(missing_ok=True)
    # Trained for a few steps, a model decides by differences that bf16 does not keep, where a processor has it.
    arguments.setdefault("precisions", ("f32",))
    if expect:
        with pytest.raises(SystemExit) as ended:
            check(path, output=output, **arguments)
        assert ended.value.code == expect
    else:
        check(path, output=output, **arguments)
    report = json.loads(output.read_text())
    assert report["differs"] == bool(expect)
    return report, {row.get("what", row.get("name")): row for row in [*report["file"], *report["runtimes"]]}


def found(path):
    """What the file says of itself, without running it elsewhere."""
    return {
        row.what: row._asdict() for row in check_file(ov.Core().read_model(path), read_reference_scores(path), 1e-3)
    }


def not_agreeing(rows):
    return {name for name, row in rows.items() if row["agrees"] is False}


def saved(model, folder):
    path = folder / "model.xml"
    ov.save_model(model, path, compress_to_fp16=False)
    return path


@pytest.fixture(scope="module")
def rated(common):
    """A folder with the checkpoint of a model that keeps a false-alarm rate, its file, and good images."""

    def make(folder: Path) -> None:
        data = make_textures(common / "check data", train_good=30, test_good=20)
        data.prepare_data()
        data.setup()
        model = small_model()
        make_engine(folder / "run").fit(model, datamodule=data)
        next((folder / "run").rglob("model.ckpt")).resolve().rename(folder / "model.ckpt")
        model.eval().to_openvino(folder)

    folder = once(common / "rated", make)
    return folder / "model.ckpt", next(folder.rglob("model.xml")), common / "check data/weave/test/good"


# The pattern


@pytest.mark.long
@pytest.mark.parametrize("kind", KINDS)
def test_the_fingerprint_is_what_the_trained_model_gives(kind, trained, export):
    stored = json.loads(note_of(ov.Core().read_model(export((64, 64), kind)), FINGERPRINT))
    assert stored["size"] == [64, 64]
    for index, pixels in enumerate(patterns((64, 64))):
        with torch.no_grad():
            expected = trained(torch.from_numpy(tensor_of(pixels)))
        assert stored["scores"][index] == pytest.approx(expected.pred_score.item(), abs=1e-4)
        assert stored["labels"][index] == expected.pred_label.item()
        means = torch.nn.functional.avg_pool2d(
            expected.anomaly_map, [side // 4 for side in expected.anomaly_map.shape[-2:]]
        )
        np.testing.assert_allclose(stored["maps"][index], means.flatten().numpy(), atol=1e-4)
    assert stored["threshold"] == pytest.approx(0.5, abs=1e-6)


def test_patterns_have_all_bits():
    for bits, kind in ((8, np.uint8), (12, np.uint16), (16, np.uint16)):
        images = patterns((40, 50), bits)
        assert {image.dtype for image in images} == {np.dtype(kind)}
        assert max(int(image.max()) for image in images) in range(2**bits - 2 ** (bits - 5), 2**bits)
        assert len({image.tobytes() for image in images}) == len(images)


# Files that are as they should be


@pytest.mark.long
@pytest.mark.parametrize("kind", KINDS)
def test_a_good_file(kind, export, checkpoint, tmp_path):
    report, rows = checked(export(None, kind), tmp_path, 0, checkpoint=checkpoint)
    assert report["reference"] == "torch"
    compared = {"OpenVINO f32", "anomalib OpenVINOInferencer", "anomalib TorchInferencer"}
    compared |= {"ONNX Runtime"} if kind == "onnx" else set()
    for name in compared:
        assert rows[name]["score"] < 1e-4
        assert rows[name]["map"] < 1e-4
        assert rows[name]["decisions"] == 0
        assert rows[name]["milliseconds"] > 0
    if kind == "openvino":
        assert rows["ONNX Runtime"]["agrees"] is None
        assert ".onnx" in rows["ONNX Runtime"]["detail"]
    for name in ("release", "input", "fingerprint", "threshold", "weights"):
        assert rows[name]["agrees"] is True, rows[name]
    assert not list(Path.cwd().glob("openvino_cache"))


@pytest.mark.long
def test_the_command(rated, tmp_path):
    checkpoint, path, good = rated
    out = run_command(
        "cflow-plugin", "check", path, "--checkpoint", checkpoint, "--images", good,
        "--precisions", "[f32]", cwd=tmp_path,
    )  # fmt: skip
    assert "Nothing differs" in out
    report = json.loads((tmp_path / "results/check.json").read_text())
    assert report["good_images"] == 20
    assert report["false_alarms_likely"][0] <= 4 <= report["false_alarms_likely"][1]
    rows = {row["what"]: row for row in report["file"]}
    assert "score what is stored" in rows["reference scores"]["detail"]

    assert [row["name"] for row in report["runtimes"] if row["name"].startswith("OpenVINO")] == ["OpenVINO f32"]

    changed = ov.Core().read_model(path)
    changed.set_rt_info("0.0.9", RELEASE)
    out = run_command(
        "cflow-plugin", "check", saved(changed, tmp_path), "--output", "it.json", "--precisions", "[f32]",
        cwd=tmp_path, expect=3,
    )  # fmt: skip
    assert "DIFFERS: release." in out
    assert "Traceback" not in out
    assert json.loads((tmp_path / "it.json").read_text())["differs"]

    out = " ".join(run_command("cflow-plugin", "check", "--help", cwd=tmp_path).split())
    for word in ("--checkpoint", "--images", "--tolerance", "exit code", "fingerprint", "false alarms"):
        assert word in out
    assert "No help" not in out


@pytest.mark.long
def test_images_of_another_size_are_the_same_for_all(trained, export, checkpoint, tmp_path):
    generator = np.random.default_rng(0)
    for number, size in enumerate([(64, 64), (90, 200), (31, 40)]):
        Image.fromarray(generator.integers(0, 256, (*size, 3), dtype=np.uint8)).save(tmp_path / f"{number}.png")
    _, rows = checked(export((64, 64)), tmp_path, 0, checkpoint=checkpoint, images=str(tmp_path))
    assert rows["OpenVINO f32"]["score"] < 1e-4


# Files that are not


def with_constants(path, change):
    """A file's model with other single constants: ``change`` gets a constant's value and gives one, or ``None``."""
    model = ov.Core().read_model(path)
    changed = 0
    for node in model.get_ops():
        if node.get_type_name() == "Constant" and np.prod(list(node.shape)) == 1:
            value = float(np.asarray(node.data).item())
            if node.get_element_type() == ov.Type.f32 and (new := change(value)) is not None:
                node.output(0).replace(operations.constant(np.full(node.shape, new, np.float32)).output(0))
                changed += 1
    assert changed
    return model


@pytest.mark.long
def test_a_tampered_threshold(trained, export, tmp_path):
    """Before the normalisation: scores move, and with them what is anomalous."""
    threshold = trained.post_processor.image_threshold.item()
    tampered = with_constants(export(None), lambda value: value + 0.05 if abs(value - threshold) < 1e-6 else None)
    assert not_agreeing(found(saved(tampered, tmp_path))) == {"fingerprint"}


@pytest.mark.long
@pytest.mark.parametrize("kind", KINDS)
def test_a_tampered_decision(kind, export, tmp_path):
    """Behind the normalisation: scores stay, and none of the pattern's decisions need change."""
    if kind == "openvino":
        model = ov.Core().read_model(export(None))
        [label] = [output.get_node() for output in model.outputs if "pred_label" in output.get_names()]
        node = label.input_value(0).get_node()
        while node.get_type_name() not in {"Greater", "GreaterEqual", "Less", "LessEqual"}:
            node = node.input_value(0).get_node()
        for place in (0, 1):
            if not is_of_score(node.input_value(place).get_node()):
                node.input(place).replace_source_output(operations.constant(np.float32(0.62)).output(0))
        path = saved(model, tmp_path)
    else:
        model, path = onnx.load(export(None, "onnx")), tmp_path / "model.onnx"
        producers = {name: node for node in model.graph.node for name in node.output}
        node = producers["pred_label"]
        while node.op_type not in {"Greater", "GreaterOrEqual", "Less", "LessOrEqual"}:
            node = producers[node.input[0]]
        place = next(
            place
            for place in (0, 1)
            if node.input[place] not in {*producers, "input"} or "Constant" in producers[node.input[place]].op_type
        )
        model.graph.initializer.append(onnx.numpy_helper.from_array(np.float32(0.62), "tampered"))
        node.input[place] = "tampered"
        onnx.save(model, path)
    assert decision_threshold(ov.Core().read_model(path)) == pytest.approx(0.62, abs=1e-5)
    rows = found(path)
    assert "threshold" in not_agreeing(rows)
    assert "decides at a score of 0.62" in rows["threshold"]["detail"]


def is_of_score(node):
    """Whether a value depends on the image."""
    kind = node.get_type_name()
    return kind == "Parameter" or any(is_of_score(value.get_node()) for value in node.input_values())


@pytest.mark.long
@pytest.mark.parametrize(("kind", "release"), [("openvino", "0.0.9"), ("openvino", None), ("onnx", "0.0.9")])
def test_a_file_of_another_release(kind, release, export, tmp_path):
    assert note_of(ov.Core().read_model(export(None, kind)), RELEASE) == __version__
    path = tmp_path / f"model.{'xml' if kind == 'openvino' else 'onnx'}"
    if kind == "openvino":
        text = export(None).read_text()
        line = f'<{RELEASE} value="{__version__}" />'
        assert line in text
        path.write_text(text.replace(line, "" if release is None else f'<{RELEASE} value="{release}" />'))
        path.with_suffix(".bin").write_bytes(export(None).with_suffix(".bin").read_bytes())
    else:
        model = onnx.load(export(None, "onnx"))
        notes = {entry.key: entry.value for entry in model.metadata_props if entry.key != RELEASE}
        del model.metadata_props[:]
        onnx.helper.set_model_props(model, notes if release is None else {**notes, RELEASE: release})
        onnx.save(model, path)
    rows = found(path)
    assert not_agreeing(rows) == {"release"}
    assert (release or "does not say its number") in rows["release"]["detail"]


@pytest.mark.long
def test_a_wrong_input_scale_in_the_metadata(export, textures, tmp_path):
    model = ov.Core().read_model(export((64, 64)))
    model.set_rt_info("1 1 1", ["model_info", "scale_values"])
    images = Path(textures.train_data.samples.image_path[0]).parent
    _, rows = checked(saved(model, tmp_path), tmp_path, 3, images=str(images))
    assert "scale_values 1 1 1" in rows["input"]["detail"]
    wrapper = rows["openvino-model-api"]
    assert not_agreeing(rows) == {"input"} | ({"openvino-model-api"} if wrapper["agrees"] is not None else set())


@pytest.mark.long
def test_a_wrong_input_scale_in_the_graph(export, tmp_path):
    model = ov.Core().read_model(export(None))
    steps = PrePostProcessor(model)
    steps.input().preprocess().scale(255.0)
    rows = found(saved(steps.build(), tmp_path))
    assert not_agreeing(rows) >= {"fingerprint"}
    assert "takes values from 0 to 255" in rows["fingerprint"]["detail"]


@pytest.mark.long
def test_a_file_that_was_compressed_after_its_thresholds(rated, tmp_path):
    path = tmp_path / "model.xml"
    ov.save_model(ov.Core().read_model(rated[1]), path, compress_to_fp16=True)
    rows = found(path)
    assert "weights" in not_agreeing(rows)
    assert "f16, and at export in f32" in rows["weights"]["detail"]


@pytest.mark.long
def test_a_compressed_file_with_the_thresholds_of_another(rated, tmp_path, monkeypatch):
    """As if its export had taken over the trained model's: all that it says of itself is then true of it."""
    checkpoint, kind = rated[0], CompressionType.INT8
    model = CflowPlugin.load_from_checkpoint(checkpoint, map_location="cpu").eval()
    own = model.to_openvino(tmp_path / "own", compression_type=kind)
    _, rows = checked(own, tmp_path, 0, checkpoint=checkpoint)
    assert "score what is stored" in rows["reference scores"]["detail"]
    monkeypatch.setattr(export_module, "thresholds_of", lambda *_: model.post_processor)
    stale = model.to_openvino(tmp_path / "stale", compression_type=kind)
    _, rows = checked(stale, tmp_path, 3, checkpoint=checkpoint, tolerance=1e-4)
    assert not_agreeing(rows) == {"reference scores"}


@pytest.mark.long
@pytest.mark.shared
def test_quantised_files_of_a_real_encoder(tmp_path):
    """With weights from ImageNet, on photographs; of their images some are of another size than the file's."""
    root = SHARED / "data/cookies"
    data = Folder(
        name="cookies", root=root, normal_dir="train/good", normal_test_dir="test/good", abnormal_dir="test/defect",
        num_workers=0, val_split_mode="same_as_test",
    )  # fmt: skip
    seed_everything(0)
    model = CflowPlugin(
        layers=["layer2", "layer3"], weights=str(SHARED / "weights/resnet18.tv_in1k-layer1-3.safetensors"),
        image_size=(96, 96), coupling_blocks=2, epochs=2, steps_per_epoch=20, target_false_alarm_rate=0.15,
        visualizer=False,
    )  # fmt: skip
    engine = make_engine(tmp_path / "run")
    engine.fit(model, datamodule=data)
    engine.trainer.save_checkpoint(tmp_path / "model.ckpt")
    for kind in (CompressionType.INT8_PTQ, CompressionType.INT8_ACQ):
        path = model.eval().to_openvino(tmp_path / kind, (96, 96), compression_type=kind, datamodule=data)
        good = str(root / "test/good")
        _, rows = checked(path, tmp_path, 0, checkpoint=tmp_path / "model.ckpt", images=good)
        assert "quantized" in rows["weights"]["detail"]
        assert "score what is stored" in rows["reference scores"]["detail"]
        assert rows["torch"]["decisions"] is not None


@pytest.mark.long
def test_stale_scores_without_the_checkpoint(rated, tmp_path):
    """Given good images alone: their scores are not distributed as those that are stored."""
    _, path, good = rated
    _, rows = checked(path, tmp_path, 0, images=str(good))
    assert rows["reference scores"]["agrees"] is True
    model = ov.Core().read_model(path)
    scores = np.array(json.loads(note_of(model, KEY)))
    model.set_rt_info(json.dumps((scores - scores.max() + 0.5 - 0.4).tolist()), KEY)
    _, rows = checked(saved(model, tmp_path), tmp_path, 3, images=str(good))
    assert "reference scores" in not_agreeing(rows)


# What it rests on


@pytest.mark.parametrize(("images", "rate", "new"), [(19, 0.05, 60), (40, 0.2, 30)])
def test_likely_alarms(images, rate, new):
    """Of exchangeable scores: the interval holds 99 % of what is drawn, and not far more."""
    generator = np.random.default_rng(0)
    scores = generator.random((20_000, images + new))
    thresholds = np.sort(scores[:, :images], axis=1)[:, threshold_rank(images, rate) - 1]
    alarms = (scores[:, images:] > thresholds[:, None]).sum(1)
    expected = alarms_expected(list(range(new)), images, rate)
    inside = ((alarms >= expected.low) & (alarms <= expected.high)).mean()
    assert inside > 0.985
    assert (alarms <= expected.high - 1).mean() < 0.997


def test_reference_scores_are_held_against_new_ones():
    generator = np.random.default_rng(1)
    stored, same, other = (np.sort(generator.normal(mean, 0.1, 60)) for mean in (0.4, 0.4, 0.55))
    assert reference_scores_hold(stored, None, same, 1e-3).agrees is True
    assert reference_scores_hold(stored, None, other, 1e-3).agrees is False
    assert reference_scores_hold(stored, stored[::-1] + 1e-4, other, 1e-3).agrees is True
    assert reference_scores_hold(stored, stored + 2e-3, same, 1e-3).agrees is False
    assert reference_scores_hold(stored, stored[:-1], same, 1e-3).agrees is False
    assert reference_scores_hold(None, None, same, 1e-3).agrees is None
    assert reference_scores_hold(stored, None, same[:2], 1e-3).agrees is None


@pytest.mark.parametrize("batch", [1, 4, -1])
@pytest.mark.parametrize(("kind", "threshold"), [("greater", 0.3), ("greater_equal", 0.75), ("less", 0.2)])
def test_the_threshold_is_found_by_trying(kind, threshold, batch):
    image = operations.parameter([batch, 3, 4, 4], ov.Type.f32)
    score = operations.reduce_mean(image, np.array([1, 2, 3]), keep_dims=False)
    label = getattr(operations, kind)(score, np.float32(threshold))
    label = operations.logical_not(label) if kind == "less" else label
    for node, name in ((score, "pred_score"), (label, "pred_label")):
        node.output(0).set_names({name})
    model = ov.Model([score, label], [image], "model")
    assert decision_threshold(model) == pytest.approx(threshold, abs=1e-6)
    whole = ov.Core().compile_model(model, "CPU")
    assert whole(np.full((abs(batch), 3, 4, 4), 0.5, np.float32))["pred_score"][0] == 0.5


def test_openvino_computes_in_what_is_asked_for(tmp_path):
    path = save_brightness_model(tmp_path / "model.xml")
    model = ov.Core().read_model(path)
    runtimes = {one.name: one for one in runtimes_for(path, model, precisions=("bf16",))}
    assert [name for name in runtimes if name.startswith("OpenVINO")] == ["OpenVINO f32", "OpenVINO bf16"]
    pixels = np.full((8, 8, 3), 1000 / 3000, np.float32)
    assert runtimes["OpenVINO f32"].open()(pixels).score == pytest.approx(1 / 3, abs=1e-6)
    if "BF16" not in ov.Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES"):
        with pytest.raises(NotHereError, match="does not compute in bf16"):
            runtimes["OpenVINO bf16"].open()
    else:
        assert runtimes["OpenVINO bf16"].open()(pixels).score == pytest.approx(1 / 3, abs=2**-8)


def test_what_cannot_be_checked(export, tmp_path):
    (tmp_path / "damaged.xml").write_text("nothing")
    (tmp_path / "damaged.ckpt").write_text("nothing")
    (tmp_path / "empty").mkdir()
    good = export(None)
    for arguments, words in (
        ({"model": tmp_path / "absent.xml"}, "no exported model"),
        ({"model": tmp_path / "damaged.xml"}, "could not be read"),
        ({"model": good, "checkpoint": tmp_path / "absent.ckpt"}, "no checkpoint"),
        ({"model": good, "checkpoint": tmp_path / "damaged.ckpt"}, "damaged"),
        ({"model": good, "images": str(tmp_path / "empty")}, "no image"),
        ({"model": good, "tolerance": 0.0}, "--tolerance"),
    ):
        with pytest.raises(CflowError, match=words):
            check(output=tmp_path / "out.json", **arguments)
    assert not (tmp_path / "out.json").exists()


def test_a_fingerprint_leaves_the_model_alone(export):
    model = ov.Core().read_model(export(None))
    before = [
        (node.get_friendly_name(), str(node.output(0).partial_shape))
        for node in model.get_ordered_ops()
        if node.outputs()
    ]
    assert fingerprint_of(model) == fingerprint_of(model)
    after = [
        (node.get_friendly_name(), str(node.output(0).partial_shape))
        for node in model.get_ordered_ops()
        if node.outputs()
    ]
    assert before == after
