import os
import subprocess
import sys
from pathlib import Path

import pytest

from .conftest import ROOT
from .warm import OTHERS, WarmProcess


@pytest.fixture(scope="module")
def others():
    """A process that has imported what takes long, but nothing of anomalib or this package."""
    process = WarmProcess(OTHERS)
    yield process
    process.close()


@pytest.fixture
def warm_python(others, tmp_path):
    def run(code):
        names = "sorted({name.split('.')[0] for name in sys.modules} & {'anomalib', 'cflow_plugin'})"
        code = f"import sys\nprint({names})\n{code}"
        status = others.run(["-c", code], tmp_path, {**os.environ}, tmp_path / "log.txt")
        out = (tmp_path / "log.txt").read_text()
        assert "['cflow_plugin']\n" in out, "anomalib must not be imported yet"  # startup.py is
        return status, out.strip()

    return run


def python(code, *options, **environment):
    finished = subprocess.run(
        [sys.executable, *options, "-c", code],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=300,
    )
    return finished.returncode, finished.stdout.strip(), finished.stderr


def test_interpreter_start_imports_nothing_heavy():
    _, modules, _ = python("import sys; print(' '.join(sys.modules))")
    _, without, _ = python("import sys; print(' '.join(sys.modules))", CFLOW_PLUGIN_AUTOLOAD="0")
    extra = set(modules.split()) - set(without.split())
    assert not {name for name in modules.split() if name.split(".")[0] in ("torch", "anomalib", "lightning", "numpy")}
    assert extra <= {"cflow_plugin", "cflow_plugin.anomalib_patches.startup"}


def test_other_programs_do_not_meet_it():
    code = "import json, urllib.parse, sys; print('cflow_plugin.training' in sys.modules, 'torch' in sys.modules)"
    assert python(code)[1] == "False False"


@pytest.mark.long
@pytest.mark.parametrize(
    "first",
    [
        "anomalib.models",
        "anomalib.data",
        "anomalib.engine",
        "cflow_plugin.data",
        "cflow_plugin.training.lightning_model",
        "cflow_plugin.baselines.spade",
        "cflow_plugin.deploy.export",
        "cflow_plugin.training.one_class",
    ],
)
def test_names_are_known_whatever_is_imported_first(first, warm_python):
    code = (
        f"import {first}\n"
        "import anomalib.models, anomalib.data\n"
        "print(anomalib.models.CflowPlugin.__name__, anomalib.models.Spade.__name__, anomalib.data.Textures.__name__)"
    )
    status, out = warm_python(code)
    assert status == 0, out
    assert out.splitlines()[-1] == "CflowPlugin Spade Textures"


LOOK_UP = (
    "from anomalib.models import get_model, list_models\n"
    "print({'cflow_plugin', 'spade'} <= list_models())\n"
    "print(type(get_model('cflow_plugin', backbone='gabor')).__module__)\n"
    "print(type(get_model('spade', backbone='gabor', layers=['scale1'], image_layer='scale2')).__module__)"
)


@pytest.mark.long
def test_found_by_anomalib_s_own_look_up(warm_python):
    status, out = warm_python(LOOK_UP)
    assert status == 0, out
    modules = ["cflow_plugin.training.lightning_model", "cflow_plugin.baselines.spade.lightning_model"]
    assert out.splitlines()[-3:] == ["True", *modules]


@pytest.mark.long
def test_not_found_without_it(warm_python):
    code = "from cflow_plugin.anomalib_patches.startup import _Finder\nsys.meta_path.remove(_Finder)\n"
    status, out = warm_python(code + LOOK_UP)
    assert status == 1
    assert "False\n" in out
    assert "UnknownModelError" in out or "Could not find" in out


@pytest.mark.parametrize(("switch", "there"), [("", "True"), ("0", "False")])
def test_switched_off(switch, there):
    code = "import sys; print(any(getattr(f, '__module__', '').startswith('cflow_plugin') for f in sys.meta_path))"
    assert python(code, CFLOW_PLUGIN_AUTOLOAD=switch)[1] == there


STARTUP = "anomalib_patches/startup"


@pytest.mark.long
@pytest.mark.parametrize("module", [STARTUP, "training/lightning_model"])
def test_a_broken_installation_breaks_neither_python_nor_anomalib(tmp_path, module):
    for folder in ("anomalib_patches", "training"):
        package = tmp_path / "cflow_plugin" / folder
        package.mkdir(parents=True)
        (package / "__init__.py").touch()
    (tmp_path / "cflow_plugin/__init__.py").touch()
    if module != STARTUP:
        (tmp_path / f"cflow_plugin/{STARTUP}.py").write_text((ROOT / f"cflow_plugin/{STARTUP}.py").read_text())
    (tmp_path / f"cflow_plugin/{module}.py").write_text("raise RuntimeError('broken')")
    line = (ROOT / "cflow_plugin.pth").read_text()
    code = f"import sys\nsys.path.insert(0, {str(tmp_path)!r})\n{line}\n"
    code += "from anomalib.models import Padim; print(Padim.__name__)"
    status, out, errors = python(code, CFLOW_PLUGIN_AUTOLOAD="1", PYTHONPATH=str(tmp_path))
    assert status == 0, errors
    assert out.splitlines()[-1] == "Padim"
    if module != STARTUP:
        assert "cflow_plugin could not be loaded (RuntimeError: broken)" in errors


def test_the_file_is_one_line_that_cannot_raise():
    text = (ROOT / "cflow_plugin.pth").read_text().strip()
    assert len(text.splitlines()) == 1
    assert text.startswith("import ")
    assert Path(ROOT / "cflow_plugin.pth").stat().st_size < 200


def test_the_security_notes_quote_the_line_that_is_installed():
    assert f"```python\n{(ROOT / 'cflow_plugin.pth').read_text().strip()}\n```" in (ROOT / "SECURITY.md").read_text()
