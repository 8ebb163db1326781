"""The area below a curve of overlap against false-positive rate, and how far score bins may have moved it."""

__all__ = ["Area", "area_below_curve"]

from typing import NamedTuple

import numpy as np

# Anomalous pixels looked up at a time, to bound what the intermediate arrays take.
_AT_A_TIME = 2**21


class Area(NamedTuple):
    """An area between 0 and 1.

    Attributes:
        value: The area below the curve, which is straight between two thresholds.
        error: The exact area of the scores that were put into bins differs from the value by at most this.
    """

    value: float
    error: float


def area_below_curve(
    negatives: np.ndarray,
    positives: np.ndarray,
    fpr_limit: float,
    negative_counts: np.ndarray | None = None,
    positive_weights: np.ndarray | None = None,
) -> Area:
    r"""Integrate the weighted share of anomalous pixels found over the false-positive rate up to a limit.

    Let :math:`w` be the weight of an anomalous pixel, whose score is exceeded by a share :math:`a` of the normal
    pixels, and reached by a share :math:`b`. It is found nowhere below the false-positive rate :math:`a`, everywhere
    above :math:`b`, and in between along a straight line. Up to the limit :math:`f` it contributes
    :math:`w (f - (a + b) / 2)` where :math:`b \le f`, and :math:`w (f - a)^2 / (2 (b - a))` where :math:`a < f < b`.
    So nothing but the normal scores has to be sorted, and no curve is built.

    Where equal scores stand for a bin, the pixels in it may have been in any order: the true area lies between the sums
    of :math:`w \max(f - b, 0)` and of :math:`w \max(f - a, 0)`. With :math:`f = 1` each is away from the value by half
    the sum over bins of the share of normal times the share of anomalous pixels.

    Args:
        negatives: ``(N,)`` scores of normal pixels, ascending.
        positives: ``(P,)`` scores of anomalous pixels; looking them up is fastest when they ascend.
        fpr_limit: Upper end of the integral, in (0, 1].
        negative_counts: ``(N,)`` how many normal pixels have each score; one each if ``None``.
        positive_weights: ``(P,)`` weights of the anomalous pixels; equal if ``None``.

    Returns:
        The area divided by the limit, NaN without normal or without anomalous pixels. The error is that of bins; scores
        proper have none.
    """
    if len(negatives) == 0 or len(positives) == 0:
        return Area(float("nan"), 0.0)
    below = None if negative_counts is None else np.concatenate([[0.0], np.cumsum(negative_counts, dtype=np.float64)])
    total = len(negatives) if below is None else below[-1]
    value = lowest = highest = weight = 0.0
    for start in range(0, len(positives), _AT_A_TIME):
        scores = positives[start : start + _AT_A_TIME]
        left, right = (np.searchsorted(negatives, scores, side) for side in ("left", "right"))
        if below is not None:
            left, right = below[left], below[right]
        first, last = 1 - right / total, 1 - left / total
        weights = np.ones(len(scores)) if positive_weights is None else positive_weights[start : start + _AT_A_TIME]
        beyond_first, beyond_last = (np.maximum(fpr_limit - edge, 0) for edge in (first, last))
        # Both cases in one: the mean height over the stretch times its length, which is 0 where the stretch is empty.
        width = np.maximum(last - first, np.finfo(np.float64).tiny)
        stretch = beyond_first - beyond_last
        value += weights @ (beyond_last + stretch * np.minimum(stretch / width, 1) / 2)
        lowest += weights @ beyond_last
        highest += weights @ beyond_first
        weight += weights.sum()
    scale = weight * fpr_limit
    return Area(float(value / scale), float(max(highest - value, value - lowest) / scale))
