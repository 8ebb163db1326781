"""File names in any language, of which anomalib 2.7 refuses all that are not ASCII as "non-printable"."""

__all__ = ["accept_any_language"]

from pathlib import Path

from anomalib.data.utils import path as anomalib_paths


def accept_any_language() -> None:
    """Let anomalib refuse what is not printable in any language, such as line breaks, and nothing else."""
    anomalib_paths.contains_non_printable_characters = _is_not_printable


def _is_not_printable(path: str | Path) -> bool:
    return not str(path).isprintable()
