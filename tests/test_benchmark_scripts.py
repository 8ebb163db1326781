import json
import runpy
import time

import pytest
import torch

from .conftest import ROOT, make_textures

SCRIPTS = sorted((ROOT / "benchmarks").glob("*.py"))


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.stem)
def test_scripts_find_what_they_import(script, monkeypatch):
    monkeypatch.syspath_prepend(script.parent)  # as Python does for a script
    assert runpy.run_path(str(script), run_name="imported")["__doc__"]


@pytest.mark.long
@pytest.mark.parametrize("name", ["test_vit", "test_mambaout"])
def test_networks_of_other_kinds_are_trained_and_exported(name):
    script = runpy.run_path(str(ROOT / "benchmarks/encoders.py"), run_name="imported")
    row = script["examine"](name, 64, ["OpenVINO", "ONNX"])
    assert not {"refused", "wrong"} & set(row), row
    assert row["size"] == "64×64"
    assert all(row[kind] < script["TOLERANCES"][kind] for kind in ("OpenVINO", "ONNX"))


@pytest.mark.long
def test_the_gpu_script_is_rehearsed(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    runpy.run_path(str(ROOT / "benchmarks/gpu.py"), run_name="imported")["main"](rehearse=True, output=tmp_path)
    report = json.loads((tmp_path / "gpu.json").read_text())
    assert [(row["recipe"], row["precision"]) for row in report["training"]] == [
        ("default", "32"), ("default", "bf16-mixed"), ("paper", "32"), ("paper", "bf16-mixed"),
    ]  # fmt: skip
    assert report["a run repeats itself bit by bit"] is True
    assert report["largest difference of scores"] < 1e-3
    timed = {row["mode"]: row for row in report["inference"]}
    assert timed["f32"]["p50 ms"] > 0
    if not torch.cuda.is_available():
        assert timed["CUDA graph"]["not measured"] == "CflowError: there is no GPU"


def test_the_gpu_script_ends_when_its_minutes_are_over(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    inference = runpy.run_path(str(ROOT / "benchmarks/gpu.py"), run_name="imported")["inference"]
    found = inference(["CflowPlugin"], "test_resnet", 64, [1], "cpu", 1, 0.01, time.monotonic() + 60)
    assert {row["mode"] for row in found if "p50 ms" in row} == {"f32", "bf16"}
    late = inference(["CflowPlugin"], "test_resnet", 64, [1], "cpu", 1, 0.01, time.monotonic())
    assert {row["not measured"] for row in late if row["mode"] in ("f32", "bf16")} == {
        "CflowError: the minutes are over"
    }


@pytest.mark.long
@pytest.mark.parametrize("images", [None, 3])
def test_accuracy_is_of_the_images_that_were_asked_for(images, tmp_path, monkeypatch):
    data = make_textures(tmp_path / "data", train_good=8, test_good=3)
    data.prepare_data()
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    measure = runpy.run_path(str(ROOT / "benchmarks/accuracy.py"), run_name="imported")["measure"]
    folder = tmp_path / "data/weave"
    arguments = ("Spade", {}, folder, "gabor", ["scale1", "scale2"], None, 0, tmp_path / "runs")
    [found] = measure(*arguments, images=images).values()
    assert found["training_images"] == (images or 8)
    assert 0.5 < found["pixel_AUROC"] <= 1


@pytest.mark.long
def test_scoring_anew_is_training_with_that_scoring(tmp_path, monkeypatch):
    data = make_textures(tmp_path / "data", train_good=8, test_good=3)
    data.prepare_data()
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    measure = runpy.run_path(str(ROOT / "benchmarks/accuracy.py"), run_name="imported")["measure"]
    rest = (tmp_path / "data/weave", "gabor", ["scale1", "scale2"], None, 0, tmp_path / "runs")
    other = {"sigma": 4.0, "top_fraction": 0.01, "position_correction": 0.0, "map_mean": 0.0, "whole_image": 0.0}
    short = {"epochs": 2}
    found = measure("CflowPlugin", short, *rest, rescored={"other": other})
    assert found["other"] != found[""]
    assert found["other"] == pytest.approx(measure("CflowPlugin", {**short, **other}, *rest)[""], abs=1e-6)
