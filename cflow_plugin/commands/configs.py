"""The configs that come with the package: what there is, and where."""

__all__ = ["configs", "find_config"]

import difflib
import re
import shutil
from itertools import takewhile
from pathlib import Path

from cflow_plugin.errors import CflowError

_PACKAGE = Path(__file__).parent.parent
_SIMILAR = 5  # names that an error lists


def configs(name: str | None = None, copy_to: Path | None = None) -> None:
    """List the configs that come with the package, find one, or copy them to where they can be edited.

    For example: anomalib train --config $(cflow-plugin configs --name mvtec_ad/screw). Those for `cflow-plugin compare`
    and `benchmark` are found by their names: cflow-plugin compare --config compare/textures.yaml.

    Args:
        name: Print this config's path alone, for example mvtec_ad/screw or mvtec_ad/screw.yaml.
        copy_to: Copy the config, or without a name all of them, to this folder. Nothing that is there is overwritten.

    Raises:
        CflowError: If there is no such config, or the folder holds one already or cannot be written to.
    """
    folder = _folder()
    files = sorted(folder.rglob("*.yaml")) if name is None else [find_config(name)]
    if copy_to is not None:
        _copy(files, folder, copy_to)
    elif name is not None:
        print(files[0])
    else:
        for file in files:
            print(f"{file}\n    {_first_comment(file)}")


def find_config(name: str) -> Path:
    """Find a config that comes with the package.

    Args:
        name: Its path below the configs' folder, for example ``mvtec_ad/screw``. The suffix may be left out, and the
            name of the folder itself, ``configs/``, may stand in front.

    Raises:
        CflowError: If there is none of that name; names that resemble it are listed.
    """
    folder = _folder()
    wanted = name.replace("\\", "/").removeprefix("./").removeprefix("configs/").removesuffix(".yaml")
    files = {file.relative_to(folder).with_suffix("").as_posix(): file for file in sorted(folder.rglob("*.yaml"))}
    if wanted in files:
        return files[wanted]
    similar = [other for other in files if other.rpartition("/")[2] == wanted.rpartition("/")[2]]
    similar += difflib.get_close_matches(wanted, files, _SIMILAR, cutoff=0.5)
    hint = f"similar ones are {', '.join(list(dict.fromkeys(similar))[:_SIMILAR])}" if similar else "none resembles it"
    message = f"No config {name!r} comes with the package; {hint}. `cflow-plugin configs` lists all."
    raise CflowError(message)


def _folder() -> Path:
    """Where the configs are: in the installed package, or beside it in a checkout."""
    for folder in (_PACKAGE / "configs", _PACKAGE.parent / "configs"):
        if (folder / "demo.yaml").is_file():
            return folder
    message = f"The configs are neither in {_PACKAGE} nor beside it; install the package again."
    raise CflowError(message)


def _first_comment(file: Path) -> str:
    """What a config says of itself in the first sentence of its comment."""
    lines = takewhile(lambda line: line.startswith("#"), file.read_text(encoding="utf-8").splitlines())
    text = " ".join(line.lstrip("#").strip() for line in lines)
    return re.split(r"(?<=\.) |: (?=anomalib|cflow-plugin)", text)[0].rstrip(".") + "."


def _copy(files: list[Path], folder: Path, target: Path) -> None:
    copies = {file: target / file.relative_to(folder) for file in files}
    there = [copy for copy in copies.values() if copy.exists()]
    if there:
        message = f"{there[0]} is there already and is not overwritten; name another folder with --copy_to."
        raise CflowError(message)
    try:
        for file, copy in copies.items():
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(file, copy)
    except OSError as error:
        message = f"The configs could not be copied to {target} ({error.strerror or error}); name another folder."
        raise CflowError(message) from error
    what = f"{len(files)} configs are" if len(files) > 1 else f"{files[0].name} is"
    print(f"{what} in {target.absolute()}.")
