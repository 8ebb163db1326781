"""The Open Inference Protocol, as far as JSON goes: what a request holds, and what it is answered.

References:
    https://github.com/open-inference/open-inference-protocol/blob/main/specification/protocol/inference_rest.md
"""

__all__ = ["RequestError", "answer", "image_of", "metadata", "result_of"]

import base64
import binascii
import json
from typing import Any

import numpy as np

from cflow_plugin.commands.score.parts import Row

_TYPES = {"UINT8": np.uint8, "UINT16": np.uint16}


class RequestError(Exception):
    """A request that cannot be served; the message says why."""


def metadata(name: str, bits: int) -> dict[str, Any]:
    """What a model takes and gives.

    Args:
        name: Its name.
        bits: Bits of a value in its images.
    """
    outputs = {"pred_score": "FP32", "pred_label": "BOOL", "p_value": "FP64", "regions": "BYTES"}
    return {
        "name": name,
        "platform": "openvino",
        "inputs": [{"name": "image", "datatype": "UINT8" if bits == 8 else "UINT16", "shape": [1, -1, -1, 3]}],
        "outputs": [{"name": output, "datatype": kind, "shape": [1]} for output, kind in outputs.items()],
    }


def image_of(content: bytes) -> tuple[bytes | np.ndarray, str | None]:
    """The image of an inference request.

    Args:
        content: The request, JSON: one input, either pixels ``(1, H, W, 3)``, blue first, of type ``UINT8`` (or
            ``UINT16``), or one image file in base64, of type ``BYTES``.

    Returns:
        The pixels ``(H, W, 3)`` or the file's content; and the request's id.

    Raises:
        RequestError: If the request is of another form.
    """
    try:
        request = json.loads(content)
    except (ValueError, RecursionError) as error:
        message = "This is no JSON."
        raise RequestError(message) from error
    inputs = request.get("inputs") if isinstance(request, dict) else None
    if not isinstance(inputs, list) or len(inputs) != 1 or not isinstance(inputs[0], dict):
        message = "Send one input, one image."
        raise RequestError(message)
    number = request.get("id")
    if number is not None and not isinstance(number, str):
        message = "The id is a string."
        raise RequestError(message)
    kind, shape, data = (inputs[0].get(key) for key in ("datatype", "shape", "data"))
    if not isinstance(data, list):
        message = "The input's data are a list."
        raise RequestError(message)
    if kind == "BYTES":
        return _file(data), number
    if not isinstance(kind, str) or kind not in _TYPES:
        message = "The input's datatype is UINT8, UINT16 or BYTES."
        raise RequestError(message)
    return _pixels(data, shape, _TYPES[kind]), number


def _file(data: list[Any]) -> bytes:
    if len(data) != 1 or not isinstance(data[0], str):
        message = "Send one image file, in base64."
        raise RequestError(message)
    try:
        return base64.b64decode(data[0], validate=True)
    except (binascii.Error, ValueError) as error:
        message = "This is no base64."
        raise RequestError(message) from error


def _pixels(data: list[Any], shape: Any, kind: type[np.unsignedinteger]) -> np.ndarray:
    is_shape = isinstance(shape, list) and len(shape) == 4 and all(type(side) is int and side > 0 for side in shape)
    if not is_shape or shape[0] != 1 or shape[3] != 3:
        message = "The input's shape is [1, height, width, 3]."
        raise RequestError(message)
    try:
        values = np.asarray(data)  # flat, or in lists of lists
        if values.dtype.kind not in "iu" or values.min() < 0 or values.max() > np.iinfo(kind).max:
            raise ValueError
        return values.astype(kind).reshape(shape[1:])
    except (ValueError, OverflowError) as error:
        message = f"The data are no whole numbers from 0 to {np.iinfo(kind).max} of that shape."
        raise RequestError(message) from error


def answer(name: str, number: str | None, row: Row) -> dict[str, Any]:
    """What an inference request is answered.

    Args:
        name: The model's name.
        number: The request's id.
        row: What is known of the image.
    """
    outputs = [("pred_score", "FP32", row.score), ("pred_label", "BOOL", row.anomalous)]
    outputs += [] if row.p_value is None else [("p_value", "FP64", row.p_value)]
    outputs += [("regions", "BYTES", row.regions)]
    return {
        "model_name": name,
        **({} if number is None else {"id": number}),
        "outputs": [
            {"name": output, "datatype": kind, "shape": [1], "data": [value]} for output, kind, value in outputs
        ],
    }


def result_of(name: str, row: Row) -> dict[str, Any]:
    """What an image is answered, in words of our own.

    Args:
        name: The model's name.
        row: What is known of the image.
    """
    return {
        "model": name,
        "score": row.score,
        "anomalous": row.anomalous,
        "p_value": row.p_value,
        "width": row.width,
        "height": row.height,
        "regions": json.loads(row.regions or "[]"),
    }
