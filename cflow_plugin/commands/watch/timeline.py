"""Scores as a series over time: smoothing, and what is to be said of it when the truth is known."""

__all__ = ["Smoother", "Truth", "frame_auroc", "intervals", "read_truth"]

import csv
import math
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from cflow_plugin.errors import CflowError


class Smoother:
    r"""Exponential smoothing of scores as they come, which never looks ahead.

    .. math:: s_t = s_{t-1} + (1 - e^{-\Delta t / \tau}) (x_t - s_{t-1})

    Frames need not be evenly spaced: a frame counts for the time since the one before it.

    Args:
        seconds: The time constant :math:`\tau`; 0 leaves scores as they are.

    Raises:
        CflowError: If it is negative.
    """

    def __init__(self, seconds: float) -> None:
        if not (seconds >= 0 and math.isfinite(seconds)):
            message = f"Smoothing is a time of 0 seconds or more; {seconds} was asked for."
            raise CflowError(message)
        self.seconds = seconds
        self._value: float | None = None
        self._time = 0.0

    def __call__(self, time: float, score: float) -> float:
        """Take the next score in, and return the smoothed one.

        Args:
            time: When it was seen, in seconds; not before the last one.
            score: The score.
        """
        if self._value is None or self.seconds == 0:
            self._value = score
        else:
            self._value += -math.expm1(-max(0.0, time - self._time) / self.seconds) * (score - self._value)
        self._time = time
        return self._value


class Truth(NamedTuple):
    """Which frames are anomalous.

    Attributes:
        intervals: First and last frame of each anomaly, counted from 0.
        total: Number of frames that this is known of; ``None`` where frames outside the intervals are normal for good.
    """

    intervals: list[tuple[int, int]]
    total: int | None

    def of(self, frames: ArrayLike) -> NDArray[np.bool_]:
        """Say of each of these frame numbers whether it lies in an interval."""
        numbers = np.asarray(frames)
        found = np.zeros(numbers.shape, bool)
        for first, last in self.intervals:
            found |= (numbers >= first) & (numbers <= last)
        return found


def read_truth(path: Path) -> Truth:
    """Read which frames are anomalous.

    Args:
        path: A ``.npy`` file with one number a frame (ShanghaiTech's ``test_frame_mask``), anything but 0 being
            anomalous; or a CSV file with the first and last frame of an anomaly in each line, with or without a header.

    Raises:
        CflowError: If the file cannot be read as either.
    """
    if not path.is_file():
        message = f"There is no ground truth at {path}; --truth takes a .npy frame mask or a CSV of start,end frames."
        raise CflowError(message)
    if path.suffix.lower() != ".npy":
        return Truth(_read_intervals(path), None)
    try:
        mask = np.load(path, mmap_mode="r", allow_pickle=False)
    except Exception as error:  # NumPy parses the header as Python, which fails in many ways
        message = f"{path} could not be read as a NumPy array ({error})."
        raise CflowError(message) from error
    if mask.ndim != 1 or mask.dtype.kind not in "buif":
        message = (
            f"{path} holds {mask.dtype} values of shape {mask.shape}; one number a frame is needed, as in "
            "ShanghaiTech's test_frame_mask."
        )
        raise CflowError(message)
    return Truth(intervals(np.asarray(mask) != 0), len(mask))


def _read_intervals(path: Path) -> list[tuple[int, int]]:
    found = []
    try:
        lines = list(csv.reader(path.read_text(encoding="utf-8").splitlines()))
    except (OSError, ValueError, csv.Error) as error:
        message = f"{path} could not be read as CSV ({error})."
        raise CflowError(message) from error
    for number, line in enumerate(lines, start=1):
        if not any(field.strip() for field in line):
            continue
        try:
            start, end = (int(field) for field in line)
        except ValueError:
            if number == 1 and not any(character.isdigit() for character in "".join(line)):
                continue  # a header
            start, end = 0, -1
        if not 0 <= start <= end:
            message = f"Line {number} of {path}, {','.join(line)!r}, is not the first and last frame of an anomaly."
            raise CflowError(message)
        found.append((start, end))
    return found


def intervals(truth: NDArray[np.bool_]) -> list[tuple[int, int]]:
    """Runs of anomalous frames, each as its first and last frame.

    Example:
        >>> intervals(np.array([False, True, True, False, True]))
        [(1, 2), (4, 4)]
    """
    edges = np.flatnonzero(np.diff(np.concatenate([[False], truth, [False]]).astype(np.int8)))
    return [(int(start), int(end) - 1) for start, end in edges.reshape(-1, 2)]


def frame_auroc(scores: ArrayLike, truth: NDArray[np.bool_]) -> float | None:
    """Area under the ROC curve: how often an anomalous frame scores above a normal one, ties counting half.

    Args:
        scores: One a frame.
        truth: Whether it is anomalous.

    Returns:
        Between 0 and 1; ``None`` where all frames are alike.
    """
    from scipy.stats import mannwhitneyu  # takes its time, and only a known truth needs it

    if truth.all() or not truth.any():
        return None
    values = np.asarray(scores)
    pairs = float(truth.sum()) * float((~truth).sum())
    return float(mannwhitneyu(values[truth], values[~truth], method="asymptotic").statistic) / pairs
