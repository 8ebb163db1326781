"""What a run takes from its images before the first step."""

__all__ = ["prepare"]

import logging
from typing import TYPE_CHECKING, Any

import torch
from torch.utils.data import DataLoader

from cflow_plugin.images.loading import images_in, loader_of
from cflow_plugin.model import weights
from cflow_plugin.model.quantized import measure_ranges
from cflow_plugin.training.feature_bank import FeatureBank
from cflow_plugin.training.interest import set_interest
from cflow_plugin.training.summary import describe_run
from cflow_plugin.training.vector_loader import VectorLoader

if TYPE_CHECKING:
    from cflow_plugin.training.lightning_model import CflowPlugin

logger = logging.getLogger(__name__)

_IMAGES = 100  # for ranges: the greatest value of more is hardly greater


def prepare(model: "CflowPlugin", images: DataLoader[Any]) -> VectorLoader:
    """Find out what is trained on: feature vectors of the images, but for those held out for the thresholds.

    Before the first step the encoder's weights are loaded, unless a restored model has brought its own, the region of
    interest is found, and an 8-bit encoder's ranges are measured; when the features are there, the Gaussians are fitted
    that training starts from.

    Args:
        model: The model, with its trainer.
        images: Loader of training images.

    Raises:
        CflowError: If there are no weights, or too few images for the rate, or a resumed run would hold out what it has
            seen.
    """
    settings, progress = model.hparams, model.progress
    # Here: to plan its steps Lightning asks for the loader before it says that the run begins.
    if model.model.encoder.source is None:
        model.model.encoder.check_size(settings["image_size"])
        weights.load(model.model.encoder, settings["weights"], settings["pre_trained"])
    seed = progress.seed_of(model.trainer)
    if not (begun := progress.training_has_begun):
        set_interest(model, images)
    loader = VectorLoader(
        model.reference.hold_out(images, model.post_processor, model.trainer, seed, begun),
        model.features,
        lambda bank: _fit_gaussians(model, bank, loader),
        lambda: model.current_epoch,
        steps=settings["steps_per_epoch"],
        vectors_per_step=settings["vectors_per_step"],
        with_noise=settings["noise"] > 0,
        seed=seed,
        unseen_share=settings["unseen_share"],
        rank=model.global_rank,
        processes=model.trainer.world_size,
        interest=model.model.scoring.interest,
        one_by_one=model.model.tile_size is not None,
    )
    if settings["encoder_precision"] == "int8" and not begun:
        _measure_encoder(model, loader.images)
    logger.info(describe_run(model, model.model, images_in(loader.images)))
    model.calibration.begin(loader, model.reference.loader, lambda images: model.scored(model.prepared(images)))
    return loader


@torch.no_grad()
def _measure_encoder(model: "CflowPlugin", images: DataLoader[Any]) -> None:
    """Show images to an encoder that computes in 8 bits."""
    count = images_in(images)
    chosen = list(range(0, count, -(-count // _IMAGES)))
    logger.info("Measuring the ranges of the encoder's layers on %d training images.", len(chosen))
    with measure_ranges(model.model.encoder):
        for batch in loader_of(images.dataset, like=images, sampler=chosen, batch_size=1):
            model.features(batch.image)


def _fit_gaussians(model: "CflowPlugin", bank: FeatureBank, loader: VectorLoader) -> None:
    """Start from the features' covariance, once a run."""
    settings = model.hparams
    if model.progress.training_has_begun:
        return
    model.model.whole.fit(bank.means)
    if settings["whiten"]:
        gain = getattr(model.pre_processor, "gain", 1.0)
        changes = loader.changes(settings["image_size"], settings["camera_variation"], gain)
        model.model.fit_whitening([features.flatten(0, 1) for features in bank.features], changes)
    model.progress.training_has_begun = True
