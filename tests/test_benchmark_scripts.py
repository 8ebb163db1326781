import runpy

import pytest

from .conftest import ROOT

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
    assert max(row["OpenVINO"], row["ONNX"]) < script["TOLERANCE"]
