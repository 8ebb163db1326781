"""What is set when training ends: scoring constants from good features, thresholds from reference images."""

__all__ = ["Calibration", "log_likelihoods_of", "scores_of"]

import logging
from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from anomalib.data import InferenceBatch
from anomalib.models.components import AnomalibModule
from lightning.pytorch.trainer.states import TrainerFn
from torch.utils.data import DataLoader

from cflow_plugin.decisions.post_processing import ConformalPostProcessor
from cflow_plugin.images.loading import images_in
from cflow_plugin.model.torch_model import CflowModel
from cflow_plugin.training.feature_bank import FeatureBank
from cflow_plugin.training.vector_loader import VectorLoader

logger = logging.getLogger(__name__)

# The scoring constants are means and quantiles over all positions of this many training images, whose sampling error is
# far below their effect. A model still in training makes do with fewer: they serve if the run is cut off there.
_IMAGES = 128
_INTERIM_IMAGES = 4


class Calibration:
    """Sets the scoring constants after each epoch, and the thresholds at the end of training, once a step."""

    def __init__(self) -> None:
        self._step = -1
        self.end()

    @property
    def bank(self) -> FeatureBank | None:
        """The features, once there are any."""
        return None if self.vectors is None else self.vectors.bank

    def begin(
        self,
        vectors: VectorLoader,
        reference: DataLoader[Any] | None,
        score: Callable[[torch.Tensor], InferenceBatch],
    ) -> None:
        """Take note of what a run calibrates on.

        Args:
            vectors: What is trained on.
            reference: Loader of the reference images, or ``None`` where no false-alarm rate is kept.
            score: See :func:`scores_of`.
        """
        self.vectors, self.reference, self._score = vectors, reference, score

    def end(self) -> None:
        """Let go of features and images."""
        self.vectors: VectorLoader | None = None
        self.reference: DataLoader[Any] | None = None
        self._score: Callable[[torch.Tensor], InferenceBatch] | None = None

    def before_validation(self, module: AnomalibModule) -> None:
        """Set constants and thresholds before validation scores anything and writes a checkpoint.

        Args:
            module: The model in training.
        """
        if module.trainer.state.fn == TrainerFn.FITTING:
            self._set_constants(module, _IMAGES)
            self._set_thresholds(module)
            self._step = module.global_step

    def after_epoch(self, module: AnomalibModule) -> None:
        """Set the constants, and when training ends the thresholds, before a checkpoint is written.

        Args:
            module: The model in training.
        """
        if self._step == module.global_step:
            return
        trainer = module.trainer
        ended = module.current_epoch + 1 == trainer.max_epochs or module.global_step == trainer.max_steps
        if trainer.should_stop or ended:
            self._set_constants(module, _IMAGES)
            self._set_thresholds(module)
            return
        self._set_constants(module, _INTERIM_IMAGES)
        if isinstance(module.post_processor, ConformalPostProcessor) and module.post_processor.is_conformal:
            module.post_processor.forget()

    def _set_constants(self, module: AnomalibModule, images: int) -> None:
        if self.vectors is not None and self.vectors.bank is not None:
            model = cast("CflowModel", module.model)
            bank, seed = self.vectors.bank, self.vectors.seed
            unseen = bank.unseen_features
            model.calibrate(
                log_likelihoods_of(bank, bank.features, model, images, seed),
                log_likelihoods_of(bank, unseen, model, images, seed) if len(unseen[0]) else None,
            )

    def _set_thresholds(self, module: AnomalibModule) -> None:
        if self.reference is None or self._score is None:
            return
        training = module.model.training
        module.model.eval()
        logger.info("Scoring %d good images for the thresholds.", images_in(self.reference))
        scores, maxima = scores_of(self.reference, self._score)
        module.model.train(training)
        cast("ConformalPostProcessor", module.post_processor).calibrate(scores, maxima)


@torch.no_grad()
def log_likelihoods_of(
    bank: FeatureBank, features: Sequence[torch.Tensor], model: CflowModel, images: int, seed: int
) -> list[torch.Tensor]:
    """Log-likelihoods of some images' features, for :meth:`CflowModel.calibrate`.

    Args:
        bank: Knows the features' positions.
        features: Its features, of images that are trained on or of the others.
        model: The model.
        images: Number of images, drawn at random.
        seed: Seed of the draw.

    Returns:
        For each scale ``(N, H_k, W_k)``, nats per dimension; NaN at positions that the bank does not keep.
    """
    result = []
    chosen = torch.randperm(len(features[0]), generator=torch.Generator().manual_seed(seed))[:images]
    for decoder, vectors, positions, size in zip(model.decoders, features, bank.positions, bank.sizes, strict=True):
        condition = model.condition(*size, vectors)[positions]
        likelihood = vectors.new_full((len(chosen), size[0] * size[1]), float("nan"))
        for row, image in enumerate(chosen):
            likelihood[row, positions] = decoder.log_likelihood(vectors[image], condition)
        result.append(likelihood.unflatten(1, size))
    return result


@torch.no_grad()
def scores_of(
    images: DataLoader[Any], score: Callable[[torch.Tensor], InferenceBatch]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Score images as new ones would be.

    Args:
        images: Loader of images.
        score: Images ``(B, 3, H, W)`` as they are loaded to scores and maps, before post-processing.

    Returns:
        The image scores, and the highest values of the maps, both ``(N,)``.
    """
    scores, maxima = [], []
    for batch in images:
        result = score(batch.image)
        scores.append(result.pred_score)
        maxima.append(cast("torch.Tensor", result.anomaly_map).flatten(1).amax(1))
    return torch.cat(scores), torch.cat(maxima)
