"""The training loss of a batch of feature vectors."""

__all__ = ["logged_loss", "loss_of"]

from typing import cast

import torch
from anomalib.models.components import AnomalibModule
from torch.nn import functional

from cflow_plugin.errors import CflowError
from cflow_plugin.model.torch_model import CflowModel
from cflow_plugin.training.feature_bank import VectorBatch


def loss_of(model: CflowModel, batch: VectorBatch, noise: float, epoch: int) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """The negative log-sigmoid of the log-likelihood, summed over scales.

    The log-sigmoid is the original code's: it keeps vectors that are unlikely already from dominating the step.

    Args:
        model: The model.
        batch: Vectors at every scale.
        noise: Standard deviation of the noise added to them, in units of their own (whitened) standard deviation.
        epoch: Number of the epoch, for messages.

    Returns:
        The loss, a scalar, and for each scale the mean log-likelihood in nats per dimension, detached. Both are
        weighted by the batch's weight.

    Raises:
        CflowError: If the loss is not finite.
    """
    losses, likelihoods = [], []
    for decoder, vectors, positions, drawn, size in zip(
        model.decoders, batch.vectors, batch.positions, batch.noise, batch.sizes, strict=True
    ):
        condition = model.condition(*size, vectors)[positions]
        likelihood = decoder.log_likelihood(vectors, condition, None if drawn is None else noise * drawn)
        losses.append(-functional.logsigmoid(likelihood).mean() * batch.weight)
        likelihoods.append(likelihood.mean().detach() * batch.weight)
    loss = torch.stack(losses).sum()
    if not torch.isfinite(loss):
        msg = (
            f"The training loss is {loss.item()} in epoch {epoch}. The last good epoch is kept in last.ckpt; lower "
            "--model.learning_rate, or use --trainer.precision 32."
        )
        raise CflowError(msg)
    return loss, likelihoods


def logged_loss(module: AnomalibModule, batch: VectorBatch) -> torch.Tensor:
    """The loss of a batch, written to the log together with each scale's likelihood.

    Args:
        module: A :class:`~cflow_plugin.CflowPlugin` in training.
        batch: Vectors at every scale.
    """
    model = cast("CflowModel", module.model)
    logged = {"on_step": False, "on_epoch": True, "batch_size": 1, "sync_dist": True}
    loss, likelihoods = loss_of(model, batch, module.hparams["noise"], module.current_epoch)
    for name, likelihood in zip(model.encoder.layers, likelihoods, strict=True):
        module.log(f"train_nll_{name}", -likelihood, **logged)
    module.log("train_loss", loss.detach(), prog_bar=True, **logged)
    return loss
