"""Names that are imported inside functions exist as well: no other test may come by. And what will go is an error."""

import ast
import re
import warnings
from importlib import import_module

import pytest

from .conftest import ROOT

FILES = sorted(path for folder in ("benchmarks", "cflow_plugin", "tests") for path in (ROOT / folder).rglob("*.py"))


def imported_by(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and not node.level and (node.module or "").startswith("cflow_plugin"):
            yield from ((node.module, alias.name) for alias in node.names)


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_all_that_is_imported_is_there(path):
    missing = []
    for module, name in imported_by(path):
        if not hasattr(import_module(module), name):
            try:
                import_module(f"{module}.{name}")
            except ModuleNotFoundError:
                missing.append(f"{module}.{name}")
    assert not missing


def test_the_reference_has_every_module_but_those_inside_of_commands():
    modules = {".".join(path.relative_to(ROOT).with_suffix("").parts) for path in (ROOT / "cflow_plugin").rglob("*.py")}
    public = {name for name in modules if not name.endswith("__init__") and ".commands." not in name}
    named = re.findall(r"automodule:: (\S+)", "".join(page.read_text() for page in (ROOT / "docs/api").glob("*.md")))
    assert public <= set(named)


def test_the_test_finds_what_is_missing(tmp_path):
    (tmp_path / "one.py").write_text("def f():\n    from cflow_plugin.errors import CflowError, Absent\n")
    assert list(imported_by(tmp_path / "one.py")) == [
        ("cflow_plugin.errors", "CflowError"),
        ("cflow_plugin.errors", "Absent"),
    ]


@pytest.mark.parametrize("category", [DeprecationWarning, PendingDeprecationWarning, FutureWarning])
def test_what_will_go_is_an_error_where_it_is_called(category):
    with pytest.raises(category, match="will go"):
        warnings.warn("will go", category, stacklevel=1)
    with pytest.raises(category, match="will go"):
        warnings.warn_explicit("will go", category, "one.py", 1, module="cflow_plugin.model.encoder")
    with warnings.catch_warnings(record=True) as seen:
        warnings.warn_explicit("will go", category, "one.py", 1, module="some_library.one")
    assert len(seen) == 1
