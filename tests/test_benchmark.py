import csv
import json
import shutil

import numpy as np
import pytest
import torch
import yaml
from rich.console import Console

from cflow_plugin import CflowError
from cflow_plugin.commands.benchmark import speed
from cflow_plugin.commands.benchmark.candidates import Candidate, build_model, export_model, load, unavailable
from cflow_plugin.commands.benchmark.report import left_out, print_fast_enough, print_table

from .conftest import run_command


@pytest.mark.long
@pytest.mark.timeout(900)
def test_the_command(tmp_path):
    config = {
        "models": ["encoder"],  # the whole model takes far longer to export; see test_in_other_runtimes
        "backbones": ["resnet18"],
        "sizes": [64],
        "runtimes": ["torch", "openvino", "openvino-gpu"],
        "precisions": ["f32", "int8"],
        "rounds": 2,
        "seconds": 0.05,
    }
    (tmp_path / "speed.yaml").write_text(yaml.safe_dump(config))
    out = run_command("cflow-plugin", "benchmark", "--config", "speed.yaml", "--output", "out", cwd=tmp_path)
    report = json.loads((tmp_path / "out/speed.json").read_text())
    timed = {(row["model"], row["runtime"], row["precision"]) for row in report["rows"]}
    runs = [("torch", "f32"), ("openvino", "f32"), ("openvino", "int8")]
    assert timed == {("encoder", *run) for run in runs}
    for row in report["rows"]:
        assert 0 < row["p50_ms"] <= row["p90_ms"] <= row["p99_ms"]
        assert row["peak_memory_mb"] > 50
        assert row["runs"] >= 6
        assert ("file_mb" in row) == (row["runtime"] != "torch")
        assert (row["fps_throughput"] is not None) == (row["runtime"] == "openvino")
        if row["precision"] == "int8":
            assert "8" in row["executed"]
    with (tmp_path / "out/speed.csv").open() as file:
        assert len(list(csv.DictReader(file))) == len(report["rows"])
    text = (tmp_path / "out/speed.md").read_text()
    assert report["machine"]["processor"] in text
    assert "947" in text  # the published size of CFLOW-AD with wide_resnet50_2
    assert (tmp_path / "out/speed.png").stat().st_size > 1000
    assert "encoder resnet18 64 1 torch int8" in report["left_out"]["torch is not timed in int8"]
    assert "Left out, for torch is not timed in int8: encoder" in out


@pytest.mark.long
@pytest.mark.parametrize(
    ("model", "runtime", "precision"),
    [("CflowPlugin", "onnxruntime", "f32"), ("CflowPlugin", "openvino", "int8"), ("encoder", "onnxruntime", "f32")],
)
def test_in_other_runtimes(model, runtime, precision, tmp_path):
    """As each is prepared and loaded by the command, without the processes that it does so in."""
    candidate = Candidate(model, "resnet18", 64, 1, runtime, precision)
    built = build_model(model, "resnet18", 64)
    if model == "CflowPlugin":  # cut short: exporting all its blocks takes long
        for decoder in built.model.decoders:
            del decoder.module_list[2:]
    path, seconds = export_model(built, candidate, tmp_path)
    assert seconds > 0
    loaded = load(candidate, path, 1)
    loaded.run()
    assert (loaded.queue is None) == (runtime == "onnxruntime")
    assert ("8" in loaded.executed) == (precision == "int8")


@pytest.mark.long
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a compiler")
def test_compiled_by_torch():
    built = build_model("encoder", "test_resnet", 64)
    images = torch.from_numpy(np.random.default_rng(0).random((1, 3, 64, 64), dtype=np.float32))  # as it loads
    expected = built(images)  # before it is compiled
    loaded = load(Candidate("encoder", "test_resnet", 64, 1, "torch-compiled", "f32"), built, 1)
    assert loaded.seconds > 0
    for found, wanted in zip(loaded.run(), expected, strict=True):
        torch.testing.assert_close(found, wanted, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    "model", ["CflowPlugin", *(pytest.param(name, marks=pytest.mark.long) for name in ("Cflow", "Padim", "Spade"))]
)
def test_models_are_what_anomalib_trains(model):
    assert build_model(model, "resnet18", 64).__class__.__name__ == model


def test_what_is_not_there_is_named():
    assert "INT8" in unavailable(Candidate("Padim", "resnet18", 64, 1, "openvino", "int8"))
    assert "gallery" in unavailable(Candidate("Spade", "resnet18", 64, 1, "openvino", "f32"))
    assert "f16" in unavailable(Candidate("encoder", "resnet18", 64, 1, "torch", "f16"))


@pytest.mark.long
def test_help_and_errors(tmp_path):
    out = run_command("cflow-plugin", "--help", cwd=tmp_path)
    assert "benchmark" in out
    assert "watch" in out
    out = run_command("cflow-plugin", "benchmark", "--help", cwd=tmp_path)
    assert "Devices that are not there are named" in " ".join(out.split())
    out = run_command("cflow-plugin", "watch", "--model", "no.xml", "--source", ".", cwd=tmp_path, expect=1)
    assert out.strip().splitlines()[-1].startswith("error: There is no exported model")


@pytest.mark.parametrize("width", [80, 240])
def test_the_table_fits_the_screen(width, capsys):
    row = {
        "model": "CflowPlugin", "backbone": "tf_efficientnet_lite0", "size": 256, "batch": 1, "runtime": "openvino",
        "precision": "int8-bf16", "executed": "u8 (48), bf16 (29), f32 (3)", "p50_ms": 11.25, "p90_ms": 13.5,
        "p99_ms": 19.25, "fps": 88.25, "fps_throughput": 103.0, "file_mb": 18.0, "parameters_mb": 80.5,
        "peak_memory_mb": 1387.0, "export_seconds": 16.25,
    }  # fmt: skip
    print_table([row, {**row, "backbone": "resnet18", "size": 512, "file_mb": None}], Console(width=width))
    out = capsys.readouterr().out
    assert "…" not in out
    assert max(map(len, out.splitlines())) <= width
    for shown in ("CflowPlugin", "resnet18", "256", "512", "88.2", "18.0"):
        assert shown in out
    assert ("1387.0" in out) == (width == 240)


def test_what_is_left_out_is_summed_up():
    [few, many] = left_out({"a reason": ["x", "y"], "another": list("abcd")})
    assert few == "Left out, for a reason: x, y."
    assert many == "Left out, for another: 4 combinations, such as a."


def test_what_is_fast_enough_is_named_the_most_accurate_first(capsys):
    def row(model, backbone, precision, fps, runtime="openvino"):
        executed = {"runtime": runtime, "precision": precision, "executed": precision.upper()}
        return {"model": model, "backbone": backbone, "size": 256, "fps": fps, **executed}

    rows = [
        row("CflowPlugin", "tf_efficientnet_lite0", "f32", 90.0),
        row("CflowPlugin", "tf_efficientnet_lite0", "bf16", 140.0),  # which it does not bear
        row("CflowPlugin", "resnet18", "f32", 30.0),
        row("CflowPlugin", "resnet18", "bf16", 61.0),
        row("CflowPlugin-int8", "resnet18", "int8", 52.0),
        row("CflowPlugin-int8", "resnet18", "int8-bf16", 70.0),
        row("CflowPlugin", "mobilenetv3_large_100", "f32", 99.0),
        row("Padim", "resnet18", "f32", 200.0),
    ]
    console = Console(width=400)
    print_fast_enough(rows, 60, console)
    out = capsys.readouterr().out
    found = [line.split() for line in out.splitlines() if line.strip().startswith(("resnet", "tf_", "mobile"))]
    assert [(line[0], line[-2]) for line in found] == [
        ("resnet18", "70"), ("tf_efficientnet_lite0", "90"), ("mobilenetv3_large_100", "99"),
    ]  # fmt: skip
    assert "not measured" in out
    [train] = [line for line in out.splitlines() if "anomalib train" in line]
    assert '--model.backbone resnet18 --model.image_size "[256, 256]" --model.encoder_precision int8' in train
    [export] = [line for line in out.splitlines() if "anomalib export" in line]
    assert "--compression_type INT8_PTQ" in export
    assert "--precision bf16" in out.splitlines()[-1]
    print_fast_enough(rows, 50, console)
    out = capsys.readouterr().out
    assert "52" in out.split("resnet18")[1].split("\n")[0]
    assert "--precision bf16" not in out
    print_fast_enough(rows, 80, console)
    out = capsys.readouterr().out
    assert "int8" not in out
    assert "--precision bf16" not in out
    print_fast_enough([row("CflowPlugin", "resnet18", "f32", 90.0, "torch")], 80, console)
    assert "anomalib export" not in capsys.readouterr().out
    print_fast_enough(rows, 150, console)
    assert "No setting" in capsys.readouterr().out


def test_a_failed_export_does_not_end_the_others(tmp_path, monkeypatch):
    """Each candidate has a folder of its own, and what cannot be exported is left out with its reason."""

    def export(model, candidate, folder):
        if candidate.precision == "int8":
            (folder / "rest").touch()
            raise CflowError("it cannot be quantized")
        return export_model(model, candidate, folder)

    monkeypatch.setattr(speed, "export_model", export)
    wanted = [Candidate("encoder", "resnet18", 64, 1, "openvino", precision) for precision in ("int8", "f32")]
    skipped: dict[str, list[str]] = {}
    prepared = speed._prepare(wanted, tmp_path, 1, skipped)
    assert [candidate.precision for candidate, _ in prepared] == ["f32"]
    assert list(skipped) == ["it cannot be quantized"]
