"""What an OpenVINO model does to images first: camera bytes, and other sizes than its own.

Both are plain arithmetic, which means the same in every runtime. OpenVINO's own conversion of colours (2026.4, where an
image's size is left open) mixes up the lower half of 3000×4000 pixels.
"""

__all__ = ["take_bytes", "take_other_sizes", "takes_bytes"]

from typing import Any

import numpy as np
import openvino as ov
from openvino import opset13 as operations


def take_bytes(model: ov.Model, bits: int = 8) -> None:
    """Let a model take images as cameras give them: ``(B, H, W, 3)``, blue first, in whole numbers.

    Args:
        model: Its input is ``(B, 3, H, W)``, red first, between 0 and 1; it is changed.
        bits: Bits of a value in the images: bytes for 8, and otherwise 16-bit values in the scale of their files.
    """
    batch, _, height, width = model.get_parameters()[0].get_partial_shape()
    kind, highest = (ov.Type.u8, 255) if bits == 8 else (ov.Type.u16, 65535)
    new = operations.parameter(ov.PartialShape([batch, height, width, ov.Dimension(3)]), kind)
    new.set_layout(ov.Layout("NHWC"))
    planes = operations.split(operations.transpose(new, np.array([0, 3, 1, 2])), np.int64(1), 3)
    red_first = operations.concat(list(reversed(planes.outputs())), 1)  # while values are small
    _put_before(model, new, operations.divide(operations.convert(red_first, "f32"), np.float32(highest)))


def takes_bytes(model: ov.Model) -> bool:
    """Whether a file takes images as cameras give them, ``(B, H, W, 3)`` in whole numbers.

    Args:
        model: As OpenVINO reads it.
    """
    return model.input(0).element_type != ov.Type.f32


def take_other_sizes(model: ov.Model, interpolation: str, size: tuple[int, int] | None = None) -> None:
    """Let a model resize the images that it is given to the size that it takes.

    Args:
        model: Its input is ``(B, 3, H, W)``, or ``(B, H, W, 3)`` in whole numbers, with H and W fixed; it is changed.
        interpolation: ``bilinear`` or ``bicubic``.
        size: Height and width of the images that it is to be given; ``None`` for any.
    """
    old = model.get_parameters()[0]
    last = takes_bytes(model)  # the channels
    shape = list(old.get_partial_shape())
    axes = (1, 2) if last else (2, 3)
    wanted = [shape[axis].get_length() for axis in axes]
    for axis, side in zip(axes, size or (None, None), strict=True):
        shape[axis] = ov.Dimension() if side is None else ov.Dimension(side)
    new = operations.parameter(ov.PartialShape(shape), old.get_element_type())
    new.set_layout(ov.Layout("NHWC" if last else "NCHW"))
    given = operations.shape_of(new, "i64")
    rows, columns = (
        _weights(operations.gather(given, np.int64(axis), np.int64(0)), length, interpolation)
        for axis, length in zip(axes, wanted, strict=True)
    )
    planes = operations.transpose(operations.convert(new, "f32"), np.array([0, 3, 1, 2])) if last else new
    across = operations.matmul(planes, columns, False, True)
    resized = operations.matmul(rows, across, False, False)
    _put_before(model, new, operations.transpose(resized, np.array([0, 2, 3, 1])) if last else resized)


def _put_before(model: ov.Model, new: Any, prepared: Any) -> None:
    """Give a model another input, and what is made of it in the place of the one it had."""
    old = model.get_parameters()[0]
    names = old.output(0).get_names()
    new.set_friendly_name(old.get_friendly_name())
    old.output(0).replace(prepared.output(0))
    model.add_parameters([new])
    model.remove_parameter(old)
    new.output(0).set_names(names)
    model.validate_nodes_and_infer_types()


def _weights(old: Any, new: int, interpolation: str) -> Any:
    """The matrix ``(new, old)`` that resizes a line of pixels.

    Distances are whole numbers, in units of half a pixel of a line ``new`` times as long: in bfloat16, which OpenVINO
    computes in on some processors, 2000.5 and 2004.5 are the same.
    """
    one, two, length = (np.int64(number) for number in (1, 2, new))
    pixels = operations.range(np.int64(0), old, one, "i64")
    place = operations.multiply(operations.add(operations.multiply(pixels, two), one), length)
    centre = operations.multiply(2 * np.arange(new, dtype=np.int64)[:, None] + 1, old)
    apart = operations.abs(operations.subtract(place, centre))
    reach = operations.multiply(operations.maximum(old, length), two)
    if interpolation == "bilinear":
        whole = operations.maximum(operations.subtract(reach, apart), np.int64(0))
        weights = operations.convert(whole, "f32")
    else:
        weights = _cubic(operations.divide(operations.convert(apart, "f32"), operations.convert(reach, "f32")))
    return operations.divide(weights, operations.reduce_sum(weights, np.int64(1), True))


def _cubic(d: Any) -> Any:
    """Keys' cubic with a = -1/2 of distances between pixels."""

    def polynomial(*factors: float) -> Any:
        result: Any = np.float32(factors[0])
        for factor in factors[1:]:
            result = operations.add(operations.multiply(result, d), np.float32(factor))
        return result

    near, far = polynomial(1.5, -2.5, 0, 1), polynomial(-0.5, 2.5, -4, 2)
    far = operations.select(operations.less(d, np.float32(2)), far, np.float32(0))
    return operations.select(operations.less(d, np.float32(1)), near, far)
