"""The region of interest: which part of all pictures is looked at."""

__all__ = ["find_interest", "set_interest"]

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import cv2
import numpy as np
import torch
from anomalib.models.components import AnomalibModule
from numpy.typing import NDArray
from scipy.ndimage import binary_fill_holes
from skimage.draw import polygon2mask
from skimage.filters import threshold_otsu
from torch.utils.data import DataLoader
from torchvision.transforms.v2.functional import resize

from cflow_plugin.errors import CflowError
from cflow_plugin.files import atomic_file
from cflow_plugin.images.loading import images_in, loader_of
from cflow_plugin.images.reading import load_pixels
from cflow_plugin.training.settings import check_not_negative

if TYPE_CHECKING:
    from cflow_plugin.model.torch_model import CflowModel

logger = logging.getLogger(__name__)

_PICTURE = "region_of_interest.png"
_AVERAGED = 16  # good pictures whose mean tells foreground from background


def set_interest(module: AnomalibModule, images: DataLoader[Any]) -> None:
    """Tell a model's scoring what its settings ask to look at.

    Args:
        module: A :class:`~cflow_plugin.CflowPlugin`.
        images: Loader of training images.

    Raises:
        CflowError: See :func:`find_interest`.
    """
    given, border, size = (module.hparams[name] for name in ("region_of_interest", "ignored_border", "image_size"))
    check_not_negative(ignored_border=border)
    found = find_interest(given, border, tuple(size), images, Path(module.trainer.default_root_dir))
    cast("CflowModel", module.model).scoring.interest = found.to(module.device)


def find_interest(
    given: str | Sequence[Sequence[float]] | None,
    border: int,
    size: tuple[int, int],
    images: DataLoader[Any],
    folder: Path,
) -> torch.Tensor:
    """Find what is looked at, and leave a picture of it: the mean of some training pictures, the rest darkened.

    Args:
        given: A mask image's file, where anything but black is looked at; ``bright`` or ``dark``, the part of the mean
            training picture on that side of Otsu's threshold, holes filled; or boxes (left, top, right, bottom) and
            polygons (x, y, x, y, x, y and so on) in shares of the width and height; or ``None`` for all.
        border: Pixels of the map at its edges that are not looked at.
        size: Height and width of the map.
        images: Loader of training images.
        folder: Where the picture goes.

    Returns:
        ``(H, W)`` bool, or ``(1, 1)`` where all is looked at.

    Raises:
        CflowError: If it cannot be read, or is empty.
    """
    if given is None and not border:
        return torch.ones(1, 1, dtype=torch.bool)
    mean = _mean_picture(images, size)
    if given is None:
        inside = np.ones(size, bool)
    elif isinstance(given, str):
        inside = _foreground(mean, given) if given in ("bright", "dark") else _of_file(given, size)
    else:
        inside = _of_shapes(given, size)
    if border:
        inside[:border] = inside[-border:] = inside[:, :border] = inside[:, -border:] = False
    if not inside.any():
        message = "The region of interest is empty: see region_of_interest and ignored_border."
        raise CflowError(message)
    shown = np.where(inside[..., None], mean, 0.3 * mean)
    folder.mkdir(parents=True, exist_ok=True)
    with atomic_file(folder / _PICTURE) as partial:
        partial.write_bytes(cv2.imencode(".png", np.rint(255 * shown[..., ::-1]).astype(np.uint8))[1].tobytes())
    logger.info("%.0f %% of a picture is looked at: %s.", 100 * inside.mean(), folder / _PICTURE)
    return torch.from_numpy(inside)


def _mean_picture(images: DataLoader[Any], size: tuple[int, int]) -> NDArray[np.float32]:
    """Mean of some pictures, ``(H, W, 3)``, stretched to values between 0 and 1."""
    count = images_in(images)
    chosen = list(range(0, count, -(-count // _AVERAGED)))
    total = torch.zeros(3, *size)
    for batch in loader_of(images.dataset, like=images, sampler=chosen, batch_size=1):
        total += resize(batch.image, list(size), antialias=True)[0]
    return (total / total.max().clamp_min(1e-6)).permute(1, 2, 0).numpy()


def _foreground(mean: NDArray[np.float32], side: str) -> NDArray[np.bool_]:
    grey = mean.mean(2)
    bright = grey > threshold_otsu(grey)
    return np.asarray(binary_fill_holes(bright if side == "bright" else ~bright))


def _of_file(path: str, size: tuple[int, int]) -> NDArray[np.bool_]:
    mask = np.asarray((load_pixels(path) > 0).any(2), np.uint8)
    return cv2.resize(mask, size[::-1], interpolation=cv2.INTER_NEAREST_EXACT) > 0


def _of_shapes(shapes: Sequence[Sequence[float]], size: tuple[int, int]) -> NDArray[np.bool_]:
    inside = np.zeros(size, bool)
    for shape in shapes:
        if len(shape) < 4 or len(shape) % 2 or not all(0 <= value <= 1 for value in shape):
            message = (
                "region_of_interest takes boxes [left, top, right, bottom] and polygons [x, y, x, y, x, y, …] in "
                f"shares of the width and height, between 0 and 1; got {list(shape)}."
            )
            raise CflowError(message)
        left, top, right, bottom = shape[:4]
        corners = np.reshape(
            [left, top, right, top, right, bottom, left, bottom] if len(shape) == 4 else shape, (-1, 2)
        )
        inside |= polygon2mask(size, corners[:, ::-1] * size - 0.5)  # whose pixels' centres are whole numbers
    return inside
