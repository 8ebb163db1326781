"""An exported model, ready for pictures as OpenCV reads them."""

__all__ = ["ENCODER_KEY", "RESIZING", "compile_exported", "encoder_of", "read_exported"]

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import openvino as ov
from openvino.preprocess import ColorFormat, PrePostProcessor, ResizeAlgorithm

from cflow_plugin.errors import CflowError

ENCODER_KEY = "cflow_plugin_encoder"
"""Under this name an exported file says what its encoder is and what input it takes, as JSON."""

RESIZING: Mapping[str, ResizeAlgorithm] = {
    "bilinear": ResizeAlgorithm.RESIZE_BILINEAR_PILLOW,
    "bicubic": ResizeAlgorithm.RESIZE_BICUBIC_PILLOW,
}
"""OpenVINO's operations that smooth what they reduce, as torch's do, by their names in torch."""


def encoder_of(model: ov.Model) -> dict[str, Any]:
    """What an exported file says of its encoder: backbone, layers, where the weights are from, and the input it takes.

    Args:
        model: As OpenVINO has read it from an .xml or .onnx file.

    Returns:
        Nothing where it is of another model or an older release.
    """
    for path in ([ENCODER_KEY], ["framework", ENCODER_KEY]):  # of an .xml file, of an .onnx file
        if model.has_rt_info(path):
            return json.loads(model.get_rt_info(path).astype(str))
    return {}


def read_exported(path: Path) -> ov.Model:
    """Read a model that takes ``(1, H, W, 3)``, bytes, blue first, of any size.

    Args:
        path: The .xml (or .onnx) file that ``anomalib export`` wrote.

    Returns:
        A model with outputs ``pred_score``, ``pred_label`` and ``anomaly_map``.

    Raises:
        CflowError: If there is no such file, or it holds another kind of model.
    """
    if not path.is_file():
        message = f"There is no exported model at {path}; `anomalib export --model CflowPlugin` writes one."
        raise CflowError(message)
    try:
        model = ov.Core().read_model(path)
        outputs = {name for output in model.outputs for name in output.get_names()}
    except RuntimeError as error:
        message = f"{path} could not be read as an OpenVINO or ONNX model."
        raise CflowError(message) from error
    if not {"pred_score", "pred_label", "anomaly_map"} <= outputs:
        message = f"{path} gives {', '.join(sorted(outputs))}; a model exported by anomalib with thresholds is needed."
        raise CflowError(message)
    encoder = encoder_of(model)
    shape = model.input(0).partial_shape
    # One image at a time. With a batch of any size OpenVINO 2026.4 compiles some models wrongly for several streams: a
    # quarter of all compilations of one with the filter bank, none of one with ResNet-18.
    shape[0] = 1
    model.reshape(shape)
    steps = PrePostProcessor(model)
    tensor = steps.input().tensor()
    tensor.set_element_type(ov.Type.u8).set_layout(ov.Layout("NHWC")).set_color_format(ColorFormat.BGR)
    steps.input().model().set_layout(ov.Layout("NCHW"))
    prepare = steps.input().preprocess()
    prepare.convert_element_type(ov.Type.f32).convert_color(ColorFormat.RGB).scale(255.0)
    if shape[2].is_static:
        tensor.set_spatial_dynamic_shape()
        prepare.resize(RESIZING[encoder.get("interpolation", "bilinear")])
    return steps.build()


def compile_exported(
    path: Path,
    device: str,
    precision: str,
    hint: Literal["LATENCY", "THROUGHPUT"] = "LATENCY",
    threads: int | None = None,
) -> ov.CompiledModel:
    """Read a model and compile it.

    Args:
        path: As for :func:`read_exported`.
        device: OpenVINO device.
        precision: What is computed in where the model is not INT8.
        hint: One image as fast as possible, or many at once.
        threads: CPU threads; by default all.
    """
    settings: dict[str, Any] = {"INFERENCE_PRECISION_HINT": precision, "PERFORMANCE_HINT": hint}
    if threads is not None and device == "CPU":
        # Several workers on a machine would otherwise be pinned to the same first cores.
        settings |= {"INFERENCE_NUM_THREADS": threads, "ENABLE_CPU_PINNING": False}
    return ov.Core().compile_model(read_exported(path), device, settings)
