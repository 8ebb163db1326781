"""A trained model as an ONNX or OpenVINO graph, pre- and post-processing included."""

__all__ = [
    "InferenceGraph",
    "convert_to_openvino",
    "fix_batch",
    "free_dimensions",
    "with_decisions",
]

from copy import deepcopy
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
from torch import nn

from cflow_plugin.deploy.eight_bits import openvino_extensions
from cflow_plugin.deploy.openvino_input import take_other_sizes
from cflow_plugin.deploy.resizing import ExactResize, exportable
from cflow_plugin.errors import CflowError
from cflow_plugin.images.pre_processing import CflowPreProcessor
from cflow_plugin.model.folded import FoldedModel

if TYPE_CHECKING:
    from cflow_plugin.model.torch_model import CflowModel

_RAW = ("pred_score", "anomaly_map")


class InferenceGraph(ExportMixin, LightningModule):  # pyright: ignore[reportIncompatibleVariableOverride, reportIncompatibleMethodOverride]  as in anomalib's own modules
    """What goes into a file: pre-processing, the folded model, post-processing, and nothing of the training.

    Args:
        model: A trained :class:`~cflow_plugin.CflowPlugin`; it is copied.
        input_size: Height and width of the images that will be given to the file, or ``None`` where they may differ.

    Attributes:
        size: Height and width of the images that the resizing, the first step of the pre-processing, leaves.
        gain: What values are multiplied by, see :class:`~cflow_plugin.images.pre_processing.CflowPreProcessor`.
        resizes: Whether images may have another size before it. The graph's own resizing smooths as the trained model's
            does; anomalib leaves that out of what it exports.
        interpolation: How it resizes, ``bilinear`` or ``bicubic``.

    Raises:
        CflowError: If that size is not known, or the pre-processing holds what a file cannot do.
    """

    def __init__(self, model: AnomalibModule, input_size: tuple[int, int] | None = None) -> None:
        super().__init__()
        steps = exportable(getattr(model.pre_processor, "transform", None))
        first = steps[0] if steps else None
        size, self.interpolation = None, "bilinear"
        if isinstance(first, ExactResize) and len(first.size) == 2:
            size, self.interpolation = first.size, first.interpolation
        self.transform = nn.Sequential(*(steps if size is None else steps[1:]))
        if size is None and input_size is None:
            msg = "The model's pre-processing lets images keep their size; name the one to export for: --input_size."
            raise CflowError(msg)
        # The command line gives lists.
        given = None if input_size is None else (input_size[0], input_size[1])
        self.size = cast("tuple[int, int]", size or given)
        self.resizes = given != self.size
        self.resize = ExactResize(self.size, self.interpolation)
        pre_processor = model.pre_processor
        self.gain = pre_processor.gain if isinstance(pre_processor, CflowPreProcessor) else 1.0
        self.post_processor = _exportable(model.post_processor)
        whole = deepcopy(cast("CflowModel", model.model)).cpu().float().eval()
        prepared = self.transform(torch.zeros(1, 3, *self.size))
        self.model: FoldedModel = whole.folded((prepared.shape[-2], prepared.shape[-1]))  # pyright: ignore[reportIncompatibleVariableOverride]
        self.eval()

    def forward(self, images: torch.Tensor) -> InferenceBatch:
        """Images ``(B, 3, H, W)`` with values between 0 and 1 to anomalib's results."""
        if self.resizes:
            images = self.resize(images)
        if self.gain != 1:
            images = images * self.gain
        result = self.model(self.transform(images))
        return self.post_processor(result) if self.post_processor else result


def _exportable(post_processor: nn.Module | None) -> nn.Module | None:
    """A copy without what there are no thresholds and ranges for: some runtimes refuse a graph full of NaN."""
    copied = deepcopy(post_processor)
    if isinstance(copied, PostProcessor):
        copied.cpu().float()
        if torch.isnan(copied.image_threshold):
            copied.enable_thresholding = copied.enable_normalization = False
        if torch.isnan(torch.stack([copied.image_min, copied.pixel_min])).all():
            copied.enable_normalization = False
    return copied


class _Outputs(nn.Module):
    """Scores and maps as a plain tuple."""

    def __init__(self, inference: InferenceGraph) -> None:
        super().__init__()
        self.inference = inference

    def forward(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        result = self.inference(images)
        assert result.pred_score is not None
        assert result.anomaly_map is not None
        return result.pred_score, result.anomaly_map


class _Decisions(nn.Module):
    """Post-processing of scores and maps, its outputs as a plain tuple."""

    def __init__(self, post_processor: nn.Module) -> None:
        super().__init__()
        self.post_processor = post_processor

    def forward(self, pred_score: torch.Tensor, anomaly_map: torch.Tensor) -> tuple[torch.Tensor, ...]:
        result = self.post_processor(InferenceBatch(pred_score=pred_score, anomaly_map=anomaly_map))
        return tuple(value for value in result if value is not None)


def with_decisions(model: ov.Model, post_processor: nn.Module | None) -> ov.Model:
    """Add post-processing to a converted model.

    Args:
        model: What :func:`convert_to_openvino` returned, or a compressed form of it; not to be used any further.
        post_processor: anomalib's, or one derived from it.

    Returns:
        A model with outputs ``pred_score``, ``pred_label``, ``anomaly_map`` and ``pred_mask``, or the first and third
        of these where there is no threshold.
    """
    decisions = _exportable(post_processor)
    if decisions is None:
        return model
    score, anomaly_map = (model.output(name) for name in _RAW)
    size = anomaly_map.partial_shape
    example = (torch.zeros(2), torch.zeros(2, 1, size[2].get_length(), size[3].get_length()))
    with torch.no_grad():
        result = decisions(InferenceBatch(*[example[0], None, example[1], None]))
        free = torch.export.Dim("batch_size", max=2**31 - 1)
        program = torch.export.export(_Decisions(decisions), example, dynamic_shapes=[{0: free}] * 2, strict=False)
    added = ov.convert_model(program)
    for parameter, source in zip(added.get_parameters(), (score, anomaly_map), strict=True):
        parameter.output(0).replace(source.get_node().input_value(0))
    names = [name for name, value in result._asdict().items() if value is not None]
    for output, name in zip(added.outputs, names, strict=True):
        output.get_tensor().set_names({name})
    return ov.Model(added.get_results(), model.get_parameters(), "model")  # pyright: ignore[reportGeneralTypeIssues]  its stub


def convert_to_openvino(model: AnomalibModule, input_size: tuple[int, int] | None = None, **arguments: Any) -> ov.Model:
    """Convert a trained model to OpenVINO in full precision, without its decisions (see :func:`with_decisions`).

    Args:
        model: A trained :class:`~cflow_plugin.CflowPlugin`.
        input_size: Height and width of the images; ``None`` takes images of any size and resizes them in the graph.
        **arguments: More arguments of :func:`openvino.convert_model`; ``input=[1, 3, 256, 256]`` fixes the batch.

    Returns:
        The OpenVINO model, its batch dynamic unless fixed, with outputs ``pred_score`` and ``anomaly_map``, neither of
        them normalised.
    """
    inference = InferenceGraph(model, input_size)
    resizes, inference.resizes = inference.resizes, False
    inference.post_processor = None
    example = torch.zeros(2, 3, *inference.size)
    with torch.no_grad():
        free = free_dimensions(inference.size)
        program = torch.export.export(_Outputs(inference), (example,), dynamic_shapes=free, strict=False)
    converted = ov.convert_model(program, **{"extension": openvino_extensions(), **arguments})
    converted.inputs[0].get_tensor().set_names({"input"})
    converted.reshape([converted.input(0).partial_shape[0], 3, *inference.size])
    for output, name in zip(converted.outputs, _RAW, strict=True):
        output.get_tensor().set_names({name})
    if resizes:
        given = None if input_size is None else (input_size[0], input_size[1])
        take_other_sizes(converted, inference.interpolation, given)
    _keep_positions_in_parts(converted, inference.model)
    _name_matrix_products(converted, inference.model)
    return converted


def free_dimensions(input_size: tuple[int, int] | None, batch: int | None = None) -> tuple[dict[int, Any]]:
    """Which dimensions of the images ``(B, 3, H, W)`` an exported graph leaves open, as torch takes them.

    Args:
        input_size: Height and width where they are fixed.
        batch: Images at a time where that is fixed.
    """
    names = {} if batch else {0: "batch_size"}
    names |= {} if input_size else {2: "height", 3: "width"}
    # A bound, since torch 2.7 takes "any size" for one more than what it then checks for.
    return ({axis: torch.export.Dim(name, max=2**31 - 1) for axis, name in names.items()},)


def fix_batch(model: ov.Model, batch: int | None) -> None:
    """Give a converted model a batch of fixed size.

    Args:
        model: The model.
        batch: Images at a time; ``None`` leaves it open.
    """
    shape = model.input(0).partial_shape
    shape[0] = ov.Dimension() if batch is None else batch
    model.reshape(shape)


def _keep_positions_in_parts(converted: ov.Model, model: FoldedModel) -> None:
    """Undo the converter's adding up of each position's row and column part: in parts the file is far smaller."""
    wanted = [block for flow in model.flows for block in flow.blocks if block.rows.any() and block.position is not None]
    by_shape: dict[tuple[int, ...], list[ov.Node]] = {}
    for node in converted.get_ops():
        if node.get_type_name() == "Constant":
            by_shape.setdefault(tuple(size for size in node.shape if size != 1), []).append(node)
    for block in wanted:
        position = cast("torch.Tensor", block.position).numpy()
        for node in by_shape.get(position.shape, []):
            if np.allclose(np.asarray(node.data).reshape(position.shape), position, atol=1e-6):
                parts = operations.add(
                    operations.constant(block.rows.numpy()), operations.constant(block.columns.numpy())
                )
                whole = operations.reshape(parts, operations.constant(np.array(node.shape, dtype=np.int64)), False)
                node.output(0).replace(whole.output(0))


def _name_matrix_products(converted: ov.Model, model: FoldedModel) -> None:
    """Call the decoders' matrix products what the model calls them, ``flows.0.blocks.3.first`` for example.

    No name is given twice, as NNCF would then not know which is meant: in tiles a layer has a product in each, and the
    layers of several scales may be the same in a model that is not trained.
    """
    layers = {name: module.weight.numpy() for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    given = dict.fromkeys(layers, 0)
    for node in converted.get_ordered_ops():
        if node.get_type_name() != "MatMul":
            continue
        weight = node.input_value(1).get_node()
        if weight.get_type_name() != "Constant":
            continue
        shape, data = tuple(weight.shape), weight.data
        same = [name for name, value in layers.items() if value.shape == shape and np.array_equal(value, data)]
        if same:
            name = min(same, key=given.__getitem__)
            node.set_friendly_name(f"{name}.{given[name]}" if given[name] else name)
            given[name] += 1
