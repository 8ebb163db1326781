"""A trained model as an ONNX or OpenVINO file, pre- and post-processing included."""

__all__ = [
    "InferenceGraph",
    "TrainingImages",
    "compress",
    "convert_to_openvino",
    "note_in_onnx",
    "quantize",
    "quantize_with_accuracy_control",
]

import logging
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from copy import copy, deepcopy
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import openvino as ov
import torch
from anomalib.data import AnomalibDataModule, Batch, InferenceBatch
from anomalib.deploy import CompressionType
from anomalib.metrics import F1Score
from anomalib.models.components.base.export_mixin import ExportMixin
from anomalib.post_processing import PostProcessor
from lightning import LightningModule
from openvino import opset13 as operations
from openvino.preprocess import PrePostProcessor, ResizeAlgorithm
from torch import nn
from torch.nn import functional
from torch.utils.data import DataLoader
from torchmetrics import Metric
from torchvision.transforms.v2 import Compose, Resize, Transform
from torchvision.transforms.v2.functional import resize

from cflow_plugin.errors import CflowError
from cflow_plugin.files import replacing
from cflow_plugin.folded import FoldedModel

logger = logging.getLogger(__name__)


class InferenceGraph(ExportMixin, LightningModule):
    """What goes into a file: pre-processing, the folded model, post-processing, and nothing of the training.

    Args:
        model: A trained :class:`~cflow_plugin.CflowPlugin`; it is copied.
        input_size: Height and width of the images that will be given to the file, or ``None`` where they may differ.

    Attributes:
        size: Height and width of the images behind the pre-processing.
        resizes: Whether images may have another size before it. The graph's own resizing smooths as the trained model's
            does; anomalib leaves that out of what it exports.

    Raises:
        CflowError: If the size of the images behind the pre-processing is not known.
    """

    def __init__(self, model: LightningModule, input_size: tuple[int, int] | None = None) -> None:
        super().__init__()
        size, self.transform = _split(getattr(model.pre_processor, "transform", None))
        if size is None and input_size is None:
            msg = "The model's pre-processing lets images keep their size; name the one to export for: --input_size."
            raise CflowError(msg)
        self.size = size or tuple(input_size)
        self.resizes = input_size is None or tuple(input_size) != self.size
        self.post_processor = deepcopy(model.post_processor)
        if isinstance(self.post_processor, PostProcessor):
            ranges = torch.stack([self.post_processor.image_min, self.post_processor.pixel_min])
            if ranges.isnan().all():
                # Never validated: nothing is normalised, and a graph full of NaN is what some runtimes refuse.
                self.post_processor.enable_normalization = False
        self.model: FoldedModel = deepcopy(model.model).cpu().eval().folded(self.size)
        self.eval()

    def forward(self, images: torch.Tensor) -> InferenceBatch:
        """Images ``(B, 3, H, W)`` with values between 0 and 1 to anomalib's results."""
        if self.resizes:
            images = functional.interpolate(images, self.size, mode="bilinear", align_corners=False, antialias=True)
        result = self.model(self.transform(images) if self.transform else images)
        return self.post_processor(result) if self.post_processor else result


def _split(transform: Transform | None) -> tuple[tuple[int, int] | None, nn.Module | None]:
    """The size that a transform begins with resizing to, and the rest of it."""
    first, *rest = transform.transforms if isinstance(transform, Compose) else [transform]
    if isinstance(first, Resize) and len(first.size) == 2:
        return (first.size[0], first.size[1]), nn.Sequential(*map(deepcopy, rest))
    return None, deepcopy(transform)


class _Outputs(nn.Module):
    """The outputs that there are, as a plain tuple."""

    def __init__(self, inference: InferenceGraph) -> None:
        super().__init__()
        self.inference = inference

    def forward(self, images: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return tuple(value for value in self.inference(images) if value is not None)


def convert_to_openvino(
    model: LightningModule, input_size: tuple[int, int] | None = None, **arguments: Any
) -> ov.Model:
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
        batch = ({0: torch.export.Dim("batch")},)
        program = torch.export.export(_Outputs(inference), (example,), dynamic_shapes=batch, strict=False)
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
        steps.input().preprocess().resize(ResizeAlgorithm.RESIZE_BILINEAR_PILLOW)
        converted = steps.build()
    _keep_positions_in_parts(converted, inference.model)
    _name_matrix_products(converted, inference.model)
    return converted


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
    with replacing(path) as passing:
        onnx.save(model, passing)


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
            if np.allclose(node.data.reshape(position.shape), position, atol=1e-6):
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


def compress(
    model: ov.Model,
    kind: CompressionType,
    datamodule: AnomalibDataModule | None = None,
    metric: Metric | None = None,
    max_drop: float = 0.01,
) -> ov.Model:
    """Compress a converted model in one of anomalib's ways.

    Args:
        model: What :func:`convert_to_openvino` returned.
        kind: Which way. FP16 changes nothing here: it is how the file is written.
        datamodule: Its training images calibrate INT8_PTQ and INT8_ACQ; its validation images measure the metric.
        metric: anomalib metric for INT8_ACQ, higher is better; by default the image F1 score.
        max_drop: How much of the metric INT8_ACQ may lose.

    Returns:
        The compressed model.

    Raises:
        CflowError: If NNCF cannot quantize the model.
    """
    if kind == CompressionType.FP16:
        return model
    if kind == CompressionType.INT8:
        return _nncf().compress_weights(model)
    images = TrainingImages(datamodule, _fixed_size(model))
    logger.info("Calibrating INT8 on %d training images.", len(images))
    if kind == CompressionType.INT8_PTQ:
        return quantize(model, images)
    metric = metric or F1Score(fields=["pred_label", "gt_label"])
    return quantize_with_accuracy_control(model, images, datamodule.val_dataloader(), metric, max_drop)


def _fixed_size(model: ov.Model) -> tuple[int, int] | None:
    """Height and width of the images that a model takes, or ``None`` where they may differ."""
    shape = model.input(0).partial_shape
    return None if shape[2].is_dynamic else (shape[2].get_length(), shape[3].get_length())


class TrainingImages:
    """Training images one by one, without augmentation, as an exported model takes them.

    INT8 ranges must come from images like those the model will see, and from nothing the model is judged by; anomalib's
    own calibration reads its validation images, which by default are the test images.

    Args:
        datamodule: The data the model was trained on.
        size: Height and width that images are resized to, or ``None`` to keep theirs.
        limit: At most this many images, spread over the data set.
    """

    def __init__(self, datamodule: AnomalibDataModule, size: tuple[int, int] | None = None, limit: int = 300) -> None:
        datamodule.prepare_data()
        datamodule.setup("fit")
        self.dataset = copy(datamodule.train_data)
        self.dataset.augmentations = None
        self.size = size
        self.indices = np.unique(np.linspace(0, len(self.dataset) - 1, limit).round().astype(int)).tolist()

    def __len__(self) -> int:
        return len(self.indices)

    def __iter__(self) -> Iterator[np.ndarray]:
        """Yield images ``(1, 3, H, W)``."""
        for index in self.indices:
            image = self.dataset[index].image[None]
            yield (image if self.size is None else resize(image, list(self.size), antialias=True)).numpy()


def quantize(model: ov.Model, images: Iterable[np.ndarray]) -> ov.Model:
    """Quantize a converted model after training: the decoders' sub-networks compute in INT8.

    What else could be in INT8 must not be. The whitening in front of a decoder magnifies directions of little variance,
    and with them the rounding of its own input and of the encoder, whose first layers are the most sensitive; the maps
    are a few small products. The later half of the encoder's convolutions keeps its weights in 8 bits, and all that is
    left in 16, to be unpacked when the file is loaded.

    Args:
        model: What :func:`convert_to_openvino` returned.
        images: Training images, each ``(1, 3, H, W)``.

    Returns:
        The quantized model.

    Raises:
        CflowError: If NNCF cannot quantize it.
    """
    nncf = _nncf()
    try:
        model = _halve(model)
        quantized = nncf.quantize(
            model,
            nncf.Dataset(images),
            preset=nncf.QuantizationPreset.MIXED,
            subset_size=sum(1 for _ in images),
            ignored_scope=_all_but_decoders(model),
        )
    except nncf.errors.InternalError as error:
        # Seen with the coarsest scale of the Gabor filter bank.
        msg = f"NNCF cannot quantize a model with this encoder ({error}) Export it with --compression_type fp16."
        raise CflowError(msg) from error
    convolutions = _named(quantized, {"Convolution", "GroupConvolution"})
    kept = [*convolutions[: len(convolutions) // 2], *_named(quantized, {"MatMul"})]
    return nncf.compress_weights(
        quantized, mode=nncf.CompressWeightsMode.INT8_ASYM, ignored_scope=nncf.IgnoredScope(names=kept, validate=False)
    )


def quantize_with_accuracy_control(
    model: ov.Model, images: Iterable[np.ndarray], validation: DataLoader, metric: Metric, max_drop: float
) -> ov.Model:
    """Quantize to INT8, and give operations their full precision back until a metric stays within bounds.

    Args:
        model: What :func:`convert_to_openvino` returned.
        images: Training images, each ``(1, 3, H, W)``.
        validation: Labelled images to measure the metric on.
        metric: An anomalib metric; higher is better.
        max_drop: How much of the metric may be lost.

    Returns:
        The quantized model.
    """
    nncf = _nncf()
    size = _fixed_size(model)

    def measure(compiled: ov.CompiledModel, batches: Iterable[Batch]) -> float:
        metric.reset()
        for batch in batches:
            image = batch.image if size is None else resize(batch.image, list(size), antialias=True)
            results = compiled(image.numpy())
            found = {
                name: torch.from_numpy(results[name])
                for name in ("pred_score", "pred_label", "anomaly_map", "pred_mask")
            }
            metric.update(batch.update(in_place=False, image=image, **found))
        return float(metric.compute())

    return nncf.quantize_with_accuracy_control(
        model,
        nncf.Dataset(images),
        nncf.Dataset(validation),
        measure,
        max_drop=max_drop,
        subset_size=sum(1 for _ in images),
        ignored_scope=_all_but_decoders(model),
    )


def _halve(model: ov.Model) -> ov.Model:
    """Keep constants in half precision. A model with weights in 8 bits can no longer be saved that way."""
    core = ov.Core()
    core.set_property({"ENABLE_MMAP": False})
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "model.xml"
        ov.save_model(model, file, compress_to_fp16=True)
        return core.read_model(file)


def _nncf() -> ModuleType:
    # Imported here: it takes seconds, and only INT8 needs it.
    import nncf

    logging.getLogger("nncf").setLevel(logging.WARNING)
    return nncf


def _named(model: ov.Model, types: set[str]) -> list[str]:
    """The names of all operations of these types, in the order of execution."""
    return [node.get_friendly_name() for node in model.get_ordered_ops() if node.get_type_name() in types]


def _all_but_decoders(model: ov.Model) -> Any:
    """The operations that INT8 must leave alone: all but the matrix products of the coupling blocks."""
    names = [node.get_friendly_name() for node in model.get_ops()]
    return _nncf().IgnoredScope(names=[name for name in names if ".blocks." not in name], validate=False)
