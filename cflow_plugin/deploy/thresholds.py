"""Thresholds of a compressed model: of its own scores, from the images that set those of the trained one."""

__all__ = ["threshold_images", "thresholds_of"]

import logging
from copy import deepcopy
from typing import TYPE_CHECKING, Any, cast

import openvino as ov
import torch
from anomalib.data import AnomalibDataModule, InferenceBatch
from anomalib.models.components import AnomalibModule
from anomalib.post_processing import PostProcessor
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms.v2.functional import resize

from cflow_plugin.decisions.post_processing import ConformalPostProcessor
from cflow_plugin.deploy.fingerprint import size_of
from cflow_plugin.errors import CflowError

if TYPE_CHECKING:
    from collections.abc import Sized

    from cflow_plugin.decisions.reference_images import ReferenceImages

logger = logging.getLogger(__name__)


def threshold_images(model: AnomalibModule, datamodule: AnomalibDataModule | None) -> Dataset[Any] | None:
    """The images that a trained model's thresholds come from.

    Args:
        model: A trained :class:`~cflow_plugin.CflowPlugin`.
        datamodule: The data it was trained on, if they are given.

    Returns:
        The reference images, or the validation images where thresholds maximise F1, or ``None`` without thresholds.

    Raises:
        CflowError: If they are not at hand.
    """
    processor = model.post_processor
    if not isinstance(processor, PostProcessor) or bool(torch.isnan(processor.image_threshold)):
        return None
    if datamodule is not None:
        datamodule.prepare_data()
        datamodule.setup("fit")
    if isinstance(processor, ConformalPostProcessor) and processor.is_conformal:
        reference = cast("ReferenceImages", model.reference)
        return reference.find_again(datamodule, len(processor.reference_scores))
    images = getattr(datamodule, "val_data", None)
    if images is None:
        msg = (
            "A compressed model has other scores, so its thresholds are set anew, by the validation images that set "
            "those of the trained one: pass the data it was trained on with --data."
        )
        raise CflowError(msg)
    return images


def thresholds_of(model: ov.Model, trained: AnomalibModule, images: Dataset[Any]) -> PostProcessor:
    """Set thresholds, and what goes with them, anew by a converted model's scores.

    Args:
        model: A converted model with outputs ``pred_score`` and ``anomaly_map``, neither of them normalised.
        trained: What it was made of.
        images: What :func:`threshold_images` returned.

    Returns:
        The trained model's post-processor with the converted model's thresholds, normalisation and reference scores.
    """
    processor = deepcopy(cast("PostProcessor", trained.post_processor)).cpu()
    compiled = ov.Core().compile_model(model, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    size = size_of(model)
    logger.info("Scoring %d images with the compressed model for its thresholds.", len(cast("Sized", images)))
    scores, maxima = [], []
    for batch in DataLoader(images, batch_size=1, collate_fn=_collate_of(images)):
        image = batch.image if size is None else resize(batch.image, list(size), antialias=True)
        found = compiled(image.numpy())
        result = InferenceBatch(
            pred_score=torch.from_numpy(found["pred_score"]), anomaly_map=torch.from_numpy(found["anomaly_map"])
        )
        scores.append(result.pred_score)
        if _is_conformal(processor):
            levels = cast("ConformalPostProcessor", processor).levels
            maxima.append(levels(cast("torch.Tensor", result.anomaly_map)))
        else:
            transform: Any = getattr(trained.pre_processor, "transform", None)
            if batch.gt_mask is not None and transform is not None:
                _, batch.gt_mask = transform(batch.image, batch.gt_mask)
            processor.on_validation_batch_end(cast("Any", None), trained, batch.update(**result._asdict()))
    if _is_conformal(processor):
        cast("ConformalPostProcessor", processor).calibrate(torch.cat(scores), torch.cat(maxima))
    else:
        processor.on_validation_epoch_end(cast("Any", None), trained)
    return processor


def _collate_of(images: Any) -> Any:
    """How a data set, or a part of one, makes batches."""
    while not hasattr(images, "collate_fn"):
        images = images.datasets[0] if hasattr(images, "datasets") else images.dataset
    return images.collate_fn


def _is_conformal(processor: PostProcessor) -> bool:
    return isinstance(processor, ConformalPostProcessor) and processor.is_conformal
