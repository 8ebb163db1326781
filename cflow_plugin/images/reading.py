"""Image files: what is read, how, and what is refused; the same in training, in anomalib's inferencers and in use."""

__all__ = [
    "ImageFileError",
    "bits_in",
    "check_images",
    "contradiction",
    "in_8_bits",
    "load_pixels",
    "read_image",
    "size_of",
    "unreadable",
]

import os
import warnings
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path

import cv2
import numpy as np
from PIL import Image, UnidentifiedImageError

from cflow_plugin.errors import CflowError

_SHOWN = 3
_READERS = 8
_DEPTHS = (10, 12, 14, 16)  # of grey cameras whose files have 16 bits a value
_TIFF_PHOTOMETRIC = 262

# Images are accepted up to twice the size at which Pillow warns. Filters are the process's: there is none for a thread.
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)


class ImageFileError(CflowError):
    """A file that cannot be used as an image.

    Attributes:
        reason: Why, without the file's name.
    """

    def __init__(self, path: str | os.PathLike | BytesIO, reason: str) -> None:
        name = "What was sent" if isinstance(path, BytesIO) else path
        super().__init__(f"{name} cannot be used as an image: {reason}.")
        self.reason = reason


def read_image(path: str | os.PathLike | BytesIO, bits: int = 8) -> np.ndarray:
    """Read an image as anomalib does when it trains: by Pillow, converted to RGB.

    So grey values are repeated, transparency is dropped, a palette and CMYK are converted, a rotation noted in EXIF
    data is not applied, and of several pages the first one counts.

    Args:
        path: The file, or its content; that decides on the format, not a suffix.
        bits: Bits of a value, as the model was trained on: 8, or more for a grey camera's 16-bit files, of which
            cameras often use 10, 12 or 14.

    Returns:
        Shape ``(H, W, 3)``, blue first as OpenCV has it: bytes, or with more than 8 bits the file's 16-bit values.

    Raises:
        ImageFileError: If the file is absent, is no image, is damaged, or has another number of bits.
    """
    pixels = load_pixels(path)
    if reason := contradiction(pixels, bits):
        raise ImageFileError(path, reason)
    return cv2.cvtColor(pixels, cv2.COLOR_RGB2BGR)


def load_pixels(path: str | os.PathLike | BytesIO) -> np.ndarray:
    """Read an image with as many bits as it has.

    Args:
        path: The file, or its content.

    Returns:
        Shape ``(H, W, 3)``, red first: bytes, or of a grey image with more bits its 16-bit values.

    Raises:
        ImageFileError: As for :func:`read_image`.
    """
    with _reasons(path), Image.open(path) as image:
        if _is_deep(image):
            return np.repeat(np.asarray(image).astype(np.uint16)[..., None], 3, axis=2)
        return np.asarray(image if image.mode == "RGB" else image.convert("RGB"))


def size_of(path: str | os.PathLike) -> tuple[int, int]:
    """Height and width of an image, from its header.

    Args:
        path: The file.

    Raises:
        ImageFileError: As for :func:`read_image`.
    """
    with _reasons(path), Image.open(path) as image:
        return image.height, image.width


def in_8_bits(pixels: np.ndarray, bits: int | None) -> np.ndarray:
    """Pixels to look at.

    Args:
        pixels: Bytes or 16-bit values.
        bits: Bits of a value in the latter.
    """
    return pixels if pixels.dtype == np.uint8 else (pixels >> max(0, (bits or 8) - 8)).clip(0, 255).astype(np.uint8)


def contradiction(pixels: np.ndarray, bits: int) -> str | None:
    """Why values cannot be of so many bits, if they cannot.

    Args:
        pixels: What :func:`load_pixels` returned, or any part of it.
        bits: Bits of a value.
    """
    if (pixels.dtype == np.uint8) != (bits == 8):
        found = "8 bits" if pixels.dtype == np.uint8 else "more than 8 bits"
        return f"it has {found} a value, and the model was trained on images of {bits}"
    if bits < 16 and pixels.size and (highest := int(pixels.max())) >= 2**bits:
        return (
            f"its values reach {highest}, and the model was trained on images of {bits} bits, which end at "
            f"{2**bits - 1}; if the camera has more, train with --model.bits 16"
        )
    return None


def bits_in(images: Iterable[str | os.PathLike]) -> int:
    """How many bits the values of a set of images have.

    Args:
        images: Image files.

    Returns:
        8, or of 16-bit grey files the least of 10, 12, 14 and 16 that holds all their values.

    Raises:
        CflowError: If some have 8 bits and others more, or an image cannot be read.
    """

    def look(path: str | os.PathLike) -> int:
        with _reasons(path), Image.open(path) as image:
            return int(np.asarray(image).max(initial=0)) if _is_deep(image) else -1

    paths = list(images)
    with ThreadPoolExecutor(_READERS) as readers:
        highest = list(readers.map(look, paths))
    deep = [path for path, value in zip(paths, highest, strict=True) if value >= 0]
    if not deep:
        return 8
    if len(deep) < len(paths):
        shallow = next(path for path, value in zip(paths, highest, strict=True) if value < 0)
        reason = f"it has more than 8 bits a value, and others have 8, {shallow} for example; give images of one kind"
        raise ImageFileError(deep[0], reason)
    return next(bits for bits in _DEPTHS if max(highest) < 2**bits)


@contextmanager
def _reasons(path: str | os.PathLike | BytesIO) -> Iterator[None]:
    """Turn whatever Pillow raises into an :class:`ImageFileError`."""
    try:
        yield
    except ImageFileError:
        raise
    except _UnsuitableError as error:
        raise ImageFileError(path, str(error)) from None
    except UnidentifiedImageError as error:
        length = len(path.getbuffer()) if isinstance(path, BytesIO) else Path(path).stat().st_size
        what = "it is of no known image format, or damaged" if length else "the file is empty"
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


def _is_deep(image: Image.Image) -> bool:
    """Whether an image is grey and has more than 8 bits, but not more than 16."""
    if not image.mode.startswith(("I", "F")):
        return False
    # Pillow gives 16-bit PGM files 32 bits, and stretches their values to 16.
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format in {"PNG", "PPM"}):
        if image.format == "TIFF" and getattr(image, "tag_v2", {}).get(_TIFF_PHOTOMETRIC) == 0:
            message = "it stores white as 0, in 16 bits; save it with black as 0"
            raise _UnsuitableError(message)
        return True
    message = (
        "its grey values have 32 bits or a decimal point; save it with 16 bits or 8, all images with the same scale"
    )
    raise _UnsuitableError(message)


def check_images(
    images: Iterable[str | os.PathLike], masks: Iterable[str | os.PathLike] = (), bits: int | None = None
) -> None:
    """Look into the headers of images, and complain of all that cannot be used before anything else is done.

    Args:
        images: Image files.
        masks: Mask files; they may have any number of bits.
        bits: Bits of a value, where they are settled.

    Raises:
        CflowError: If any cannot be used.
    """
    if message := _describe(_wrong(images, masks, pixels=False, bits=bits)):
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
    images: Iterable[str | os.PathLike], masks: Iterable[str | os.PathLike], pixels: bool, bits: int | None = None
) -> list[ImageFileError]:
    def look(path: str | os.PathLike, is_mask: bool) -> ImageFileError | None:
        try:
            with _reasons(path), Image.open(path) as image:
                if not is_mask:
                    one = np.zeros(1, np.uint16 if _is_deep(image) else np.uint8)
                    if bits is not None and (reason := contradiction(one, bits)):
                        raise _UnsuitableError(reason)
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
