"""An exported model in fewer bits: what may be, and what ranges come from."""

__all__ = ["TrainingImages", "check_data", "compress", "quantize", "quantize_with_accuracy_control"]

import logging
import re
import tempfile
from collections.abc import Collection, Iterable, Iterator, Sequence
from copy import copy
from pathlib import Path
from types import ModuleType
from typing import Any, cast

import numpy as np
import openvino as ov
import torch
from anomalib.data import AnomalibDataModule, Batch, InferenceBatch
from anomalib.deploy import CompressionType
from anomalib.metrics import F1Score
from torch import nn
from torch.utils.data import DataLoader
from torchmetrics import Metric
from torchvision.transforms.v2.functional import resize

from cflow_plugin.deploy.fingerprint import size_of
from cflow_plugin.errors import CflowError

logger = logging.getLogger(__name__)


def check_data(kind: CompressionType, datamodule: AnomalibDataModule | None) -> AnomalibDataModule:
    """Raise if a compression needs data and has none.

    Args:
        kind: Which compression.
        datamodule: The data.

    Returns:
        The data, where they are needed.

    Raises:
        CflowError: If they are needed and not given.
    """
    if datamodule is None and kind in {CompressionType.INT8_PTQ, CompressionType.INT8_ACQ}:
        msg = f"{kind.value} is calibrated on training images: pass the data the model was trained on with --data."
        raise CflowError(msg)
    return cast("AnomalibDataModule", datamodule)


def compress(
    model: ov.Model,
    kind: CompressionType,
    datamodule: AnomalibDataModule | None = None,
    metric: Metric | None = None,
    max_drop: float = 0.01,
    post_processor: nn.Module | None = None,
    leave_out: Collection[str] = (),
) -> ov.Model:
    """Compress a converted model in one of anomalib's ways.

    Args:
        model: What :func:`convert_to_openvino` returned.
        kind: Which way.
        datamodule: Its training images calibrate INT8_PTQ and INT8_ACQ; its validation images measure the metric.
        metric: anomalib metric for INT8_ACQ, higher is better; by default the image F1 score.
        max_drop: How much of the metric INT8_ACQ may lose.
        post_processor: The trained model's, whose decisions a metric may be of.
        leave_out: Image files that ranges must not be taken from, since thresholds will be.

    Returns:
        The compressed model.

    Raises:
        CflowError: If NNCF cannot quantize the model.
    """
    if kind == CompressionType.FP16:
        return _halve(model)
    if kind == CompressionType.INT8:
        return _nncf().compress_weights(model)
    data = check_data(kind, datamodule)
    images = TrainingImages(data, size_of(model), leave_out=leave_out)
    logger.info("Calibrating INT8 on %d training images.", len(images))
    if kind == CompressionType.INT8_PTQ:
        return quantize(model, images)
    metric = metric or F1Score(fields=["pred_label", "gt_label"])
    return quantize_with_accuracy_control(model, images, data.val_dataloader(), metric, max_drop, post_processor)


class TrainingImages:
    """Training images one by one, without augmentation, as an exported model takes them.

    INT8 ranges must come from images like those the model will see, and from nothing the model is judged by; anomalib's
    own calibration reads its validation images, which by default are the test images.

    Args:
        datamodule: The data the model was trained on.
        size: Height and width that images are resized to, or ``None`` to keep theirs.
        limit: At most this many images, spread over the data set.
        leave_out: Files that are not taken, by their last three names; none is where nothing else is left.
    """

    def __init__(
        self,
        datamodule: AnomalibDataModule,
        size: tuple[int, int] | None = None,
        limit: int = 300,
        leave_out: Collection[str] = (),
    ) -> None:
        datamodule.prepare_data()
        datamodule.setup("fit")
        self.dataset = copy(datamodule.train_data)
        self.dataset.augmentations = None
        self.size = size
        left_out = {Path(file).parts[-3:] for file in leave_out}
        files = self.dataset.samples.image_path if left_out else []
        taken = [index for index, file in enumerate(files) if Path(file).parts[-3:] not in left_out]
        taken = np.array(taken or range(len(self.dataset)))
        self.indices = taken[np.unique(np.linspace(0, len(taken) - 1, limit).round().astype(int))].tolist()

    def __len__(self) -> int:
        return len(self.indices)

    def __iter__(self) -> Iterator[np.ndarray]:
        """Yield images ``(1, 3, H, W)``."""
        for index in self.indices:
            image = cast("torch.Tensor", self.dataset[index].image)[None]
            yield (image if self.size is None else resize(image, list(self.size), antialias=True)).numpy()


def quantize(model: ov.Model, images: TrainingImages | Sequence[np.ndarray]) -> ov.Model:
    """Quantize a converted model after training: the decoders' sub-networks compute in INT8.

    What else could be in INT8 must not be. The whitening in front of a decoder magnifies directions of little variance,
    and with them the rounding of its own input and of the encoder, whose first layers are the most sensitive; the maps
    are a few small products. The later half of the encoder's convolutions and linear layers keeps its weights in 8
    bits, and all that is left in 16, to be unpacked when the file is loaded.

    What computes in INT8 has weights of seven bits. A processor without VNNI adds two products up in 16 bits, which do
    not hold two of eight: scores would depend on the machine.

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
            subset_size=len(images),
            ignored_scope=_all_but_decoders(model),
            advanced_parameters=nncf.AdvancedQuantizationParameters(overflow_fix=nncf.OverflowFix.ENABLE),
        )
    except nncf.errors.InternalError as error:
        msg = f"NNCF cannot quantize a model with this encoder ({error}) Export it with --compression_type FP16."
        raise CflowError(msg) from error
    layers = _named(quantized, {"Convolution", "GroupConvolution", "MatMul"})
    products = set(_named(quantized, {"MatMul"}))
    encoder = [name for name in layers if name not in products or name.startswith("encoder.")]
    kept = [*encoder[: len(encoder) // 2], *sorted(products.difference(encoder))]
    return nncf.compress_weights(
        quantized, mode=nncf.CompressWeightsMode.INT8_ASYM, ignored_scope=nncf.IgnoredScope(names=kept, validate=False)
    )


def quantize_with_accuracy_control(
    model: ov.Model,
    images: TrainingImages | Sequence[np.ndarray],
    validation: DataLoader,
    metric: Metric,
    max_drop: float,
    post_processor: nn.Module | None = None,
) -> ov.Model:
    """Quantize to INT8, and give operations their full precision back until a metric stays within bounds.

    Args:
        model: What :func:`convert_to_openvino` returned.
        images: Training images, each ``(1, 3, H, W)``.
        validation: Labelled images to measure the metric on.
        metric: An anomalib metric; higher is better.
        max_drop: How much of the metric may be lost.
        post_processor: The trained model's, whose decisions the metric may be of.

    Returns:
        The quantized model.
    """
    nncf = _nncf()
    size = size_of(model)

    def measure(compiled: ov.CompiledModel, batches: Iterable[Batch]) -> float:
        metric.reset()
        for batch in batches:
            image = cast("torch.Tensor", batch.image)
            image = image if size is None else resize(image, list(size), antialias=True)
            results = compiled(image.numpy())
            found = InferenceBatch(
                pred_score=torch.from_numpy(results["pred_score"]), anomaly_map=torch.from_numpy(results["anomaly_map"])
            )
            found = post_processor(found) if post_processor is not None else found
            metric.update(batch.update(in_place=False, image=image, **found._asdict()))
        return float(metric.compute())

    return nncf.quantize_with_accuracy_control(
        model,
        nncf.Dataset(images),
        nncf.Dataset(validation),
        measure,
        max_drop=max_drop,
        subset_size=len(images),
        ignored_scope=_all_but_decoders(model),
        advanced_quantization_parameters=nncf.AdvancedQuantizationParameters(overflow_fix=nncf.OverflowFix.ENABLE),
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
    return _nncf().IgnoredScope(
        names=[name for name in names if not re.match(r"flows\.\d+\.blocks\.", name)], validate=False
    )
