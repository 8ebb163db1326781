"""Pre-processing that means the same in every runtime: resizing as plain arithmetic, crops, and what is refused."""

__all__ = ["ExactResize", "exportable"]

from collections.abc import Callable, Sequence
from copy import deepcopy
from typing import Any

import torch
from torch import nn
from torchvision.transforms.v2 import (
    CenterCrop,
    Grayscale,
    Identity,
    Normalize,
    Pad,
    Resize,
    ToDtype,
    ToImage,
    Transform,
)

from cflow_plugin.errors import CflowError
from cflow_plugin.images.loading import steps_of

# What gives an image the same outcome each time, in operations that all runtimes have.
_EXPORTABLE = (CenterCrop, Grayscale, Identity, Normalize, Pad, ToDtype, ToImage)


class ExactResize(nn.Module):
    r"""Bilinear or bicubic resizing with smoothing, as torch does it, in operations that mean the same everywhere.

    Runtimes read ONNX's ``Resize`` and some ignore its ``antialias``. Here each row of the result is a weighted mean of
    rows of the image, :math:`y = W_h x W_w^T`,

    .. math:: W_{ij} \propto f\big((j + \tfrac12 - (i + \tfrac12) s) / \max(s, 1)\big), \qquad s = old / new ,

    with :math:`f(d) = \max(0, 1 - |d|)`, or Keys' cubic with a = -1/2 (IEEE Trans. ASSP 29, 1981).

    Args:
        size: Height and width afterwards; or one number, which the shorter side will have.
        interpolation: ``bilinear`` or ``bicubic``.

    Example:
        >>> images = torch.rand(1, 3, 50, 70)
        >>> expected = torch.nn.functional.interpolate(images, (20, 90), mode="bilinear", antialias=True)
        >>> torch.allclose(ExactResize((20, 90))(images), expected, atol=1e-6)
        True
    """

    def __init__(self, size: Sequence[int], interpolation: str = "bilinear") -> None:
        super().__init__()
        self.size = tuple(size)
        self.interpolation = interpolation
        self._filter = _FILTERS[interpolation]

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Resize images ``(B, C, H, W)``."""
        size = self.size
        if len(size) == 1:
            height, width = images.shape[-2:]
            longer = int(size[0] * max(height, width) / min(height, width))
            size = (size[0], longer) if height <= width else (longer, size[0])
        rows = _weights(images[0, 0, :, 0], size[0], self._filter)
        columns = _weights(images[0, 0, 0, :], size[1], self._filter)
        return rows @ (images @ columns.T)


def _triangle(distance: torch.Tensor) -> torch.Tensor:
    return (1 - distance).clamp(min=0)


def _cubic(distance: torch.Tensor) -> torch.Tensor:
    near = (1.5 * distance - 2.5) * distance**2 + 1
    far = ((-0.5 * distance + 2.5) * distance - 4) * distance + 2
    return torch.where(distance < 1, near, torch.where(distance < 2, far, torch.zeros_like(distance)))


_FILTERS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {"bilinear": _triangle, "bicubic": _cubic}


def _weights(line: torch.Tensor, new: int, of: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
    """The matrix ``(new, old)`` that resizes a line of pixels; only its length counts, which a graph may leave open."""
    ones = torch.ones_like(line)
    scale = ones.sum() / new
    place = ones.cumsum(0) - 0.5
    centre = (torch.arange(new, dtype=line.dtype, device=line.device) + 0.5) * scale
    weights = of((place - centre[:, None]).abs() / scale.clamp(min=1))
    return weights / weights.sum(1, keepdim=True)


def exportable(transform: Transform | None) -> list[nn.Module]:
    """A transform's steps, as they go into a graph.

    Args:
        transform: What is done to images before the encoder.

    Raises:
        CflowError: If a step is random, resizes without smoothing or by another interpolation, or is not known to mean
            the same in every runtime.
    """
    return [_exportable(step) for step in steps_of(transform)]


def _exportable(step: Any) -> nn.Module:
    if isinstance(step, Resize):
        kind = str(getattr(step.interpolation, "value", step.interpolation))
        if kind not in _FILTERS or not step.antialias or step.max_size is not None:
            message = (
                f"The pre-processing resizes by {step}; a file can do so with bilinear or bicubic interpolation, "
                "antialias=True."
            )
            raise CflowError(message)
        if step.size is None:
            message = f"The pre-processing's {step} has no size that a file could state."
            raise CflowError(message)
        return ExactResize([step.size] if isinstance(step.size, int) else step.size, kind)
    if isinstance(step, _EXPORTABLE) or type(step).__module__.startswith("anomalib."):
        return deepcopy(step)
    kinds = ", ".join(kind.__name__ for kind in (Resize, *_EXPORTABLE))
    message = (
        f"The pre-processing holds {type(step).__name__}, which an exported file cannot be relied on to do: use "
        f"{kinds}, or do it to the images beforehand."
    )
    raise CflowError(message)
