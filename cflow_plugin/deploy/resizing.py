"""Pre-processing that means the same in every runtime: resizing as plain arithmetic, crops, and what is refused."""

__all__ = ["ExactResize", "exportable"]

from collections.abc import Sequence
from copy import deepcopy
from typing import Any

import torch
from torch import nn
from torchvision.transforms.v2 import (
    CenterCrop,
    Compose,
    Grayscale,
    Identity,
    InterpolationMode,
    Normalize,
    Pad,
    Resize,
    ToDtype,
    ToImage,
    Transform,
)

from cflow_plugin.errors import CflowError

# What gives an image the same outcome each time, in operations that all runtimes have.
_EXPORTABLE = (CenterCrop, Grayscale, Identity, Normalize, Pad, ToDtype, ToImage)


class ExactResize(nn.Module):
    r"""Bilinear resizing with smoothing, as torch does it, in operations that mean the same everywhere.

    Runtimes read ONNX's ``Resize`` and some ignore its ``antialias``. Here each row of the result is a weighted mean of
    rows of the image, :math:`y = W_h x W_w^T`, with the triangle filter

    .. math:: W_{ij} \propto \max\big(0, 1 - |j + \tfrac12 - (i + \tfrac12) s| / \max(s, 1)\big), \qquad s = old / new .

    Args:
        size: Height and width afterwards; or one number, which the shorter side will have.

    Example:
        >>> images = torch.rand(1, 3, 50, 70)
        >>> expected = torch.nn.functional.interpolate(images, (20, 90), mode="bilinear", antialias=True)
        >>> torch.allclose(ExactResize((20, 90))(images), expected, atol=1e-6)
        True
    """

    def __init__(self, size: Sequence[int]) -> None:
        super().__init__()
        self.size = tuple(size)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Resize images ``(B, C, H, W)``."""
        size = self.size
        if len(size) == 1:
            height, width = images.shape[-2:]
            longer = int(size[0] * max(height, width) / min(height, width))
            size = (size[0], longer) if height <= width else (longer, size[0])
        rows = _weights(images[0, 0, :, 0], size[0])
        columns = _weights(images[0, 0, 0, :], size[1])
        return rows @ (images @ columns.T)


def _weights(line: torch.Tensor, new: int) -> torch.Tensor:
    """The matrix ``(new, old)`` that resizes a line of pixels; only its length counts, which a graph may leave open."""
    ones = torch.ones_like(line)
    scale = ones.sum() / new
    place = ones.cumsum(0) - 0.5
    centre = (torch.arange(new, dtype=line.dtype, device=line.device) + 0.5) * scale
    weights = (1 - (place - centre[:, None]).abs() / scale.clamp(min=1)).clamp(min=0)
    return weights / weights.sum(1, keepdim=True)


def exportable(transform: Transform | None) -> list[nn.Module]:
    """A transform's steps, as they go into a graph.

    Args:
        transform: What is done to images before the encoder.

    Raises:
        CflowError: If a step is random, resizes in another way than bilinearly with smoothing, or is not known to mean
            the same in every runtime.
    """
    steps: list[Any] = _flat(transform)
    return [_exportable(step) for step in steps]


def _flat(transform: Any) -> list[Any]:
    if transform is None:
        return []
    if isinstance(transform, Compose | nn.Sequential):
        parts = transform.transforms if isinstance(transform, Compose) else transform
        return [step for part in parts for step in _flat(part)]
    return [transform]


def _exportable(step: Any) -> nn.Module:
    if isinstance(step, Resize):
        kind = getattr(step.interpolation, "value", step.interpolation)
        if kind != InterpolationMode.BILINEAR.value or not step.antialias or step.max_size is not None:
            message = (
                f"The pre-processing resizes by {step}; a file can do so with bilinear interpolation, antialias=True."
            )
            raise CflowError(message)
        if step.size is None:
            message = f"The pre-processing's {step} has no size that a file could state."
            raise CflowError(message)
        return ExactResize([step.size] if isinstance(step.size, int) else step.size)
    if isinstance(step, _EXPORTABLE) or type(step).__module__.startswith("anomalib."):
        return deepcopy(step)
    kinds = ", ".join(kind.__name__ for kind in (Resize, *_EXPORTABLE))
    message = (
        f"The pre-processing holds {type(step).__name__}, which an exported file cannot be relied on to do: use "
        f"{kinds}, or do it to the images beforehand."
    )
    raise CflowError(message)
