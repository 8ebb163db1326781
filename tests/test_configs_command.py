import zipfile
from pathlib import Path

import pytest

from cflow_plugin import CflowError
from cflow_plugin.commands import configs as module
from cflow_plugin.commands.cli import _with_shipped_configs
from cflow_plugin.commands.configs import configs, find_config

from .conftest import ROOT, run_command

ALL = sorted((ROOT / "configs").rglob("*.yaml"))


def test_all_are_listed_with_what_they_say_of_themselves(capsys):
    configs()
    lines = capsys.readouterr().out.splitlines()
    assert list(map(Path, lines[::2])) == ALL
    assert all(Path(line).is_absolute() for line in lines[::2])
    texts = [line.strip() for line in lines[1::2]]
    assert all(text and not text.startswith("#") for text in texts)
    assert texts[ALL.index(ROOT / "configs/demo.yaml")].startswith("The first run")


@pytest.mark.parametrize("name", ["mvtec_ad/screw", "mvtec_ad/screw.yaml", "configs/mvtec_ad/screw.yaml"])
def test_one_is_found_by_its_name(name, capsys):
    configs(name)
    assert capsys.readouterr().out == f"{ROOT / 'configs/mvtec_ad/screw.yaml'}\n"


@pytest.mark.long
def test_the_command(tmp_path):
    out = run_command("cflow-plugin", "configs", "--name", "demo", cwd=tmp_path)
    assert out.splitlines()[-1] == str(ROOT / "configs/demo.yaml")
    out = run_command("cflow-plugin", "configs", "--name", "mvtec_ad/screws", cwd=tmp_path, expect=1)
    assert out.strip().splitlines()[-1].startswith("error: No config 'mvtec_ad/screws'")


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("screw", "similar ones are mvtec_ad/screw"),
        ("mvtec/screw", "similar ones are mvtec_ad/screw"),
        ("mvtec_ad/botle", "mvtec_ad/bottle"),
        ("xyz", "none resembles it"),
    ],
)
def test_an_unknown_name_gets_similar_ones(name, hint):
    with pytest.raises(CflowError, match=rf"No config '{name}'.*{hint}"):
        find_config(name)


def test_copies(tmp_path):
    configs(copy_to=tmp_path / "all")
    copied = sorted((tmp_path / "all").rglob("*.yaml"))
    assert [file.relative_to(tmp_path / "all") for file in copied] == [
        file.relative_to(ROOT / "configs") for file in ALL
    ]
    for copy, file in zip(copied, ALL, strict=True):
        assert copy.relative_to(tmp_path / "all") == file.relative_to(ROOT / "configs")
        assert copy.read_bytes() == file.read_bytes()
    configs("demo", tmp_path / "one")
    assert [file.name for file in (tmp_path / "one").rglob("*")] == ["demo.yaml"]
    copied[0].write_text("mine")
    with pytest.raises(CflowError, match="not overwritten"):
        configs(copy_to=tmp_path / "all")
    assert copied[0].read_text() == "mine"
    with pytest.raises(CflowError, match="could not be copied"):
        configs(copy_to=copied[0] / "below a file")


def test_our_commands_find_them_but_files_come_first(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shipped = str(ROOT / "configs/compare/textures.yaml")
    for given in ("compare/textures.yaml", "compare/textures", "configs/compare/textures.yaml"):
        assert _with_shipped_configs(["compare", "--config", given]) == ["compare", "--config", shipped]
        assert _with_shipped_configs(["compare", f"--config={given}"]) == ["compare", f"--config={shipped}"]
    untouched = ["compare", "--config", "mine.yaml", "--output", "compare/textures.yaml", "--seeds", "[0]"]
    assert _with_shipped_configs(untouched) == untouched
    (tmp_path / "compare").mkdir()
    (tmp_path / "compare/textures.yaml").touch()
    own = ["compare", "--config", "compare/textures.yaml"]
    assert _with_shipped_configs(own) == own


def test_an_installed_package_has_its_own(tmp_path, monkeypatch):
    package = tmp_path / "site-packages/cflow_plugin"
    monkeypatch.setattr(module, "_PACKAGE", package)
    with pytest.raises(CflowError, match="install the package again"):
        find_config("demo")
    (package / "configs").mkdir(parents=True)
    (package / "configs/demo.yaml").write_text("# Installed.\n")
    assert find_config("demo") == package / "configs/demo.yaml"


def test_they_are_in_the_wheel(wheel):
    with zipfile.ZipFile(wheel) as file:
        names = {name for name in file.namelist() if name.startswith("cflow_plugin/configs/")}
    assert names == {f"cflow_plugin/configs/{path.relative_to(ROOT / 'configs').as_posix()}" for path in ALL}
