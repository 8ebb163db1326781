"""Which files of a folder are images, and in which order they come."""

__all__ = ["IMAGES", "is_hidden", "list_folder", "natural_order", "visible"]

import logging
import os
import re
from collections.abc import Iterable
from pathlib import Path, PurePath

logger = logging.getLogger(__name__)

IMAGES = frozenset({".png", ".jpg", ".jpeg", ".bmp", ".ppm", ".pgm", ".tif", ".tiff", ".webp"})
"""Suffixes of images in a folder: those that anomalib takes."""

# Folders that macOS, network drives and Windows keep beside a user's own, without a dot in front.
_OF_SYSTEMS = frozenset({"__macosx", "@eadir", "#recycle", "#snapshot", "$recycle.bin", "system volume information"})
_said: set[str] = set()


def natural_order(path: PurePath) -> list[list[tuple[int, str]]]:
    """Sorting key by which ``9.jpg`` comes before ``10.jpg``.

    Example:
        >>> sorted([Path("10.jpg"), Path("9.jpg")], key=natural_order)[0].name
        '9.jpg'
    """
    parts = [re.findall(r"\d+|\D+", part) for part in path.parts]
    return [[(int(piece), piece) if piece.isdecimal() else (-1, piece) for piece in pieces] for pieces in parts]


def is_hidden(path: PurePath) -> bool:
    """Whether a file was put there by an operating system or an editor, and not by the user.

    Args:
        path: Its path below the folder that the user named, which may be hidden itself.

    Example:
        >>> [is_hidden(Path(name)) for name in (".ipynb_checkpoints/0.png", "._0.png", "@eaDir/0.png", "a/0.png")]
        [True, True, True, False]
    """
    return any(part.startswith(".") or part.lower() in _OF_SYSTEMS for part in path.parts if part not in {".", ".."})


def visible(files: Iterable[Path], folder: Path) -> list[Path]:
    """Leave hidden files out, and say so once for each folder.

    Args:
        files: Files below the folder.
        folder: The folder.

    Returns:
        All that are not hidden, in the order in which they came.
    """
    found: list[Path] = []
    hidden: list[Path] = []
    for file in files:
        (hidden if is_hidden(file.relative_to(folder)) else found).append(file)
    if os.path.realpath(folder) not in _said:
        _said.add(os.path.realpath(folder))
        if hidden:
            what = "1 hidden image is" if len(hidden) == 1 else f"{len(hidden)} hidden images are"
            logger.warning("%s passed over in %s, for example %s.", what, folder, min(hidden).relative_to(folder))
        inside = (Path(where, name) for where, names, _ in os.walk(folder) for name in names)
        if link := next((one for one in inside if one.is_symlink() and not is_hidden(one.relative_to(folder))), None):
            logger.warning(
                "%s is a link to a folder, and links to folders are passed over; name that folder itself.", link
            )
    return found


def list_folder(folder: Path) -> list[Path]:
    """All images below a folder, without hidden ones, in natural order.

    Args:
        folder: The folder.

    Returns:
        Their paths, which begin with the folder's.
    """
    files = (Path(where, name) for where, _, names in os.walk(folder) for name in names)
    images = [file for file in files if file.suffix.lower() in IMAGES]
    return sorted(visible(images, folder), key=lambda file: natural_order(file.relative_to(folder)))
