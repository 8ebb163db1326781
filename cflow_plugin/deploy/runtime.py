"""An exported model, ready for pictures as OpenCV reads them."""

__all__ = [
    "BITS",
    "ENCODER_KEY",
    "ExportedModel",
    "bits_of",
    "compile_exported",
    "encoder_of",
    "note_of",
    "read_exported",
    "read_file",
]

import json
import threading
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import openvino as ov

from cflow_plugin.decisions.region_files import REGIONS_KEY, region_settings_of
from cflow_plugin.decisions.regions import RegionSettings
from cflow_plugin.deploy.openvino_input import take_bytes, take_other_sizes, takes_bytes
from cflow_plugin.errors import CflowError

BITS = "cflow_plugin_bits"
"""Under this name an exported file has the number of bits of a value in the images that it was trained on."""


@dataclass(frozen=True)
class ExportedModel:
    """A compiled model, and what its images have to be. Several threads may call it at once.

    Attributes:
        compiled: Takes images as :func:`read_exported` says.
        bits: Bits of a value in them.
        regions: Which regions are shown, and by which levels they have p-values.
    """

    compiled: ov.CompiledModel
    bits: int
    regions: RegionSettings
    _requests: threading.local = field(default_factory=threading.local, init=False, repr=False, compare=False)

    def __call__(self, inputs: Any) -> Any:
        """Score images.

        Args:
            inputs: A list with one array ``(1, H, W, 3)``, blue first: bytes, or 16-bit values where ``bits`` is above
                8.

        Returns:
            OpenVINO's results, by ``"pred_score"``, ``"pred_label"``, ``"anomaly_map"`` and ``"pred_mask"``.
        """
        # A request of each thread's own: OpenVINO's single one would be busy, or give another image's results.
        if not hasattr(self._requests, "own"):
            self._requests.own = self.compiled.create_infer_request()
        return self._requests.own.infer(inputs, share_inputs=True)


ENCODER_KEY = "cflow_plugin_encoder"
"""Under this name an exported file says what its encoder is and what input it takes, as JSON."""


def encoder_of(model: ov.Model) -> dict[str, Any]:
    """What an exported file says of its encoder: backbone, layers, where the weights are from, and the input it takes.

    Args:
        model: As OpenVINO has read it from an .xml or .onnx file.

    Returns:
        Nothing where it is of another model.
    """
    return json.loads(note_of(model, ENCODER_KEY) or "{}")


def note_of(model: ov.Model, key: str) -> str | None:
    """What a file says under a key.

    Args:
        model: As OpenVINO has read it from an .xml or .onnx file.
        key: The key; a path's parts are divided by spaces.
    """
    for place in (key.split(), ["framework", key]):  # of an .xml file, of an .onnx file
        if model.has_rt_info(place):
            return model.get_rt_info(place).astype(str)
    return None


def read_file(path: Path) -> tuple[ov.Model, set[str]]:
    """Read an exported file as it is.

    Args:
        path: The .xml (or .onnx) file that ``anomalib export`` wrote.

    Returns:
        The model, and the names of its outputs.

    Raises:
        CflowError: If there is no such file, or it cannot be read.
    """
    if not path.is_file():
        message = f"There is no exported model at {path}; `anomalib export --model CflowPlugin` writes one."
        raise CflowError(message)
    try:
        core = ov.Core()
        # A file that is mapped into memory and overwritten, by another export, would end the process.
        core.set_property({"ENABLE_MMAP": False})
        model = core.read_model(path)
        return model, {name for output in model.outputs for name in output.get_names()}
    except RuntimeError as error:
        message = f"{path} could not be read as an OpenVINO or ONNX model."
        raise CflowError(message) from error


def read_exported(path: Path) -> ov.Model:
    """Read a model that takes ``(1, H, W, 3)``, bytes, blue first, of any size.

    A model of images with more than 8 bits a value takes them as 16-bit values, in their files' own scale.

    Args:
        path: The .xml (or .onnx) file that ``anomalib export`` wrote.

    Returns:
        A model with outputs ``pred_score``, ``pred_label`` and ``anomaly_map``.

    Raises:
        CflowError: If there is no such file, or it holds another kind of model.
    """
    model, outputs = read_file(path)
    if not {"pred_score", "pred_label", "anomaly_map"} <= outputs:
        message = (
            f"{path} gives {', '.join(sorted(outputs))} and no decision; a model exported with a threshold is needed. "
            "Train it with --model.target_false_alarm_rate, or with good and defective images to validate on."
        )
        raise CflowError(message)
    encoder = encoder_of(model)
    shape = model.input(0).partial_shape
    # One image at a time. With a batch of any size OpenVINO 2026.4 compiles some models wrongly for several streams: a
    # quarter of all compilations of one with the filter bank, none of one with ResNet-18.
    shape[0] = 1
    model.reshape(shape)
    bytes_already = takes_bytes(model)
    if shape[1 if bytes_already else 2].is_static:
        take_other_sizes(model, encoder.get("interpolation", "bilinear"))
    if not bytes_already:
        take_bytes(model, bits_of(model))
    return model


def bits_of(model: ov.Model) -> int:
    """Bits of a value in the images that a model was trained on.

    Args:
        model: An exported model, as OpenVINO reads it.
    """
    return int(note_of(model, BITS) or 8)


def compile_exported(
    path: Path,
    device: str,
    precision: str,
    hint: Literal["LATENCY", "THROUGHPUT"] = "LATENCY",
    threads: int | None = None,
) -> ExportedModel:
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
    model = read_exported(path)
    regions = region_settings_of(note_of(model, REGIONS_KEY))
    return ExportedModel(ov.Core().compile_model(model, device, settings), bits_of(model), regions)
