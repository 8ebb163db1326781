"""File names in any language.

- What: replaces ``anomalib.data.utils.path.contains_non_printable_characters``.
- Why: anomalib 2.7 refuses every name that is not ASCII as "non-printable", for example ``/Daten/gut/Stück 1.png``.
- Since: anomalib 1.0.
- Upstream: to be reported. No report is known.
- Can go: when anomalib accepts printable characters of any language.
"""

__all__ = ["accept_any_language"]

from pathlib import Path

from anomalib.data.utils import path as anomalib_paths


def accept_any_language() -> None:
    """Let anomalib refuse what is not printable in any language, such as line breaks, and nothing else."""
    anomalib_paths.contains_non_printable_characters = _is_not_printable


def _is_not_printable(path: str | Path) -> bool:
    return not str(path).isprintable()
