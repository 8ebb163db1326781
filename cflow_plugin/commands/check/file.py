"""What a file says of itself, against what it does."""

__all__ = ["Finding", "check_file", "rate_of"]

import json
from typing import Any, NamedTuple

import numpy as np
import openvino as ov
from numpy.typing import NDArray

from cflow_plugin import __version__
from cflow_plugin.decisions.conformal import threshold_rank
from cflow_plugin.deploy.fingerprint import (
    FINGERPRINT,
    RELEASE,
    decision_threshold,
    fingerprint_of,
    size_of,
    stored_types,
)
from cflow_plugin.deploy.model_info import model_info
from cflow_plugin.deploy.openvino_input import takes_bytes
from cflow_plugin.deploy.runtime import bits_of, note_of
from cflow_plugin.errors import CflowError

_HALF = 0.5
_ROUNDING = 1e-5


class Finding(NamedTuple):
    """What one check has found.

    Attributes:
        what: What was looked at.
        agrees: Whether all is as it should be; ``None`` where it could not be looked at.
        detail: A sentence.
    """

    what: str
    agrees: bool | None
    detail: str


def check_file(model: ov.Model, reference_scores: NDArray[Any] | None, tolerance: float) -> list[Finding]:
    """Hold a file against its own notes.

    Args:
        model: As OpenVINO has read it.
        reference_scores: The scores of reference images that are stored in it.
        tolerance: Difference of scores and maps that is rounding's.
    """
    stored = _stored(model)
    return [
        _release(model),
        _input(model),
        _fingerprint(model, stored, tolerance),
        _threshold(model, stored, reference_scores),
        _weights(model, stored),
    ]


def rate_of(model: ov.Model) -> float | None:
    """The false-alarm rate that a file's threshold keeps, if it says so.

    Args:
        model: As OpenVINO has read it.
    """
    return (_stored(model) or {}).get("rate")


def _stored(model: ov.Model) -> dict[str, Any] | None:
    try:
        found = json.loads(note_of(model, FINGERPRINT) or "null")
    except json.JSONDecodeError:
        return None
    return found if isinstance(found, dict) else None


def _release(model: ov.Model) -> Finding:
    release = note_of(model, RELEASE)
    if release == __version__:
        return Finding("release", True, f"Written by {release}.")
    by = "a release that does not say its number" if release is None else release
    return Finding("release", False, f"Written by {by}; this is {__version__}. Export it again with this one.")


def _input(model: ov.Model) -> Finding:
    """Whether other wrappers are told to prepare images as the file wants them."""
    expected = model_info(bits_of(model), size_of(model), takes_bytes(model))
    found = {name: note_of(model, f"model_info {name}") for name in expected}
    wrong = [name for name, value in expected.items() if found[name] != value]
    if not wrong:
        return Finding("input", True, "model_info says how images are scaled.")
    name = wrong[0]
    detail = f"model_info has {name} {found[name] or 'missing'}, and the file needs {expected[name]}"
    more = f" ({len(wrong) - 1} more differ)" if len(wrong) > 1 else ""
    return Finding("input", False, f"{detail}{more}: openvino-model-api gives it other values.")


def _fingerprint(model: ov.Model, stored: dict[str, Any] | None, tolerance: float) -> Finding:
    if stored is None:
        return Finding("fingerprint", None, "The file holds none.")
    found = fingerprint_of(model)
    score, maps = (_distance(stored, found, key) for key in ("scores", "maps"))
    same = score <= tolerance and maps <= tolerance and stored.get("labels") == found["labels"]
    figures = f"score {score:.1e}, map {maps:.1e}"
    if same:
        return Finding("fingerprint", True, f"The built-in pattern gives what it gave at export ({figures}).")
    if not takes_bytes(model):
        highest = 255 if bits_of(model) == 8 else 65535
        for gain, scale in ((highest, f"values from 0 to {highest}"), (1 / highest, "values divided twice")):
            other = fingerprint_of(model, gain=gain)
            if max(_distance(stored, other, key) for key in ("scores", "maps")) <= tolerance:
                detail = f"The input scale is wrong: the file takes {scale}, and its images are given between 0 and 1."
                return Finding("fingerprint", False, detail)
    detail = f"The built-in pattern does not give what it gave at export ({figures}): the file was changed since."
    return Finding("fingerprint", False, detail)


def _distance(stored: dict[str, Any], found: dict[str, Any], key: str) -> float:
    """The largest difference between two fingerprints; infinite where they are of different forms."""
    try:
        first, second = np.asarray(stored[key], float), np.asarray(found[key], float)
        difference = float(np.abs(first - second).max()) if first.shape == second.shape else float("inf")
    except (KeyError, TypeError, ValueError):
        return float("inf")
    return difference if np.isfinite(difference) else float("inf")


def _threshold(model: ov.Model, stored: dict[str, Any] | None, scores: NDArray[Any] | None) -> Finding:
    """Whether the file decides where it says, and by the rank that its rate asks for."""
    found = decision_threshold(model)
    if found is None:
        return Finding("threshold", None, "The file decides nothing, or not by the score.")
    if stored is None:
        return Finding("threshold", None, f"The file decides at a score of {found:g}, and does not say what was meant.")
    wanted = stored.get("threshold")
    if wanted is None or not abs(found - wanted) <= _ROUNDING:
        return Finding("threshold", False, f"The file decides at a score of {found:g}, and said {wanted} at export.")
    rate = stored.get("rate")
    if rate is None or scores is None:
        return Finding("threshold", True, f"The file decides at a score of {found:g}.")
    try:
        rank = threshold_rank(len(scores), rate)
    except CflowError as error:
        return Finding("threshold", False, str(error))
    if abs(scores[rank - 1] - _HALF) > _ROUNDING:
        detail = f"A rate of {rate:g} puts the threshold at {scores[rank - 1]:.4f} among the stored scores, not at 0.5."
        return Finding("threshold", False, detail)
    detail = f"The file decides at {found:g}, score {rank} of {len(scores)} of reference images: a rate of {rate:g}."
    return Finding("threshold", True, detail)


def _weights(model: ov.Model, stored: dict[str, Any] | None) -> Finding:
    found = stored_types(model)
    if stored is None:
        return Finding("weights", None, f"Kept in {', '.join(found)}.")
    wanted = stored.get("types", [])
    if found == wanted:
        return Finding("weights", True, f"Kept in {', '.join(found)}, as at export.")
    detail = (
        f"Kept in {', '.join(found)}, and at export in {', '.join(wanted)}: compressed since, so that its thresholds "
        "are of other scores. Compress with anomalib export --compression_type."
    )
    return Finding("weights", False, detail)
