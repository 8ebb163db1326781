"""Thresholds and p-values from the scores of normal reference images (split conformal prediction)."""

__all__ = ["check_enough", "images_needed", "odd_one", "p_value_of_rank", "p_values", "threshold_rank"]

from fractions import Fraction
from math import ceil, floor
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from cflow_plugin.errors import CflowError

# Of fewer images none can be called odd, and where all are nearly the same a small difference is none.
_FEWEST = 9
_LEAST = 0.1


def images_needed(rate: float) -> int:
    """How many reference images a false-alarm rate needs at least, ``ceil(1 / rate) - 1``.

    Args:
        rate: False-alarm rate, between 0 and 1.

    Raises:
        CflowError: If the rate does not lie between 0 and 1.

    Example:
        >>> images_needed(0.05)
        19
    """
    return ceil(1 / _exact(rate)) - 1


def threshold_rank(images: int, rate: float) -> int:
    """Which of the reference scores, in ascending order and counted from 1, is the threshold.

    It is the ``ceil((n + 1) (1 - rate))``-th. If n reference images and a new normal one are exchangeable, each of the
    n + 1 ranks of the new score is equally likely, so that it lies above the threshold with a probability of at most
    ``rate``, and of more than ``rate - 1 / (n + 1)`` where no two scores are equal. That holds for any model, any
    distribution and every n, on average over the draw of the reference images; of one draw the rate itself is random
    and follows a Beta(l, n + 1 - l) distribution, ``l = floor((n + 1) rate)``: more reference images bring it closer.

    Args:
        images: Number n of reference images.
        rate: False-alarm rate, between 0 and 1.

    Raises:
        CflowError: If there are too few images for the rate, or it does not lie between 0 and 1.

    References:
        Vovk, Gammerman, Shafer: Algorithmic Learning in a Random World. Springer 2005, sections 2.2 and 4.1.
    """
    check_enough(images, rate)
    return images + 1 - floor((images + 1) * _exact(rate))


def check_enough(images: int, rate: float) -> None:
    """Refuse a rate that so many reference images cannot vouch for.

    Args:
        images: Number of reference images.
        rate: False-alarm rate.

    Raises:
        CflowError: If there are too few.
    """
    needed = images_needed(rate)
    if images < needed:
        msg = (
            f"A false-alarm rate of {rate:g} needs at least {needed} good images that are not trained on; there are "
            f"{images}. Add images, or ask for a rate of {1 / (images + 1):.3g} or more."
        )
        raise CflowError(msg)


def odd_one(scores: ArrayLike, rate: float) -> int | None:
    """The reference image that the threshold rests on, if its score lies far beyond those below it.

    One good image that is unlike the others, of another camera perhaps, or not good after all, moves the threshold so
    far that few defects are above it. The rate is kept all the same, so it can only be pointed at. Far is more than
    twice as far above the next score as that is above the median, in ``-log(1 - score)``: were that exponentially
    distributed, it would happen by chance once in 20 times among 19 images, and once in 400 among 99.

    Args:
        scores: Of the reference images, in any order, ``(n,)``.
        rate: False-alarm rate.

    Returns:
        Its index, or None.

    Raises:
        CflowError: If there are too few images for the rate, or it does not lie between 0 and 1.

    Example:
        >>> odd_one([0.1] * 10 + [0.2] * 8 + [0.9], rate=0.05)
        18
    """
    rarity = -np.log1p(-np.clip(np.asarray(scores, np.float64), 0, 1 - 1e-7))
    rank = threshold_rank(len(rarity), rate)
    if rank < _FEWEST:
        return None
    order = np.argsort(rarity, kind="stable")
    edge, below = rarity[order[rank - 1]], rarity[order[rank - 2]]
    return int(order[rank - 1]) if edge - below > max(_LEAST, 2 * (below - np.median(rarity))) else None


def p_values(scores: ArrayLike, reference: ArrayLike) -> NDArray[np.float64]:
    r"""Conformal p-values, ``(1 + #{reference scores >= score}) / (n + 1)``.

    For a normal image that is exchangeable with the reference images, :math:`P(p \le a) \le a` for every a.

    Args:
        scores: Any shape.
        reference: Scores of the reference images in ascending order, ``(n,)``.

    Returns:
        p-values between ``1 / (n + 1)`` and 1, shaped as ``scores``, in double precision: in single precision 1 / 20
        is more than 0.05.

    Example:
        >>> p_values([0.1, 0.5, 0.9], [0.2, 0.4, 0.6, 0.8])
        array([1. , 0.6, 0.2])
    """
    reference, scores = np.asarray(reference, np.float64), np.asarray(scores, np.float64)
    not_below = len(reference) - np.searchsorted(reference, scores)
    return p_value_of_rank(not_below, 0, len(reference))


def p_value_of_rank(higher: Any, equal: Any, images: int, share_of_ties: float = 1.0) -> Any:
    """The p-value of a score, by how many reference scores are higher: the one formula for all p-values.

    Args:
        higher: How many reference scores are higher; a number or an array.
        equal: How many are equal.
        images: How many there are.
        share_of_ties: What of the ties, the score itself among them, counts as higher. 1 is on the safe side. Drawn at
            random between 0 and 1, it makes the p-values of exchangeable scores exactly uniform.

    Example:
        >>> p_value_of_rank(higher=0, equal=0, images=19)
        0.05
    """
    return (higher + share_of_ties * (equal + 1)) / (images + 1)


def _exact(rate: float) -> Fraction:
    """The decimal number that was asked for: in binary, 100 * 0.07 is more than 7 and would cost an image."""
    if not 0 < rate < 1:
        msg = f"target_false_alarm_rate must lie between 0 and 1, got {rate}."
        raise CflowError(msg)
    return Fraction(str(float(rate)))
