"""Where images come from when there is no data set: a folder, a video or a camera."""

__all__ = ["CameraLostError", "Frame", "Source", "is_film", "open_capture", "open_source", "without_password"]

import logging
import re
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import cv2
import numpy as np

from cflow_plugin.errors import CflowError
from cflow_plugin.images.listing import IMAGES, list_folder
from cflow_plugin.images.reading import ImageFileError, read_image

logger = logging.getLogger(__name__)


_SILENCE = 10_000  # milliseconds


class CameraLostError(CflowError):
    """A camera gives no more images."""


class Frame(NamedTuple):
    """One image of a source.

    Attributes:
        name: Path below the folder, or the number of the frame in six digits.
        time: Seconds since the first image.
        image: Shape ``(H, W, 3)``, blue first, bytes or 16-bit values; or what is wrong with the file.
    """

    name: str
    time: float
    image: np.ndarray | ImageFileError


class Source(NamedTuple):
    """Images in their order.

    Attributes:
        frames: The images, each read when it is asked for; a camera's have no end but :class:`CameraLostError`.
        total: Their number, ``None`` where it is not known.
        is_film: Whether they are the frames of one video or camera, all of one size.
        rate: Frames a second where these are known to be evenly spaced.
    """

    frames: Iterator[Frame]
    total: int | None
    is_film: bool
    rate: float | None


def open_source(source: str, frame_rate: float, bits: int = 8) -> Source:
    """Open a folder, an image, a video file or a camera.

    Args:
        source: Its path, the number or device node of a camera, or the address of a stream, as of
            ``rtsp://`` or ``http://``.
        frame_rate: Images a second in a folder.
        bits: Bits of a value in the images, as the model takes them.

    Raises:
        CflowError: If there is nothing at that path, it cannot be opened, or has other images.
    """
    path = Path(source)
    if is_film(source):
        if bits > 8:
            message = (
                f"The model was trained on images of {bits} bits a value; a camera or video gives 8. Name a folder."
            )
            raise CflowError(message)
        return _open_film(source)
    if not path.exists():
        message = (
            f"There is nothing at {source}: name a folder, an image, a video file, the number of a camera, or the "
            "address of a stream."
        )
        raise CflowError(message)
    files, root = ([path], path.parent) if path.is_file() else (list_folder(path), path)
    frames = (
        Frame(file.relative_to(root).as_posix(), index / frame_rate, _try_to_read(file, bits))
        for index, file in enumerate(files)
    )
    return Source(frames, len(files), is_film=False, rate=frame_rate)


def is_film(source: str) -> bool:
    """Whether a source is a camera, a stream or a video file."""
    path = Path(source)
    return _is_camera(source) or "://" in source or (path.is_file() and path.suffix.lower() not in IMAGES)


def _is_camera(source: str) -> bool:
    return source.isdigit() or ("://" not in source and Path(source).is_char_device())


def open_capture(source: str) -> cv2.VideoCapture:
    """Open a camera, stream or video file; whether it succeeded is to be asked of what is returned."""
    if "://" not in source:
        return cv2.VideoCapture(int(source) if source.isdigit() else source)
    # A server that says nothing must not stop a watch for ever.
    limits = [cv2.CAP_PROP_OPEN_TIMEOUT_MSEC, _SILENCE, cv2.CAP_PROP_READ_TIMEOUT_MSEC, _SILENCE]
    return cv2.VideoCapture(source, cv2.CAP_FFMPEG, limits)


def without_password(source: str) -> str:
    """An address to show: without the password in it.

    Example:
        >>> without_password("rtsp://me:secret@camera/1")
        'rtsp://…@camera/1'
    """
    return re.sub(r"//[^/@]*@", "//…@", source)


def _open_film(source: str) -> Source:
    is_camera, is_stream = _is_camera(source), "://" in source
    capture = open_capture(source)
    name = without_password(source)
    if not capture.isOpened():
        what = f"camera {source}" if is_camera else f"{name} as a {'stream' if is_stream else 'video'}"
        where = ": check the address, and that this machine reaches it" if is_stream else ""
        message = f"{what} could not be opened{where}."
        raise CflowError(message)
    count = int(capture.get(cv2.CAP_PROP_FRAME_COUNT))
    # What has no length is live, whatever its address is.
    is_live = is_camera or (is_stream and count <= 0)
    rate = capture.get(cv2.CAP_PROP_FPS)
    rate = None if is_live or not rate > 0 else rate
    total = count if count > 0 and not is_live else None
    return Source(_film_frames(capture, name, total, rate, is_live), total, is_film=True, rate=rate)


def _film_frames(
    capture: cv2.VideoCapture, source: str, total: int | None, rate: float | None, is_live: bool
) -> Iterator[Frame]:
    index, start = 0, None
    try:
        while True:
            there, image = capture.read()
            if not there:
                break
            now = time.monotonic()
            start = now if start is None else start
            yield Frame(f"{index:06d}", index / rate if rate else now - start, image)
            index += 1
    finally:
        capture.release()
    if is_live:
        what = f"Camera {source}" if source.isdigit() else source
        message = f"{what} gave no more images after {index}, which are scored. Check its cable; start again."
        raise CameraLostError(message)
    if total is not None and index < total:
        logger.warning("%s ends after %d frames, though its header speaks of %d.", source, index, total)


def _try_to_read(path: Path, bits: int) -> np.ndarray | ImageFileError:
    try:
        return read_image(path, bits)
    except ImageFileError as error:
        return error
