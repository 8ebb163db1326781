"""A trained model as an ONNX or OpenVINO graph, pre- and post-processing included."""

__all__ = ["InferenceGraph", "convert_to_openvino", "free_dimensions", "note_in_onnx", "split_transform"]

import logging
from collections.abc import Mapping
from copy import deepcopy
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import openvino as ov
import torch
from anomalib.data import InferenceBatch
from anomalib.models.components import AnomalibModule
from anomalib.models.components.base.export_mixin import ExportMixin
from anomalib.post_processing import PostProcessor
from lightning import LightningModule
from openvino import opset13 as operations
from openvino.preprocess import PrePostProcessor
from torch import nn
from torch.nn import functional
from torchvision.transforms.v2 import Compose, InterpolationMode, Resize, Transform

from cflow_plugin.deploy.runtime import RESIZING
from cflow_plugin.errors import CflowError
from cflow_plugin.files import atomic_file
from cflow_plugin.model.folded import FoldedModel

if TYPE_CHECKING:
    from cflow_plugin.model.torch_model import CflowModel

logger = logging.getLogger(__name__)


class InferenceGraph(ExportMixin, LightningModule):  # pyright: ignore[reportIncompatibleVariableOverride, reportIncompatibleMethodOverride]  as in anomalib's own modules
    """What goes into a file: pre-processing, the folded model, post-processing, and nothing of the training.

    Args:
        model: A trained :class:`~cflow_plugin.CflowPlugin`; it is copied.
        input_size: Height and width of the images that will be given to the file, or ``None`` where they may differ.

    Attributes:
        size: Height and width of the images behind the pre-processing.
        resizes: Whether images may have another size before it. The graph's own resizing smooths as the trained model's
            does; anomalib leaves that out of what it exports.
        interpolation: How it resizes, ``bilinear`` or ``bicubic``.

    Raises:
        CflowError: If the size of the images behind the pre-processing is not known.
    """

    def __init__(self, model: AnomalibModule, input_size: tuple[int, int] | None = None) -> None:
        super().__init__()
        size, self.interpolation, self.transform = split_transform(getattr(model.pre_processor, "transform", None))
        if size is None and input_size is None:
            msg = "The model's pre-processing lets images keep their size; name the one to export for: --input_size."
            raise CflowError(msg)
        # The command line gives lists.
        given = None if input_size is None else (input_size[0], input_size[1])
        self.size = cast("tuple[int, int]", size or given)
        self.resizes = given != self.size
        self.post_processor = deepcopy(model.post_processor)
        if isinstance(self.post_processor, PostProcessor):
            ranges = torch.stack([self.post_processor.image_min, self.post_processor.pixel_min])
            if ranges.isnan().all():
                # Never validated: nothing is normalised, and a graph full of NaN is what some runtimes refuse.
                self.post_processor.enable_normalization = False
        whole = deepcopy(cast("CflowModel", model.model)).cpu().eval()
        self.model: FoldedModel = whole.folded(self.size)  # pyright: ignore[reportIncompatibleVariableOverride]
        self.eval()

    def forward(self, images: torch.Tensor) -> InferenceBatch:
        """Images ``(B, 3, H, W)`` with values between 0 and 1 to anomalib's results."""
        if self.resizes:
            mode = self.interpolation
            images = functional.interpolate(images, self.size, mode=mode, align_corners=False, antialias=True)
        result = self.model(self.transform(images) if self.transform else images)
        return self.post_processor(result) if self.post_processor else result


def split_transform(transform: Transform | None) -> tuple[tuple[int, int] | None, str, nn.Module | None]:
    """The size that a transform begins with resizing to, how it does, and the rest of it.

    Args:
        transform: A pre-processor's transform.

    Returns:
        Height and width, ``None`` where it does not resize; ``bilinear`` or ``bicubic``; what comes behind.

    Raises:
        CflowError: If it resizes by any other interpolation, which runtimes do not have.
    """
    parts: list[Any] = list(transform.transforms) if isinstance(transform, Compose) else [transform]
    size = parts[0].size if isinstance(parts[0], Resize) else None
    if size is None or len(size) != 2:
        return None, "bilinear", deepcopy(transform)
    interpolation = cast("InterpolationMode", parts[0].interpolation).value
    if interpolation not in RESIZING:
        msg = f"Only bilinear and bicubic resizing can be exported, and the model's pre-processing is {interpolation}."
        raise CflowError(msg)
    return (size[0], size[1]), interpolation, nn.Sequential(*map(deepcopy, parts[1:]))


class _Outputs(nn.Module):
    """The outputs that there are, as a plain tuple."""

    def __init__(self, inference: InferenceGraph) -> None:
        super().__init__()
        self.inference = inference

    def forward(self, images: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return tuple(value for value in self.inference(images) if value is not None)


def convert_to_openvino(model: AnomalibModule, input_size: tuple[int, int] | None = None, **arguments: Any) -> ov.Model:
    """Convert a trained model to OpenVINO in full precision.

    Args:
        model: A trained :class:`~cflow_plugin.CflowPlugin`.
        input_size: Height and width of the images; ``None`` takes images of any size and resizes them in the graph.
        **arguments: More arguments of :func:`openvino.convert_model`; ``input=[1, 3, 256, 256]`` fixes the batch.

    Returns:
        The OpenVINO model, its batch dynamic unless fixed.
    """
    inference = InferenceGraph(model, input_size)
    resizes, inference.resizes = inference.resizes, False
    example = torch.zeros(2, 3, *inference.size)
    with torch.no_grad():
        names = [name for name, value in inference(example)._asdict().items() if value is not None]
        free = free_dimensions(inference.size)
        program = torch.export.export(_Outputs(inference), (example,), dynamic_shapes=free, strict=False)
    converted = ov.convert_model(program, **arguments)
    converted.inputs[0].get_tensor().set_names({"input"})
    converted.reshape([converted.input(0).partial_shape[0], 3, *inference.size])
    for output, name in zip(converted.outputs, names, strict=True):
        output.get_tensor().set_names({name})
    if resizes:
        # OpenVINO has an operation for this, but none for torch's.
        steps = PrePostProcessor(converted)
        steps.input().model().set_layout(ov.Layout("NCHW"))
        tensor = steps.input().tensor().set_layout(ov.Layout("NCHW"))
        tensor.set_spatial_static_shape(*input_size) if input_size else tensor.set_spatial_dynamic_shape()
        steps.input().preprocess().resize(RESIZING[inference.interpolation])
        converted = steps.build()
    _keep_positions_in_parts(converted, inference.model)
    _name_matrix_products(converted, inference.model)
    return converted


def free_dimensions(input_size: tuple[int, int] | None) -> tuple[dict[int, Any]]:
    """Which dimensions of the images ``(B, 3, H, W)`` an exported graph leaves open, as torch takes them.

    Args:
        input_size: Height and width where they are fixed.
    """
    names = {0: "batch_size"} if input_size else {0: "batch_size", 2: "height", 3: "width"}
    # A bound, since torch 2.7 takes "any size" for one more than what it then checks for.
    return ({axis: torch.export.Dim(name, max=2**31 - 1) for axis, name in names.items()},)


def note_in_onnx(path: Path, notes: Mapping[str, str]) -> None:
    """Add notes to an ONNX file's metadata.

    Args:
        path: The file.
        notes: Texts by their keys; without any the file is left alone.
    """
    if not notes:
        return
    import onnx

    model = onnx.load(path, load_external_data=False)
    onnx.helper.set_model_props(model, {**{entry.key: entry.value for entry in model.metadata_props}, **notes})
    with atomic_file(path) as partial:
        onnx.save(model, partial)


def _keep_positions_in_parts(converted: ov.Model, model: FoldedModel) -> None:
    """Undo the converter's adding up of each position's row and column part: in parts the file is far smaller."""
    wanted = [block for flow in model.flows for block in flow.blocks if block.rows.any()]
    by_shape: dict[tuple[int, ...], list[ov.Node]] = {}
    for node in converted.get_ops():
        if node.get_type_name() == "Constant":
            by_shape.setdefault(tuple(size for size in node.shape if size != 1), []).append(node)
    for block in wanted:
        position = block.position.numpy()
        for node in by_shape.get(position.shape, []):
            if np.allclose(np.asarray(node.data).reshape(position.shape), position, atol=1e-6):
                parts = operations.add(
                    operations.constant(block.rows.numpy()), operations.constant(block.columns.numpy())
                )
                whole = operations.reshape(parts, operations.constant(np.array(node.shape, dtype=np.int64)), False)
                node.output(0).replace(whole.output(0))


def _name_matrix_products(converted: ov.Model, model: FoldedModel) -> None:
    """Call the decoders' matrix products what the model calls them, ``flows.0.blocks.3.first`` for example."""
    layers = {name: module.weight.numpy() for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    for node in converted.get_ops():
        if node.get_type_name() != "MatMul":
            continue
        weight = node.input_value(1).get_node()
        if weight.get_type_name() != "Constant":
            continue
        for name, value in layers.items():
            if value.shape == tuple(weight.shape) and np.array_equal(value, weight.data):
                node.set_friendly_name(name)
