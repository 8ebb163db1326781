"""An exported model, ready for pictures as OpenCV reads them."""

__all__ = ["compile_exported", "read_exported"]

from pathlib import Path
from typing import Any, Literal

import openvino as ov
from openvino.preprocess import ColorFormat, PrePostProcessor, ResizeAlgorithm

from cflow_plugin.errors import CflowError


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
        message = (
            f"{path} gives {', '.join(sorted(outputs))} and no decision; a model exported with a threshold is needed. "
            "Train it with --model.target_false_alarm_rate, or with good and defective images to validate on."
        )
        raise CflowError(message)
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
        prepare.resize(ResizeAlgorithm.RESIZE_BILINEAR_PILLOW)
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
