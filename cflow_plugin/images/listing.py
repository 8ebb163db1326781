"""Which files of a folder are images, and in which order they come."""

__all__ = ["IMAGES", "natural_order"]

import re
from pathlib import Path

IMAGES = frozenset({".png", ".jpg", ".jpeg", ".bmp", ".ppm", ".pgm", ".tif", ".tiff", ".webp"})
"""Suffixes of images in a folder: those that anomalib takes."""


def natural_order(path: Path) -> list[list[tuple[int, str]]]:
    """Sorting key by which ``9.jpg`` comes before ``10.jpg``.

    Example:
        >>> sorted([Path("10.jpg"), Path("9.jpg")], key=natural_order)[0].name
        '9.jpg'
    """
    parts = [re.findall(r"\d+|\D+", part) for part in path.parts]
    return [[(int(piece), piece) if piece.isdecimal() else (-1, piece) for piece in pieces] for pieces in parts]
