"""How the roundings of an 8-bit encoder are written in files, so that runtimes compute in INT8."""

__all__ = ["onnx_translations", "openvino_extensions"]

from collections.abc import Callable
from typing import Any

import numpy as np
import openvino as ov
import torch
from openvino import opset13 as operations
from openvino.frontend.pytorch import ConversionExtension

import cflow_plugin.model.quantized  # noqa: F401  it defines the operation


def openvino_extensions() -> list[ConversionExtension]:
    """What :func:`openvino.convert_model` needs for a :class:`~cflow_plugin.model.quantized.QuantizedConvolution`."""

    def convert(node: Any) -> list[ov.Output]:
        scale, zero = (node.get_values_from_const_input(place) for place in (1, 2))
        least, greatest = (operations.constant(np.float32(scale * (value - zero))) for value in (0, 255))
        return operations.fake_quantize(node.get_input(0), least, greatest, least, greatest, 256).outputs()

    return [ConversionExtension("cflow_plugin.round_to_bytes.default", convert)]


def onnx_translations() -> dict[Callable[..., Any], Callable[..., Any]]:
    """The same for :func:`torch.onnx.export`, as its ``custom_translation_table``."""
    import onnxscript  # it takes its time, and only ONNX needs it

    onnx: Any = onnxscript.opset18
    unsigned, signed = 2, 3  # ONNX's numbers of these formats

    def convert_input(values: Any, scale: float, zero: int) -> Any:
        step, middle = onnx.Constant(value_float=scale), onnx.Cast(onnx.Constant(value_int=zero), to=unsigned)
        return onnx.DequantizeLinear(onnx.QuantizeLinear(values, step, middle), step, middle)

    def convert_weights(weights: Any, scale: Any, zero: Any, axis: int, quant_min: int, quant_max: int) -> Any:
        del quant_min, quant_max  # no weight lies beyond them
        middle = onnx.Cast(zero, to=signed)
        return onnx.DequantizeLinear(onnx.QuantizeLinear(weights, scale, middle, axis=axis), scale, middle, axis=axis)

    return {
        torch.ops.cflow_plugin.round_to_bytes.default: convert_input,
        torch.ops.aten.fake_quantize_per_channel_affine.default: convert_weights,
    }
