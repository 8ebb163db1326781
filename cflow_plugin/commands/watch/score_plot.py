"""A picture of scores over time."""

__all__ = ["plot_scores"]

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cflow_plugin.commands.watch.timeline import intervals
from cflow_plugin.files import atomic_file


def plot_scores(
    path: Path,
    times: Sequence[float],
    scores: Sequence[float],
    smoothed: Sequence[float] | None = None,
    threshold: float = 0.5,
    truth: NDArray[np.bool_] | None = None,
    title: str = "",
) -> None:
    """Draw scores over time, with the threshold and the intervals that are truly anomalous.

    Args:
        path: File to write, replaced in one step.
        times: When each frame was seen, in seconds.
        scores: Its score.
        smoothed: Its smoothed score, if there is any.
        threshold: Scores above it are anomalies.
        truth: Whether each frame is truly anomalous, if that is known.
        title: What stands above it.
    """
    # Imported here: only the end of a run needs it.
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 4), layout="constrained")
    axes = figure.add_subplot()
    if truth is not None:
        # An interval reaches to the next frame's time; after the last frame, as far as it lies from the one before.
        step = times[-1] - times[-2] if len(times) > 1 else 1.0
        ends = np.append(times[1:], times[-1] + step)
        for number, (first, last) in enumerate(intervals(truth)):
            label = None if number else "truly anomalous"
            axes.axvspan(times[first], ends[last], color="C3", alpha=0.15, linewidth=0, label=label)
    raw = "score" if smoothed is None else "score of the frame"
    faint: dict[str, Any] = {} if smoothed is None else {"alpha": 0.35, "linewidth": 0.8}
    axes.plot(times, scores, color="C0", label=raw, **faint)
    if smoothed is not None:
        axes.plot(times, smoothed, color="C0", label="smoothed score")
    axes.axhline(threshold, color="black", linestyle="--", linewidth=0.8, label="threshold")
    axes.set(xlabel="time, s", ylabel="anomaly score", title=title)
    axes.margins(x=0)
    axes.grid(visible=True, alpha=0.3)
    axes.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0), fontsize=8)
    with atomic_file(path) as partial:
        figure.savefig(partial, format="png", dpi=120)
