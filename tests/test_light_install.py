"""The list of packages that run exported files; .ci/light makes an environment of them and runs the commands in it."""

import subprocess
import sys

import pytest
from packaging.requirements import Requirement

from .conftest import ROOT

HEAVY = ["torch", "anomalib", "timm", "nncf", "lightning", "torchvision", "FrEIA", "onnx", "pandas", "sklearn", "ray"]
WITHOUT = """
import sys
class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {heavy}:
            raise ModuleNotFoundError("No module named " + name, name=name)
sys.meta_path.insert(0, Absent())
from cflow_plugin.commands.cli import main
main({arguments})
"""


def test_its_packages_are_ours():
    try:
        import tomllib
    except ModuleNotFoundError:  # before Python 3.11
        pytest.skip("needs Python 3.11 to read pyproject.toml")
    ours = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    light = [line for line in (ROOT / "runtime.txt").read_text().splitlines() if not line.startswith("#")]
    assert set(light) < set(ours)
    assert not {Requirement(line).name for line in light} & set(HEAVY)


@pytest.mark.parametrize(
    ("arguments", "status", "words"),
    [
        (["--help"], 0, "monitor"),
        (["watch", "--help"], 0, "--follow"),
        (["check", "--help"], 0, "--checkpoint"),
        (["recalibrate", "--help"], 0, "--rate"),
        (["encoders"], 1, "only runs exported files"),
        (["monitor", "--recent", "a.csv", "--reference", "a.ckpt"], 1, "only runs exported files"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_commands_without_what_is_heavy(tmp_path, arguments, status, words):
    (tmp_path / "a.ckpt").touch()
    code = WITHOUT.format(heavy=set(HEAVY), arguments=arguments)
    run = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, env=None, check=False
    )
    assert run.returncode == status, run.stderr
    assert words in run.stdout + run.stderr
    assert "Traceback" not in run.stderr
