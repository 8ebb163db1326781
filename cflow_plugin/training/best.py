"""The likelihood of good images that are not trained on: the best decoders are kept, and a run ends with them."""

__all__ = ["KeepBest"]

import logging
from collections.abc import Callable
from math import ceil
from typing import Any, cast

import torch
from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback
from torch import nn

from cflow_plugin.model.torch_model import CflowModel
from cflow_plugin.training.calibration import Calibration
from cflow_plugin.training.feature_bank import FeatureBank
from cflow_plugin.training.optimization import Pace

logger = logging.getLogger(__name__)

# Vectors of each scale that are looked at, the same ones after every epoch: their mean need not be exact, only fair.
_VECTORS = 2048
# So long a run goes on without any gain: a share of it, and no fewer epochs than these.
_PATIENCE, _SHORTEST_PATIENCE = 0.2, 8
# In so many epochs, for each that was made, the learning rate then falls to its end.
_LAST_PART = 0.1


class KeepBest(Callback):
    """Looks at images that vouch for the others after each epoch, and keeps each scale's best decoder.

    When no scale's likelihood has gained for a fifth of the run, the run hastens to its end from the best decoders.
    The likelihood is logged, as ``unseen_nll``, for who wants another rule.

    Args:
        calibration: Knows the features, and is told when weights change outside of a step.
        pace: The run's, told to hasten.
        seed: Gives the seed for the choice of vectors.
    """

    def __init__(self, calibration: Calibration, pace: Pace, seed: Callable[[], int]) -> None:
        super().__init__()
        self._calibration, self._pace, self._seed = calibration, pace, seed
        self._restored = False
        self._forget()

    def _forget(self) -> None:
        self._likelihoods: list[float] = []
        self._epochs: list[int] = []
        self._weights: list[dict[str, torch.Tensor]] = []
        self._epoch = -1
        self._is_hastening = False

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Forget an earlier run, unless this one goes on with it."""
        if trainer.ckpt_path is None or not self._restored:
            self._forget()
        for scale, weights in enumerate(self._weights):
            if not weights:
                self._weights[scale] = _copy_of(cast("CflowModel", pl_module.model).decoders[scale])
        self._restored = False

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint keeps: weights of those decoders only that are not the best themselves."""
        pairs = zip(self._weights, self._epochs, strict=True)
        return {
            "likelihoods": self._likelihoods,
            "epochs": self._epochs,
            "weights": [{} if epoch == self._epoch else weights for weights, epoch in pairs],
            "is_hastening": self._is_hastening,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from a checkpoint."""
        self._likelihoods, self._epochs = state_dict["likelihoods"], state_dict["epochs"]
        self._weights, self._is_hastening = state_dict["weights"], state_dict["is_hastening"]
        self._restored = True

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Look at the likelihoods."""
        bank = self._calibration.bank
        if bank is None or not len(bank.unseen_features[0]) or not isinstance(pl_module.model, CflowModel):
            return
        model, epoch = pl_module.model, trainer.current_epoch
        found = unseen_likelihoods(model, bank, self._seed())
        pl_module.log("unseen_nll", -sum(found), sync_dist=True)
        self._keep(model, found, epoch)
        self._epoch = epoch
        # A run may be bounded by its steps or by its time: how many epochs it has follows from the share that is done.
        share = self._pace.share
        patience = max(_SHORTEST_PATIENCE, round(_PATIENCE * (epoch + 1) / share)) if share else float("inf")
        if not self._is_hastening and trainer.strategy.reduce_boolean_decision(epoch - max(self._epochs) >= patience):
            self._is_hastening = True
            self._take_best(model)
            epochs = max(1, round(_LAST_PART * (epoch + 1)))
            logger.info("Unseen good images have not become likelier for %d epochs; ending in %d.", patience, epochs)
            steps = epochs * ceil(trainer.num_training_batches / trainer.accumulate_grad_batches)
            self._pace.hasten(pl_module.global_step, steps)
        elif self._is_hastening and self._pace.share >= 1:
            trainer.should_stop = True

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Take the best decoders, whichever way training has ended."""
        del trainer
        if isinstance(pl_module.model, CflowModel):
            self._take_best(pl_module.model)

    def _keep(self, model: CflowModel, found: list[float], epoch: int) -> None:
        if not self._likelihoods:
            self._likelihoods = [-float("inf")] * len(found)
            self._epochs = [epoch] * len(found)
            self._weights = [{} for _ in found]
        for scale, (decoder, likelihood) in enumerate(zip(model.decoders, found, strict=True)):
            if not self._weights[scale] or likelihood > self._likelihoods[scale]:
                self._likelihoods[scale], self._epochs[scale] = likelihood, epoch
                self._weights[scale] = _copy_of(decoder)

    def _take_best(self, model: CflowModel) -> None:
        if not self._weights or self._are_best(model):
            return
        for decoder, weights in zip(model.decoders, self._weights, strict=True):
            decoder.load_state_dict(weights)
        model.drop_folded()
        self._calibration.step = None

    def _are_best(self, model: CflowModel) -> bool:
        return all(
            torch.equal(value, best[name].to(value.device))
            for decoder, best in zip(model.decoders, self._weights, strict=True)
            for name, value in decoder.state_dict().items()
        )


def _copy_of(decoder: nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.detach().clone() for name, value in decoder.state_dict().items()}


@torch.no_grad()
def unseen_likelihoods(model: CflowModel, bank: FeatureBank, seed: int) -> list[float]:
    """Mean log-likelihood of some vectors of good images that are not trained on.

    Args:
        model: The model.
        bank: Features.
        seed: The same seed gives the same vectors.

    Returns:
        For each scale, nats per dimension.
    """
    generator = torch.Generator().manual_seed(seed)
    result = []
    for decoder, vectors, positions, size in zip(
        model.decoders, bank.unseen_features, bank.positions, bank.sizes, strict=True
    ):
        count = max(1, min(len(positions), _VECTORS // len(vectors)))
        picked = torch.randperm(len(positions), generator=generator)[:count]
        condition = model.condition(*size, vectors)[positions[picked]]
        result.append(float(decoder.log_likelihood(vectors[:, picked.to(vectors.device)], condition).mean()))
    return result
