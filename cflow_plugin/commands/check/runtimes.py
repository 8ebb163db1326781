"""What can run an exported file here, each behind the same call."""

__all__ = ["NotHereError", "Precision", "Run", "Runtime", "runtimes_for"]

import logging
import os
import tempfile
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import openvino as ov
from numpy.typing import NDArray

from cflow_plugin.deploy.fingerprint import Result, result_of, tensor_of
from cflow_plugin.deploy.openvino_input import takes_bytes
from cflow_plugin.deploy.runtime import bits_of

Run = Callable[[NDArray[Any]], Result]
"""Scores an image ``(H, W, 3)``, blue first: bytes, 16-bit values, or in single precision between 0 and 1."""

Precision = Literal["f32", "f16", "bf16"]
"""What OpenVINO computes in."""

# Differences of scores between 0 and 1 that come of fewer digits alone.
_OF_FEWER_DIGITS: dict[Precision, float] = {"f32": 0.0, "f16": 0.005, "bf16": 0.1}
_CAPABILITIES = {"f32": "FP32", "f16": "FP16", "bf16": "BF16"}  # by OpenVINO's names


class NotHereError(Exception):
    """A runtime that is not installed, or does not take this file."""


class Runtime(NamedTuple):
    """A way of running a file.

    Attributes:
        name: What it is called on the screen.
        open: Makes it ready.
        rounding: Difference of scores that its precision brings.
        of_checkpoint: Whether it runs the checkpoint, and not the file.
    """

    name: str
    open: Callable[[], Run]
    rounding: float = 0.0
    of_checkpoint: bool = False


def runtimes_for(
    path: Path,
    model: ov.Model,
    trained: Any = None,
    torch_first: bool = False,
    precisions: Collection[Precision] = (),
) -> list[Runtime]:
    """All runtimes that might run a file, the one that others are compared with first.

    Args:
        path: The file.
        model: As OpenVINO has read it.
        trained: The trained model that the file was made of, if it is given.
        torch_first: Compare with the trained model, and not with the file in OpenVINO and single precision.
        precisions: What OpenVINO computes in besides f32.
    """
    in_openvino = [
        Runtime(f"OpenVINO {name}", lambda name=name: _openvino(path, model, name), rounding)
        for name, rounding in _OF_FEWER_DIGITS.items()
        if name == "f32" or name in precisions
    ]
    others = [
        Runtime("ONNX Runtime", lambda: _onnxruntime(path)),
        Runtime("openvino-model-api", lambda: _model_api(path, model)),
        Runtime("anomalib OpenVINOInferencer", lambda: _openvino_inferencer(path, model)),
    ]
    torch = Runtime("torch", lambda: _torch(trained), of_checkpoint=True)
    inferencer = Runtime("anomalib TorchInferencer", lambda: _torch_inferencer(trained), of_checkpoint=True)
    of_file = [*in_openvino, *others]
    return [torch, *of_file, inferencer] if torch_first else [*of_file, torch, inferencer]


def _openvino(path: Path, model: ov.Model, precision: str) -> Run:
    core = ov.Core()
    if (name := _CAPABILITIES[precision]) not in core.get_property("CPU", "OPTIMIZATION_CAPABILITIES"):
        message = f"this processor does not compute in {precision} ({name} is not among its capabilities)"
        raise NotHereError(message)
    whole = takes_bytes(model)
    read = core.read_model(path)
    shape = read.input(0).partial_shape
    shape[0] = 1
    read.reshape(shape)
    compiled = core.compile_model(read, "CPU", {"INFERENCE_PRECISION_HINT": precision})
    executed = compiled.get_property("INFERENCE_PRECISION_HINT").get_type_name()
    if executed != precision:
        message = f"OpenVINO computes in {executed} on this processor"
        raise NotHereError(message)
    highest = np.array(255 if bits_of(model) == 8 else 65535, np.uint8 if bits_of(model) == 8 else np.uint16)

    def run(pixels: NDArray[Any]) -> Result:
        if not whole:
            return result_of(compiled(tensor_of(pixels)))
        given = (pixels * highest).round().astype(highest.dtype) if pixels.dtype == np.float32 else pixels
        return result_of(compiled(given[None]))

    return run


def _onnxruntime(path: Path) -> Run:
    if path.suffix.lower() != ".onnx":
        message = "it takes .onnx files"
        raise NotHereError(message)
    _need("onnxruntime")
    import onnxruntime

    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    names, given = [output.name for output in session.get_outputs()], session.get_inputs()[0].name
    return lambda pixels: result_of(
        dict(zip(names, session.run(None, {given: tensor_of(pixels)}), strict=True))  # pyright: ignore[reportArgumentType]
    )


def _model_api(path: Path, model: ov.Model) -> Run:
    _need("model_api", "openvino-model-api")
    whole = takes_bytes(model)
    if bits_of(model) > 8 and not whole:
        message = "it takes images of 8 bits, unless the file is exported with camera_bytes"
        raise NotHereError(message)
    if not any("pred_label" in output.get_names() for output in model.outputs):
        message = "it takes files with a threshold"
        raise NotHereError(message)
    from model_api.adapters import OpenvinoAdapter, create_core  # pyright: ignore[reportMissingImports]
    from model_api.models import Model  # pyright: ignore[reportMissingImports]

    config = {"INFERENCE_PRECISION_HINT": "f32"}
    before = logging.root.manager.disable
    logging.disable(logging.INFO)  # it tells the root logger what it loads
    try:
        wrapper = Model.create_model(OpenvinoAdapter(create_core(), str(path), device="CPU", plugin_config=config))
    finally:
        logging.disable(before)

    def run(pixels: NDArray[Any]) -> Result:
        result: Any = wrapper(pixels if whole else np.ascontiguousarray(pixels[..., ::-1]))
        return Result(float(result.pred_score), result.pred_label == "True", None)  # its map is of bytes

    return run


def _openvino_inferencer(path: Path, model: ov.Model) -> Run:
    _need("anomalib")
    if takes_bytes(model):
        message = "it takes no files with camera bytes"
        raise NotHereError(message)
    from anomalib.deploy import OpenVINOInferencer

    with tempfile.TemporaryDirectory() as folder, _working_in(folder):  # it leaves a cache where it stands
        inferencer = OpenVINOInferencer(path.absolute(), "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    return lambda pixels: _of_attributes(inferencer.predict(tensor_of(pixels)))


def _torch(trained: Any) -> Run:
    if trained is None:
        message = "it takes the checkpoint, --checkpoint"
        raise NotHereError(message)
    import torch

    def run(pixels: NDArray[Any]) -> Result:
        with torch.inference_mode():
            return _of_attributes(trained(torch.from_numpy(tensor_of(pixels))))

    return run


def _torch_inferencer(trained: Any) -> Run:
    if trained is None:
        message = "it takes the checkpoint, --checkpoint"
        raise NotHereError(message)
    import torch
    from anomalib.deploy import TorchInferencer

    with tempfile.TemporaryDirectory() as folder, _trust():
        inferencer = TorchInferencer(trained.to_torch(folder), "cpu")
    return lambda pixels: _of_attributes(inferencer.predict(torch.from_numpy(tensor_of(pixels))))


def _of_attributes(found: Any) -> Result:
    return result_of({name: value for name, value in _parts_of(found) if value is not None})


def _parts_of(found: Any) -> Iterator[tuple[str, Any]]:
    """A result's parts, by anomalib's names."""
    for name in ("pred_score", "pred_label", "anomaly_map", "pred_mask"):
        value = getattr(found, name)
        yield name, None if value is None else np.asarray(value)


def _need(module: str, package: str | None = None) -> None:
    if find_spec(module) is None:
        message = f"not installed: pip install {package or module}"
        raise NotHereError(message)


@contextmanager
def _working_in(folder: str) -> Iterator[None]:
    before = Path.cwd()
    os.chdir(folder)
    try:
        yield
    finally:
        os.chdir(before)


@contextmanager
def _trust() -> Iterator[None]:
    """Let anomalib read the pickle that was written a moment ago."""
    before = os.environ.get("TRUST_REMOTE_CODE")
    os.environ["TRUST_REMOTE_CODE"] = "1"
    try:
        yield
    finally:
        os.environ.pop("TRUST_REMOTE_CODE")
        if before is not None:
            os.environ["TRUST_REMOTE_CODE"] = before
