"""Test clips in ShanghaiTech's layout: a folder of frames, a label for each, and a mask for each."""

from __future__ import annotations

__all__ = ["Clip", "compare_labels_with_masks", "find_clips", "read_mask"]

import json
import logging
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np
from rich.progress import track

from cflow_plugin.errors import CflowError
from cflow_plugin.files import atomic_file
from cflow_plugin.images.listing import natural_order

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from numpy.typing import NDArray

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Clip:
    """One test clip.

    Attributes:
        name: For example ``01_0014``.
        frames: Its images in their order.
        label_file: ``.npy``, shape ``(frames,)``, not 0 where a frame is anomalous.
        mask_file: ``.npy``, shape ``(frames, H, W)``, not 0 where a pixel is anomalous.
    """

    name: str
    frames: tuple[Path, ...]
    label_file: Path
    mask_file: Path

    @cached_property
    def labels(self) -> NDArray[np.bool_]:
        """Whether each frame is anomalous, by ``label_file``."""
        return np.asarray(_open(self.label_file)) != 0


def find_clips(root: Path, scene: int) -> list[Clip]:
    """Find a scene's test clips, and check that frames, labels and masks are of one number.

    Args:
        root: Folder of the data set.
        scene: Number of the scene.

    Raises:
        CflowError: If a file is absent or damaged, or the numbers differ.
    """
    testing = root / "testing"
    clips = []
    folders = sorted(folder for folder in (testing / "frames").glob(f"{scene:02d}_*") if folder.is_dir())
    for folder in folders:
        frames = tuple(sorted(folder.glob("*.jpg"), key=lambda path: natural_order(path.relative_to(folder))))
        files = [testing / kind / f"{folder.name}.npy" for kind in ("test_frame_mask", "test_pixel_mask")]
        for file, what, dimensions in zip(files, ("frame labels", "pixel masks"), (1, 3), strict=True):
            shape = _open(file).shape
            if len(shape) != dimensions or shape[0] != len(frames):
                message = (
                    f"{file} has the shape {shape}, which cannot be the {what} of the {len(frames)} frames in "
                    f"{folder}; unpack the data set again."
                )
                raise CflowError(message)
        if frames:
            clips.append(Clip(folder.name, frames, *files))
    return clips


def read_mask(file: Path | str, frame: int) -> NDArray[np.uint8]:
    """Read one frame's mask; nothing else of the file is read.

    Args:
        file: A clip's ``mask_file``.
        frame: Position of the frame in the clip.

    Returns:
        1 where a pixel is anomalous and 0 elsewhere, shape ``(H, W)``.
    """
    return (np.load(file, mmap_mode="r")[frame] != 0).view(np.uint8)


def compare_labels_with_masks(clips: Sequence[Clip], folder: Path) -> dict[str, list[int]]:
    """Find the frames whose label says one thing and whose mask another, and log a warning of them.

    A frame is anomalous by its mask if any pixel is. Which ones are is kept in ``<folder>/<clip>.json``, so that
    gigabytes of masks are read once only.

    Args:
        clips: Test clips.
        folder: Where to keep what was found.

    Returns:
        The positions of such frames in each clip that has any.
    """
    folder.mkdir(parents=True, exist_ok=True)
    recalled = {clip.name: _recall(folder / f"{clip.name}.json", clip.mask_file) for clip in clips}
    found = {name: frames for name, frames in recalled.items() if frames is not None}
    pending = [clip for clip in clips if clip.name not in found]
    for clip in track(pending, "Comparing labels with masks", transient=True, disable=not pending):
        frames = [frame for frame in range(len(clip.frames)) if read_mask(clip.mask_file, frame).any()]
        found[clip.name] = frames
        with atomic_file(folder / f"{clip.name}.json") as partial:
            partial.write_text(json.dumps({**_state(clip.mask_file), "anomalous": frames}) + "\n", encoding="utf-8")
    differing = {}
    for clip in clips:
        frames = set(found[clip.name]) ^ set(np.flatnonzero(clip.labels).tolist())
        if frames:
            differing[clip.name] = sorted(frames)
    if differing:
        name, frames = next(iter(differing.items()))
        logger.warning(
            "In %d of %d test frames the label (test_frame_mask) contradicts the mask (test_pixel_mask), first in "
            "frame %d of %s. Frame-level metrics go by the labels and pixel-level metrics by the masks.",
            sum(map(len, differing.values())),
            sum(len(clip.frames) for clip in clips),
            frames[0],
            name,
        )
    return differing


def _state(file: Path) -> dict[str, int]:
    status = file.stat()
    return {"bytes": status.st_size, "modified": status.st_mtime_ns}


def _recall(record: Path, mask_file: Path) -> list[int] | None:
    """The anomalous frames by a record, if there is one of the masks as they are now."""
    try:
        noted = json.loads(record.read_text(encoding="utf-8"))
        return noted["anomalous"] if noted.items() >= _state(mask_file).items() else None
    except (OSError, ValueError, AttributeError, KeyError):
        return None


def _open(file: Path) -> NDArray:
    try:
        return np.load(file, mmap_mode="r", allow_pickle=False)
    except FileNotFoundError as error:
        message = f"{file} is missing; unpack the data set again."
        raise CflowError(message) from error
    except Exception as error:  # NumPy parses the header as Python, which fails in many ways
        message = f"{file} could not be read as a NumPy array ({error}); unpack the data set again."
        raise CflowError(message) from error
