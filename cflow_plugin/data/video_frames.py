"""Frames of training videos, extracted to image files once."""

from __future__ import annotations

__all__ = ["extract_frames", "extracted_frames"]

import json
import logging
import shutil
from typing import TYPE_CHECKING

import cv2
from filelock import FileLock, Timeout
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from cflow_plugin.errors import CflowError

if TYPE_CHECKING:
    from collections.abc import Sequence
    from contextlib import AbstractContextManager
    from pathlib import Path

logger = logging.getLogger(__name__)

_MARKER = "complete.json"
_QUALITY = 95  # of JPEG; what the videos' own compression has left survives it


def extract_frames(videos: Sequence[Path], folder: Path, step: int = 1) -> None:
    """Extract every ``step``-th frame of videos, unless that has been done.

    Frames go to ``<folder>/<video>/<number>.jpg``. A video's folder is filled under a partial name and renamed once it
    is complete, so a run that was killed goes on with the video it was at. Of two processes at work on one folder the
    second waits for the first.

    Args:
        videos: The files.
        folder: Where their frames go.
        step: Distance between the frames taken; the first frame is always among them.

    Raises:
        CflowError: If a video cannot be read, or the folder cannot be written to.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with _lock(folder):
            pending = [video for video in videos if not _is_complete(folder / video.stem, video)]
            if pending:
                _extract(pending, folder, step)
    except OSError as error:
        message = (
            f"Frames could not be written to {folder} ({error.strerror or error}). Free some space there, or name "
            "another folder with --data.frame_cache."
        )
        raise CflowError(message) from error


def extracted_frames(folder: Path, video: str) -> list[Path]:
    """The extracted frames of a video in their order; none if it has not been extracted in full.

    Args:
        folder: As given to :func:`extract_frames`.
        video: Name of the video without its suffix.
    """
    return sorted((folder / video).glob("*.jpg")) if _is_complete(folder / video) else []


def _lock(folder: Path) -> AbstractContextManager[object]:
    lock = FileLock(folder / ".lock")
    try:
        return lock.acquire(timeout=0)
    except Timeout:
        logger.info("Another process is extracting frames to %s; waiting for it.", folder)
        return lock.acquire()


def _is_complete(folder: Path, video: Path | None = None) -> bool:
    """Whether a folder holds all its frames, and of this video where one is given."""
    try:
        marker = json.loads((folder / _MARKER).read_text(encoding="utf-8"))
        frames, size = marker["frames"], marker["bytes"]
    except (OSError, ValueError, TypeError, KeyError):
        return False
    return (video is None or size == video.stat().st_size) and frames == sum(1 for _ in folder.glob("*.jpg"))


def _extract(videos: Sequence[Path], folder: Path, step: int) -> None:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    captures = [(video, int(_open(video).get(cv2.CAP_PROP_FRAME_COUNT))) for video in videos]
    logger.info("Extracting one frame in %d of %d videos to %s.", step, len(videos), folder)
    with Progress(*columns, transient=True) as progress:
        task = progress.add_task("Extracting frames", total=sum(count for _, count in captures))
        for video, count in captures:
            progress.update(task, description=f"Extracting {video.name}")
            partial = folder / f".{video.stem}.partial"
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir()
            read = written = 0
            capture = _open(video)
            while capture.grab():
                if read % step == 0:
                    there, image = capture.retrieve()
                    if not there:
                        break
                    (partial / f"{read:06d}.jpg").write_bytes(_encode(image))
                    written += 1
                read += 1
                progress.advance(task)
            capture.release()
            if not read:
                message = f"{video} holds no frame that can be read; fetch it again, or take it out of its folder."
                raise CflowError(message)
            if read < count:
                logger.warning("%s ends after %d frames, though its header speaks of %d.", video, read, count)
            marker = {"video": video.name, "bytes": video.stat().st_size, "step": step, "frames": written}
            (partial / _MARKER).write_text(json.dumps(marker) + "\n", encoding="utf-8")
            shutil.rmtree(folder / video.stem, ignore_errors=True)
            partial.replace(folder / video.stem)


def _open(video: Path) -> cv2.VideoCapture:
    capture = cv2.VideoCapture(str(video))
    if not capture.isOpened():
        message = f"{video} could not be opened as a video; fetch it again, or take it out of its folder."
        raise CflowError(message)
    return capture


def _encode(image: cv2.typing.MatLike) -> bytes:
    return cv2.imencode(".jpg", image, [cv2.IMWRITE_JPEG_QUALITY, _QUALITY])[1].tobytes()
