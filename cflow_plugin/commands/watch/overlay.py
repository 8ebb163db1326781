"""Pictures of what a model saw, and files of an earlier run."""

__all__ = ["overlay", "set_aside", "write_picture"]

from collections.abc import Sequence
from datetime import datetime
from pathlib import Path

import cv2
import numpy as np

from cflow_plugin.decisions.regions import Region, RegionSettings, draw_regions

_COLOURS = {"anomalous": (60, 60, 230), "good": (80, 180, 60), "unsure": (0, 150, 210)}  # blue, green, red
_WORDS = {"anomalous": "ANOMALY"}


def overlay(
    frame: np.ndarray,
    anomaly_map: np.ndarray,
    score: float,
    decision: str,
    regions: tuple[Sequence[Region], RegionSettings],
    more: str = "",
) -> np.ndarray:
    """The image under its anomaly map, with its regions, and decision and score above.

    Args:
        frame: Shape ``(H, W, 3)``, bytes, blue first.
        anomaly_map: Values between 0 and 1, ``(h, w)``.
        score: The score.
        decision: ``good``, ``anomalous`` or ``unsure``.
        regions: Its regions, and the settings that they were found with.
        more: What else stands there.

    Returns:
        Shape ``(H, W, 3)``, bytes, blue first.
    """
    size = frame.shape[1::-1]
    heat = cv2.resize((255 * np.clip(anomaly_map, 0, 1)).astype(np.uint8), size)
    picture = cv2.addWeighted(frame, 0.6, cv2.applyColorMap(heat, cv2.COLORMAP_JET), 0.4, 0)
    draw_regions(picture, *regions)
    height = max(14, size[1] // 16)
    text = f"{_WORDS.get(decision, decision)} {score:.3f}{more}"
    scale = cv2.getFontScaleFromHeight(cv2.FONT_HERSHEY_SIMPLEX, height // 2)
    cv2.rectangle(picture, (0, 0), (size[0], height), _COLOURS[decision], cv2.FILLED)
    place, white = (4, int(0.75 * height)), (255, 255, 255)
    cv2.putText(picture, text, place, cv2.FONT_HERSHEY_SIMPLEX, scale, white, 1, cv2.LINE_AA)
    return picture


def write_picture(path: Path, picture: np.ndarray) -> None:
    """Write a picture; unlike OpenCV's own writer it says when the disk is full."""
    path.parent.mkdir(parents=True, exist_ok=True)
    _, data = cv2.imencode(path.suffix, picture)
    path.write_bytes(data.tobytes())


def set_aside(path: Path) -> None:
    """Keep what an earlier run, perhaps of weeks on a line, has written, under the time at which it ended."""
    if path.exists():
        end = datetime.fromtimestamp(path.stat().st_mtime)
        path.rename(path.with_stem(f"{path.stem}_{end:%Y-%m-%d_%H-%M-%S-%f}"))
