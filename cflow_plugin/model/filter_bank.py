"""An encoder without training: Gabor filters at several scales, for machines that cannot download ImageNet weights."""

__all__ = ["FilterBank"]

import math
from collections.abc import Sequence

import numpy as np
import torch
from skimage.filters import gabor_kernel
from torch import nn
from torch.nn import functional

_FREQUENCIES = (0.25, 0.125)  # cycles a pixel; each level of the image pyramid halves them
_ORIENTATIONS = 8
# Rows: luminance, red against green, yellow against blue.
_OPPONENT = ((1 / 3, 1 / 3, 1 / 3), (0.5, -0.5, 0.0), (0.25, 0.25, -0.5))


class FilterBank(nn.Module):
    r"""Local energy of Gabor filters, :math:`|I * g_{f,\theta}|`, in three colour channels, and the local mean colour.

    The same filters run over an image pyramid, as in a CNN whose stages halve the resolution: scale ``k`` has stride
    :math:`2^{k+2}` pixels and filters of :math:`2^{-k-1}` and :math:`2^{-k-2}` cycles a pixel.

    Args:
        scales: Which scales to compute, out of ``scale1`` to ``scale4``.

    References:
        Jain, Farrokhnia: Unsupervised texture segmentation using Gabor filters. Pattern Recognition, 1991.
    """

    layers = ("scale1", "scale2", "scale3", "scale4")

    def __init__(self, scales: Sequence[str]) -> None:
        super().__init__()
        self.scales = list(scales)
        kernels = [
            gabor_kernel(frequency, math.pi * index / _ORIENTATIONS, bandwidth=1.2)  # pyright: ignore[reportArgumentType]
            for frequency in _FREQUENCIES
            for index in range(_ORIENTATIONS)
        ]
        # A filter must not answer to brightness, only to contrast.
        kernels = [kernel - np.abs(kernel) * kernel.sum() / np.abs(kernel).sum() for kernel in kernels]
        size = max(max(kernel.shape) for kernel in kernels)
        bank = torch.zeros(2, len(kernels), 1, size, size)
        for index, kernel in enumerate(kernels):
            top, left = (size - kernel.shape[0]) // 2, (size - kernel.shape[1]) // 2
            window = (index, 0, slice(top, top + kernel.shape[0]), slice(left, left + kernel.shape[1]))
            bank[(0, *window)] = torch.from_numpy(kernel.real)
            bank[(1, *window)] = torch.from_numpy(kernel.imag)
        self.bank: torch.Tensor
        self.colours: torch.Tensor
        # Fixed by the code, but kept with the model, as a CNN's weights are.
        self.register_buffer("bank", bank.flatten(0, 1))
        self.register_buffer("colours", torch.tensor(_OPPONENT)[..., None, None])

    def forward(self, images: torch.Tensor) -> dict[str, torch.Tensor]:
        """Compute the pyramid.

        Args:
            images: ``(B, 3, H, W)``.

        Returns:
            For each scale ``(B, 51, H_k, W_k)``: logarithms of 16 energies in three colours, and three means.
        """
        level = functional.conv2d(images, self.colours)
        features = {}
        for index, name in enumerate(self.layers[: max(map(self.layers.index, self.scales)) + 1]):
            if index:
                level = functional.avg_pool2d(level, 2)
            if name in self.scales:
                features[name] = self._energies(level)
        return features

    def _energies(self, level: torch.Tensor) -> torch.Tensor:
        batch, colours, height, width = level.shape
        margin = self.bank.shape[-1] // 2
        padded = functional.pad(level, [margin] * 4, mode="replicate")
        response = functional.conv2d(padded.reshape(batch * colours, 1, *padded.shape[-2:]), self.bank, stride=2)
        real, imaginary = response.chunk(2, dim=1)
        energy = (real.square() + imaginary.square() + 1e-12).sqrt()
        # Of a size that eight does not divide, the rest is left out, as by the pooling of colours below.
        energy = functional.avg_pool2d(energy, 4)[..., : height // 8, : width // 8]
        energy = energy.reshape(batch, -1, height // 8, width // 8)
        # Energies are far from normally distributed; their logarithms are not.
        return torch.cat([torch.log(energy + 0.02), functional.avg_pool2d(level, 8)], dim=1)
