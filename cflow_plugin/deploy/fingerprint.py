"""What a file gives for a built-in pattern, kept in the file: whatever changes it, or the way it is run, shows."""

__all__ = [
    "FINGERPRINT",
    "RELEASE",
    "Result",
    "decision_threshold",
    "fingerprint_of",
    "patterns",
    "result_of",
    "size_of",
    "size_of_pattern",
    "stored_types",
    "tensor_of",
]

from typing import Any, NamedTuple

import numpy as np
import openvino as ov
from numpy.typing import NDArray
from openvino import opset13 as operations

from cflow_plugin.deploy.openvino_input import takes_bytes
from cflow_plugin.deploy.runtime import bits_of

FINGERPRINT = "cflow_plugin_fingerprint"
"""Under this name an exported file has what it gave for the pattern when it was written, as JSON."""

RELEASE = "cflow_plugin_release"
"""Under this name an exported file has the release of this package that wrote it."""

_SIZE = (96, 128)  # of the pattern, where a file takes images of any size
_PARTS = 4  # of a map, downwards and across
_DIGITS = 7
_STEPS = 24  # of a bisection between 0 and 1, down to a float's last digits
_LARGE = 64  # numbers: what holds more is a weight


class Result(NamedTuple):
    """What a model gives for one image.

    Attributes:
        score: The score.
        label: The decision, or ``None`` where the model takes none.
        map: The anomaly map ``(H, W)``, or ``None`` where a runtime does not give it as it is.
        mask: Share of pixels in the mask, if there is one.
    """

    score: float
    label: bool | None
    map: NDArray[np.float32] | None
    mask: float | None = None


def patterns(size: tuple[int, int], bits: int = 8) -> list[NDArray[Any]]:
    """Images of whole numbers alone, so that they are the same on every machine.

    A ramp, squares, noise, and noise so faint that a camera might have it.

    Args:
        size: Height and width.
        bits: Bits of a value.

    Returns:
        Each ``(H, W, 3)``, blue first: bytes, or 16-bit values for more than 8 bits.

    Example:
        >>> [image.shape for image in patterns((2, 3))]
        [(2, 3, 3), (2, 3, 3), (2, 3, 3), (2, 3, 3)]
    """
    y, x, channel = np.indices((*size, 3), dtype=np.uint64)
    ramp = (255 * (y + (channel + 1) * x)) // (size[0] + (channel + 1) * size[1])
    squares = np.where((y // 8 + x // 8) % 2, 40 + 70 * channel, 200 - 50 * channel)
    noise = ((x * 73856093) ^ (y * 19349663) ^ ((channel + 1) * 83492791)) * 2654435761 % 2**32 // 2**24
    images = (ramp, squares, noise, 112 + noise // 16)
    if bits == 8:
        return [image.astype(np.uint8) for image in images]
    return [(image * (2**bits - 1) // 255).astype(np.uint16) for image in images]


def tensor_of(pixels: NDArray[Any]) -> NDArray[np.float32]:
    """Pixels as files without camera bytes take them.

    Args:
        pixels: Shape ``(H, W, 3)``, blue first: bytes, 16-bit values, or in single precision between 0 and 1.

    Returns:
        Shape ``(1, 3, H, W)``, red first, between 0 and 1.
    """
    highest = np.float32({"uint8": 255, "uint16": 65535}.get(pixels.dtype.name, 1))
    return np.divide(np.ascontiguousarray(pixels[..., ::-1].transpose(2, 0, 1)[None]), highest, dtype=np.float32)


def size_of(model: ov.Model) -> tuple[int, int] | None:
    """Height and width of the images that a file takes, or ``None`` where they may differ.

    Args:
        model: As OpenVINO reads it.
    """
    shape = model.input(0).partial_shape
    height, width = (shape[1], shape[2]) if takes_bytes(model) else (shape[2], shape[3])
    return None if height.is_dynamic or width.is_dynamic else (height.get_length(), width.get_length())


def size_of_pattern(model: ov.Model) -> tuple[int, int]:
    """Height and width of the pattern that a file is tried with.

    Args:
        model: As OpenVINO reads it.
    """
    return size_of(model) or _SIZE


def fingerprint_of(model: ov.Model, bits: int | None = None, gain: float = 1.0) -> dict[str, Any]:
    """Run the pattern through a file's own graph, in OpenVINO and single precision.

    Args:
        model: As it is written to a file, or read from one; it is left as it is.
        bits: Bits of a value in its images; by default what the file says.
        gain: What values are multiplied by, of a file that does not take whole numbers.

    Returns:
        For JSON: the pattern's ``size``, ``scores``, ``labels``, ``masks`` (shares of pixels) and ``maps`` (means of
        parts of them); the ``threshold`` that a score is compared with, see :func:`decision_threshold`; the ``types``
        of the weights, see :func:`stored_types`.
    """
    single, size, whole = _one_at_a_time(model), size_of_pattern(model), takes_bytes(model)
    compiled = ov.Core().compile_model(single, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    images = patterns(size, bits_of(model) if bits is None else bits)
    results = [result_of(compiled(image[None] if whole else tensor_of(image) * np.float32(gain))) for image in images]
    return {
        "size": list(size),
        "scores": [round(result.score, _DIGITS) for result in results],
        "labels": [result.label for result in results],
        "masks": [None if result.mask is None else round(result.mask, _DIGITS) for result in results],
        "maps": [_means(result.map) for result in results],
        "threshold": decision_threshold(model),
        "types": stored_types(model),
    }


def _one_at_a_time(model: ov.Model) -> ov.Model:
    """A copy that takes one image."""
    copied = model.clone()
    shape = copied.input(0).partial_shape
    shape[0] = 1
    copied.reshape(shape)
    return copied


def result_of(outputs: Any) -> Result:
    """One image's result in words of our own.

    Args:
        outputs: Arrays, or what else numpy takes, by the names of a file's outputs.
    """
    found = {name: _output(outputs, name) for name in ("pred_score", "pred_label", "anomaly_map", "pred_mask")}
    score, label, anomaly_map, mask = found.values()
    assert score is not None
    return Result(
        float(score.item()),
        None if label is None else bool(label.item()),
        None if anomaly_map is None else np.asarray(anomaly_map, np.float32).reshape(anomaly_map.shape[-2:]),
        None if mask is None else float(np.mean(mask)),
    )


def _output(outputs: Any, name: str) -> NDArray[Any] | None:
    try:
        return np.asarray(outputs[name])
    except (KeyError, RuntimeError):
        return None


def _means(anomaly_map: NDArray[np.float32] | None) -> list[float]:
    """Means of a map's parts, row by row."""
    assert anomaly_map is not None
    rows = np.array_split(np.asarray(anomaly_map, np.float64), _PARTS, axis=0)
    return [round(float(part.mean()), _DIGITS) for row in rows for part in np.array_split(row, _PARTS, axis=1)]


def decision_threshold(model: ov.Model) -> float | None:
    """The score from which on a file decides for an anomaly, found by giving scores to its last operations.

    Args:
        model: Any file's model, as OpenVINO reads it; it is left as it is.

    Returns:
        The lowest anomalous score, to a float's last digits; infinity where none between 0 and 1 is; ``None`` where
        nothing is decided, or by anything else than the score.
    """
    copied = _one_at_a_time(model)
    found = {name: output for output in copied.outputs for name in output.get_names()}
    if not {"pred_score", "pred_label"} <= found.keys():
        return None
    score = found["pred_score"].get_node().input_value(0)
    label = found["pred_label"].get_node()
    given = operations.parameter(score.get_partial_shape(), ov.Type.f32)
    score.replace(given.output(0))
    try:
        decisions = ov.Model([label], [given])  # pyright: ignore[reportGeneralTypeIssues]  its stub
        decide = ov.Core().compile_model(decisions, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    except RuntimeError:  # there is another way from the image to the decision
        return None

    def is_anomalous(value: float) -> bool:
        return bool(np.asarray(decide(np.full(1, value, np.float32))[0]).item())

    low, high = -1.0, 1.0
    if not is_anomalous(high):
        return float("inf")
    if is_anomalous(low):
        return low
    for _ in range(_STEPS):
        middle = (low + high) / 2
        low, high = (low, middle) if is_anomalous(middle) else (middle, high)
    return round(high, 6)


def stored_types(model: ov.Model) -> list[str]:
    """What numbers a file's weights are kept in, and whether any are computed with in few bits.

    Args:
        model: As OpenVINO reads it.
    """
    found = set()
    for node in model.get_ops():
        kind = node.get_type_name()
        if kind == "Constant" and np.prod(list(node.shape)) > _LARGE:
            found.add(node.get_element_type().get_type_name())
        elif kind == "FakeQuantize":
            found.add("quantized")
    return sorted(found - {"i32", "i64", "boolean"})
