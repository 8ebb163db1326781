"""Scores in bins of neighbouring floating-point numbers, as fine as their number allows."""

__all__ = ["join_bins", "sum_by_key", "to_keys", "to_scores"]

import numpy as np


def to_keys(scores: np.ndarray) -> np.ndarray:
    """Map scores to integers in the same order: neighbouring float32 numbers to neighbouring integers.

    A bin is then a run of integers that share their leading bits. Its width is relative to the score, so that bins are
    fine wherever scores concentrate towards zero, and no range has to be known in advance.

    Args:
        scores: ``(N,)`` float32 without NaN. Infinities are allowed.

    Returns:
        ``(N,)`` int32.
    """
    bits = (scores + np.float32(0)).view(np.int32)  # the sum makes -0 a 0
    # Negative numbers are stored as sign and magnitude: of two, the one with more magnitude is the smaller.
    return np.where(bits < 0, bits ^ np.int32(0x7FFFFFFF), bits)


def to_scores(keys: np.ndarray) -> np.ndarray:
    """The scores that integers stand for: the inverse of :func:`to_keys`.

    Args:
        keys: ``(N,)`` int32.

    Returns:
        ``(N,)`` float32.
    """
    return np.where(keys < 0, keys ^ np.int32(0x7FFFFFFF), keys).view(np.float32)


def join_bins(keys: np.ndarray, dropped_bits: int) -> np.ndarray:
    """Join bins: clear the lowest bits of the keys, which keeps their order.

    Args:
        keys: ``(N,)`` int32.
        dropped_bits: How many bits, 0 to 31.

    Returns:
        ``(N,)`` int32.
    """
    return keys & np.int32(-(1 << dropped_bits))


def sum_by_key(keys: np.ndarray, masses: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray]:
    """Sum the masses of equal keys.

    Args:
        keys: ``(N,)`` in any order.
        masses: ``(N,)`` float64, one each if ``None``.

    Returns:
        The distinct keys in ascending order, and a float64 mass for each. Counts are exact up to 2⁵³.
    """
    if masses is None:
        keys = np.sort(keys)
    else:
        order = np.argsort(keys, kind="stable")  # stable sorting is linear where sorted runs follow each other
        keys, masses = keys[order], masses[order]
    starts = np.flatnonzero(np.concatenate([[True], keys[1:] != keys[:-1]])) if len(keys) else np.empty(0, np.intp)
    if masses is None:
        return keys[starts], np.diff(starts, append=len(keys)).astype(np.float64)
    return keys[starts], np.add.reduceat(masses, starts) if len(keys) else masses
