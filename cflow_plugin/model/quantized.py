"""An encoder whose convolutions compute with 8-bit numbers, in training as in a runtime."""

__all__ = [
    "CONVOLUTIONS",
    "MEASURED",
    "QuantizedConvolution",
    "in_floating_point",
    "measure_ranges",
    "quantize_convolutions",
]

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, cast

import torch
from timm.layers.conv2d_same import Conv2dSame
from timm.layers.padding import pad_same
from torch import nn

from cflow_plugin.errors import CflowError
from cflow_plugin.modules import FullPrecision

CONVOLUTIONS = (nn.Conv2d, Conv2dSame)
"""Convolutions that do what they are called; others may normalise their weights, for example."""

MEASURED = ("input_scale", "input_zero")
"""Names of a quantised convolution's tensors that are no weights."""

# A processor without VNNI adds two products of 8-bit numbers up in 16 bits, and two of seven bits with eight fit.
_LARGEST_WEIGHT = 64
_LARGEST_INPUT = 255


@torch.library.custom_op("cflow_plugin::round_to_bytes", mutates_args=())
def _round_to_bytes(values: torch.Tensor, scale: float, zero: int) -> torch.Tensor:
    """What exporters know how to write; of torch's own operation they do not know the result's shape."""
    return torch.fake_quantize_per_tensor_affine(values, scale, zero, 0, _LARGEST_INPUT)


@_round_to_bytes.register_fake
def _(values: torch.Tensor, scale: float, zero: int) -> torch.Tensor:
    del scale, zero
    return torch.empty_like(values)


class QuantizedConvolution(FullPrecision, nn.Conv2d):
    r"""A convolution that computes what a runtime computes in INT8, in floating point.

    Its input is rounded to one of 256 values between the least and the greatest that training images have, and each
    output's weights to whole multiples of their largest over 64:

    .. math:: x \mapsto s \, \big(\mathrm{clamp}(\lfloor x / s \rceil + z, 0, 255) - z\big), \qquad
        w \mapsto \frac{\max |w|}{64} \Big\lfloor \frac{64 \, w}{\max |w|} \Big\rceil .

    A batch norm's factors can be multiplied into such weights and change nothing. Exported, the two roundings are what
    runtimes know as fake quantisation, and what makes them compute in INT8.

    Args:
        convolution: What it is made of; its parameters are taken over, with their names.
    """

    def __init__(self, convolution: nn.Conv2d) -> None:
        super().__init__(
            convolution.in_channels,
            convolution.out_channels,
            (convolution.kernel_size[0], convolution.kernel_size[1]),
            stride=(convolution.stride[0], convolution.stride[1]),
            padding=cast("Any", convolution.padding),
            dilation=(convolution.dilation[0], convolution.dilation[1]),
            groups=convolution.groups,
            bias=convolution.bias is not None,
            padding_mode=convolution.padding_mode,
            device="meta",
        )
        self.weight, self.bias = convolution.weight, convolution.bias
        self.pads_as_needed = isinstance(convolution, Conv2dSame)
        self.is_exact = False
        self.input_scale: torch.Tensor
        self.input_zero: torch.Tensor
        self.register_buffer("input_scale", torch.tensor(1 / _LARGEST_INPUT))
        self.register_buffer("input_zero", torch.tensor(0, dtype=torch.int32))
        # As constants, once all is set: what exporters take.
        self.weight_scale: torch.Tensor | None
        self.register_buffer("weight_scale", None, persistent=False)
        self._input_constants = 1.0, 0

    def set_range(self, least: torch.Tensor, greatest: torch.Tensor) -> None:
        """Say between which values the input lies; 0, which is beyond the border, is always among them."""
        least, greatest = least.float().clamp(max=0), greatest.float().clamp(min=0)
        self.input_scale.copy_(((greatest - least) / _LARGEST_INPUT).clamp_min(1e-8))
        self.input_zero.copy_((-least / self.input_scale).round())

    @torch.no_grad()
    def fix(self) -> None:
        """Take all scales as they are now for constants."""
        self.weight_scale = self._scale_of_weights()
        self._input_constants = float(self.input_scale), int(self.input_zero)

    def _scale_of_weights(self) -> torch.Tensor:
        return (self.weight.detach().float().abs().flatten(1).amax(1) / _LARGEST_WEIGHT).clamp_min(1e-30)

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """Convolve ``(B, C, H, W)``; in half precision, too, the roundings are those of single precision."""
        weight = self.weight
        if not self.is_exact:
            input, weight = self._rounded(input.float()).to(weight.dtype), self._rounded_weights().to(weight.dtype)
        if self.pads_as_needed:
            input = pad_same(input, [*self.kernel_size], [*self.stride], [*self.dilation])
            return nn.functional.conv2d(input, weight, self.bias, self.stride, 0, self.dilation, self.groups)
        return self._conv_forward(input, weight, self.bias)

    def _rounded(self, values: torch.Tensor) -> torch.Tensor:
        if self.weight_scale is None:
            return torch.fake_quantize_per_tensor_affine(values, self.input_scale, self.input_zero, 0, _LARGEST_INPUT)
        return _round_to_bytes(values, *self._input_constants)

    def _rounded_weights(self) -> torch.Tensor:
        scale = self._scale_of_weights() if self.weight_scale is None else self.weight_scale
        zeros = torch.zeros_like(scale, dtype=torch.int32)
        return torch.fake_quantize_per_channel_affine(
            self.weight.float(), scale, zeros, 0, -_LARGEST_WEIGHT, _LARGEST_WEIGHT
        )


def quantize_convolutions(network: nn.Module, name: str) -> None:
    """Let all convolutions of a network but the first, which sees the image itself, compute with 8-bit numbers.

    Args:
        network: The network; it is changed.
        name: What it is called.

    Raises:
        CflowError: If most of its weights are in layers of other kinds.
    """
    found = [layer for layer, module in network.named_modules() if type(module) in CONVOLUTIONS]
    for layer in found[1:]:
        network.set_submodule(layer, QuantizedConvolution(network.get_submodule(layer)))  # pyright: ignore[reportArgumentType]
    inside = sum(module.weight.numel() for module in _quantized(network))
    if not inside or 2 * inside < sum(parameter.numel() for parameter in network.parameters()):
        msg = f"encoder_precision int8 is for networks of convolutions, and most of {name!r} is something else."
        raise CflowError(msg)


@contextmanager
def in_floating_point(*networks: nn.Module) -> Iterator[None]:
    """Let quantised convolutions compute as those that they are made of.

    Args:
        networks: What they are part of.
    """
    found = [module for network in networks for module in _quantized(network)]
    for module in found:
        module.is_exact = True
    try:
        yield
    finally:
        for module in found:
            module.is_exact = False


@contextmanager
def measure_ranges(network: nn.Module) -> Iterator[None]:
    """Take the ranges of all quantised convolutions from what the network is given meanwhile.

    Args:
        network: The network.
    """
    ranges: dict[nn.Module, tuple[torch.Tensor, torch.Tensor]] = {}

    def note(module: nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
        least, greatest = inputs[0].detach().aminmax()
        if module in ranges:
            least, greatest = least.minimum(ranges[module][0]), greatest.maximum(ranges[module][1])
        ranges[module] = least, greatest

    handles = [module.register_forward_pre_hook(note) for module in _quantized(network)]
    try:
        with in_floating_point(network):
            yield
    finally:
        for handle in handles:
            handle.remove()
    for module, (least, greatest) in ranges.items():
        assert isinstance(module, QuantizedConvolution)
        module.set_range(least, greatest)


def _quantized(network: nn.Module) -> list[QuantizedConvolution]:
    return [module for module in network.modules() if isinstance(module, QuantizedConvolution)]
