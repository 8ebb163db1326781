"""What is set when training ends: scoring constants from good features, thresholds from reference images."""

__all__ = ["Calibration", "log_likelihoods_of", "scores_of"]

import logging
import os
import sys
from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from anomalib.data import InferenceBatch
from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.exceptions import SIGTERMException
from torch.utils.data import DataLoader

from cflow_plugin.decisions.conformal import odd_one
from cflow_plugin.decisions.post_processing import ConformalPostProcessor
from cflow_plugin.images.loading import images_in
from cflow_plugin.model.folded import in_full_precision
from cflow_plugin.model.torch_model import CflowModel
from cflow_plugin.training.checkpoints import complete_checkpoints, write_checkpoints
from cflow_plugin.training.feature_bank import FeatureBank
from cflow_plugin.training.validation import validate_now
from cflow_plugin.training.vector_loader import VectorLoader

logger = logging.getLogger(__name__)

# The scoring constants are means and quantiles over all positions of this many training images, whose sampling error is
# far below their effect. A model still in training makes do with fewer, and of large ones with a part of their
# positions: they serve if the run is cut off there.
_TERMINATED = 128 + 15  # what shells give for the signal; Lightning gives 0
_IMAGES = 128
_INTERIM_IMAGES, _INTERIM_POSITIONS = 4, 4096


class Calibration(Callback):
    """Sets the scoring constants after each epoch, and the thresholds where a model is judged and where training ends.

    Ends are of many kinds: the planned one, early stopping, a limit of time or steps, an interrupt, or a resumed run
    with nothing left to do. Whichever it is, constants and thresholds are of the last weights, and the checkpoints that
    were written for these are brought up to date.

    Attributes:
        step: The optimisation step whose weights constants and thresholds are of, or ``None``.
        vectors: What is trained on.
    """

    def __init__(self) -> None:
        self.step: int | None = None
        self._is_busy = False
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
        self.vectors, self._reference, self._score = vectors, reference, score

    def end(self) -> None:
        """Let go of features and images."""
        self.vectors: VectorLoader | None = None
        self._odd: str | None = None
        self._reference: DataLoader[Any] | None = None
        self._score: Callable[[torch.Tensor], InferenceBatch] | None = None

    # What Lightning calls

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Begin anew; a checkpoint that is gone on from says how far it is."""
        del trainer, pl_module
        if stage == "fit":
            self.step = None

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Forget thresholds that the checkpoint brought: they will not fit the weights that are saved from now on."""
        del trainer
        _forget(pl_module)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Set constants and thresholds before validation scores anything and writes a checkpoint."""
        if trainer.state.fn == TrainerFn.FITTING:
            self.calibrate(pl_module)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Set constants that serve if the run is cut off here; thresholds of earlier weights are forgotten."""
        if self.step != trainer.global_step:
            self._set_constants(pl_module, _INTERIM_IMAGES, _INTERIM_POSITIONS)
            _forget(pl_module)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Set constants and thresholds of the weights that training ends with, unless that is done."""
        if self.step == trainer.global_step:
            return
        if trainer.enable_validation:
            validate_now(trainer)  # calls on_validation_start
        else:
            self.calibrate(pl_module)
        complete_checkpoints(trainer)

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Finish a run that was killed behind its last step and has nothing left to train."""
        if self.step != trainer.global_step and self.vectors is not None and trainer.global_step:
            if self.vectors.bank is None:
                next(iter(self.vectors))
            self.calibrate(pl_module)
            complete_checkpoints(trainer)
        if self._odd:
            logger.warning(
                "The threshold rests on one good image that is far more unusual than the others, %s. Look at it: if it "
                "is no good part, or of another camera, take it out and train again; until then defects are missed.",
                self._odd,
            )
        self.end()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Leave an interrupted training with a model that can be used."""
        if isinstance(exception, KeyboardInterrupt) and trainer.global_rank > 0:
            # With any other code Lightning kills the first process, which may still be about to say what to do. Without
            # tidying up: the first may be waiting for this one, and hears of its end by their connection.
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(0)
        if isinstance(exception, SIGTERMException):
            exception.code = _TERMINATED
            if trainer.is_global_zero:
                logger.warning(
                    "Ended by the system's signal in epoch %d. Each whole epoch is in last.ckpt: to go on, pass it "
                    "with --ckpt_path.",
                    trainer.current_epoch,
                )
            return
        started = self.vectors is not None and self.vectors.bank is not None and trainer.global_step > 0
        if not isinstance(exception, KeyboardInterrupt) or not started or self._is_busy:
            return
        if trainer.world_size > 1:  # these are not at the same step when interrupted, and would wait for each other
            logger.warning(
                "Interrupted in epoch %d; of several processes none sets thresholds then. Each whole epoch is in "
                "last.ckpt: to go on, or to end with thresholds, pass it with --ckpt_path.",
                trainer.current_epoch,
            )
            return
        logger.info("Interrupted in epoch %d; setting the thresholds of the model as it is.", trainer.current_epoch)
        if trainer.enable_validation:
            validate_now(trainer)
        else:
            self.calibrate(pl_module)
        for file in write_checkpoints(trainer):
            logger.info("The model as it is: %s. To go on with the training, pass --ckpt_path last.ckpt.", file)

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint says of it."""
        return {"step": self.step}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over what a checkpoint says."""
        self.step = state_dict["step"]

    # What is set

    def calibrate(self, module: LightningModule) -> None:
        """Set constants and thresholds of a model as it is.

        Args:
            module: The model.
        """
        self._is_busy = True
        self._set_constants(module, _IMAGES)
        self._set_thresholds(module)
        self._is_busy = False
        self.step = module.global_step

    def _set_constants(self, module: LightningModule, images: int, positions: int | None = None) -> None:
        if self.vectors is not None and self.vectors.bank is not None:
            model = cast("CflowModel", module.model)
            bank, seed = self.vectors.bank, self.vectors.seed
            unseen = bank.unseen_features
            model.calibrate(
                log_likelihoods_of(bank, bank.features, model, images, seed, positions),
                log_likelihoods_of(bank, unseen, model, images, seed, positions) if len(unseen[0]) else None,
            )

    def _set_thresholds(self, module: LightningModule) -> None:
        if self._reference is None or self._score is None:
            return
        model = cast("CflowModel", module.model)
        training = model.training
        model.eval()
        logger.info("Scoring %d good images for the thresholds.", images_in(self._reference))
        processor = cast("ConformalPostProcessor", module.post_processor)
        scores, maxima, files = scores_of(self._reference, self._score, processor.levels)
        model.train(training)
        processor.calibrate(scores, maxima)
        odd = (odd_one(values.cpu().numpy(), processor.rate) for values in (scores, maxima))
        self._odd = next((files[index] for index in odd if index is not None), None)


def _forget(module: LightningModule) -> None:
    if isinstance(module.post_processor, ConformalPostProcessor):
        module.post_processor.forget()


@torch.no_grad()
def log_likelihoods_of(
    bank: FeatureBank,
    features: Sequence[torch.Tensor],
    model: CflowModel,
    images: int,
    seed: int,
    most_positions: int | None = None,
) -> list[torch.Tensor]:
    """Log-likelihoods of some images' features, for :meth:`CflowModel.calibrate`.

    Args:
        bank: Knows the features' positions.
        features: Its features, of images that are trained on or of the others.
        model: The model.
        images: Number of images, drawn at random.
        seed: Seed of the draw.
        most_positions: So many positions of each scale, the same in all images; ``None`` for all.

    Returns:
        For each scale ``(N, H_k, W_k)``, nats per dimension; NaN at positions that the bank does not keep, or that are
        not drawn.
    """
    result = []
    generator = torch.Generator().manual_seed(seed)
    chosen = torch.randperm(len(features[0]), generator=generator)[:images]
    for trained, vectors, positions, size in zip(model.decoders, features, bank.positions, bank.sizes, strict=True):
        decoder = in_full_precision(trained)  # as images will be scored
        like = next(decoder.parameters())
        drawn = torch.arange(len(positions))
        if most_positions is not None and most_positions < len(positions):
            drawn = torch.randperm(len(positions), generator=generator)[:most_positions]
        places = positions[drawn]
        condition = model.condition(*size, like)[places]
        likelihood = like.new_full((len(chosen), size[0] * size[1]), float("nan"))
        for row, image in enumerate(chosen):
            likelihood[row, places] = decoder.log_likelihood(
                vectors[image, drawn.to(vectors.device)].to(like), condition
            )
        result.append(likelihood.unflatten(1, size))
    return result


@torch.no_grad()
def scores_of(
    images: DataLoader[Any],
    score: Callable[[torch.Tensor], InferenceBatch],
    levels: Callable[[torch.Tensor], torch.Tensor],
) -> tuple[torch.Tensor, torch.Tensor, list[str]]:
    """Score images as new ones would be.

    Args:
        images: Loader of images.
        score: Images ``(B, 3, H, W)`` as they are loaded to scores and maps, before post-processing.
        levels: See :meth:`ConformalPostProcessor.levels`.

    Returns:
        The image scores, and the levels of the maps, both ``(N,)``, and the images' files.
    """
    scores, maxima, files = [], [], []
    for batch in images:
        result = score(batch.image)
        scores.append(result.pred_score)
        maxima.append(levels(cast("torch.Tensor", result.anomaly_map)))
        files += batch.image_path or [f"number {len(files) + place}" for place in range(1, 1 + len(batch.image))]
    return torch.cat(scores), torch.cat(maxima), files
