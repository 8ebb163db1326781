"""Image files: what is read, how, and what is refused; the same in training, in anomalib's inferencers and in use."""

__all__ = ["ImageFileError", "check_images", "read_image", "unreadable"]

import os
import warnings
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import cv2
import numpy as np
from PIL import Image, UnidentifiedImageError

from cflow_plugin.errors import CflowError

_SHOWN = 3
_READERS = 8


class ImageFileError(CflowError):
    """A file that cannot be used as an image.

    Attributes:
        reason: Why, without the file's name.
    """

    def __init__(self, path: str | os.PathLike, reason: str) -> None:
        super().__init__(f"{path} cannot be used as an image: {reason}.")
        self.reason = reason


def read_image(path: str | os.PathLike) -> np.ndarray:
    """Read an image as anomalib does when it trains: by Pillow, converted to RGB.

    So grey values are repeated, transparency is dropped, a palette and CMYK are converted, a rotation noted in EXIF
    data is not applied, and of several pages the first one counts.

    Args:
        path: The file; its content decides on the format, not its suffix.

    Returns:
        Shape ``(H, W, 3)``, bytes, blue first as OpenCV has it.

    Raises:
        ImageFileError: If the file is absent, is no image, is damaged, or has more than 8 bits a value and no colour,
            which Pillow would clip to white.
    """
    with _reasons(path), Image.open(path) as image:
        _check_mode(image)
        return cv2.cvtColor(np.asarray(image.convert("RGB")), cv2.COLOR_RGB2BGR)


@contextmanager
def _reasons(path: str | os.PathLike) -> Iterator[None]:
    """Turn whatever Pillow raises into an :class:`ImageFileError`."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            yield
    except ImageFileError:
        raise
    except _UnsuitableError as error:
        raise ImageFileError(path, str(error)) from None
    except UnidentifiedImageError as error:
        what = "the file is empty" if Path(path).stat().st_size == 0 else "it is of no known image format, or damaged"
        raise ImageFileError(path, what) from error
    except Image.DecompressionBombError as error:
        limit = 2 * (Image.MAX_IMAGE_PIXELS or 0) // 10**6
        raise ImageFileError(path, f"it has more than {limit} million pixels; cut it into parts") from error
    except MemoryError as error:
        raise ImageFileError(path, "there is not enough memory for it") from error
    except Exception as error:  # Pillow's decoders raise many types on damaged data
        reason = getattr(error, "strerror", None) or str(error).strip().rstrip(".") or type(error).__name__
        raise ImageFileError(path, reason.splitlines()[0]) from error


class _UnsuitableError(Exception):
    """An image that can be read and must not be used."""


def _check_mode(image: Image.Image) -> None:
    if image.mode.startswith(("I", "F")):
        message = (
            "its grey values have more than 8 bits, which would be clipped to white; save it with 8 bits, all images "
            "with the same scale"
        )
        raise _UnsuitableError(message)


def check_images(images: Iterable[str | os.PathLike], masks: Iterable[str | os.PathLike] = ()) -> None:
    """Look into the headers of images, and complain of all that cannot be used before anything else is done.

    Args:
        images: Image files.
        masks: Mask files; they may have any number of bits.

    Raises:
        CflowError: If any cannot be used.
    """
    if message := _describe(_wrong(images, masks, pixels=False)):
        raise CflowError(message)


def unreadable(images: Iterable[str | os.PathLike], masks: Iterable[str | os.PathLike] = ()) -> str | None:
    """Read images to their last pixel, and say which cannot be used.

    Args:
        images: Image files.
        masks: Mask files.

    Returns:
        Sentences that name them, or ``None``.
    """
    return _describe(_wrong(images, masks, pixels=True))


def _wrong(
    images: Iterable[str | os.PathLike], masks: Iterable[str | os.PathLike], pixels: bool
) -> list[ImageFileError]:
    def look(path: str | os.PathLike, is_mask: bool) -> ImageFileError | None:
        try:
            with _reasons(path), Image.open(path) as image:
                if not is_mask:
                    _check_mode(image)
                if pixels:
                    image.load()
        except ImageFileError as error:
            return error
        return None

    images, masks = list(images), list(masks)
    with ThreadPoolExecutor(_READERS) as readers:
        found = readers.map(look, [*images, *masks], [False] * len(images) + [True] * len(masks))
        return [error for error in found if error is not None]


def _describe(errors: list[ImageFileError]) -> str | None:
    if not errors:
        return None
    rest = len(errors) - _SHOWN
    more = f" And {rest} more." if rest > 0 else ""
    return " ".join(map(str, errors[:_SHOWN])) + more + " Repair or remove what is named, and start again."
