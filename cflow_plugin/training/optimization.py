"""Adam and its learning rate over a run (section 5.1)."""

__all__ = ["Schedule", "configure", "learning_rate_schedule"]

from collections.abc import Iterable
from typing import Literal

import torch
from lightning import Trainer
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import nn
from torch.optim.lr_scheduler import CosineAnnealingLR, LinearLR, LRScheduler, OneCycleLR, SequentialLR

Schedule = Literal["one_cycle", "cosine"]


def configure(
    parameters: Iterable[nn.Parameter], trainer: Trainer, learning_rate: float, schedule: Schedule, warmup_epochs: int
) -> OptimizerLRScheduler:
    """Adam with a schedule over all steps of a run, as Lightning takes them.

    Args:
        parameters: What is optimised.
        trainer: The trainer.
        learning_rate: Peak learning rate.
        schedule: See :func:`learning_rate_schedule`.
        warmup_epochs: Epochs of linear warm-up before ``cosine``.
    """
    # A gradient scaler has to see the gradients before the optimiser does, which fusing prevents.
    optimizer = torch.optim.Adam(parameters, lr=learning_rate, fused=trainer.precision != "16-mixed")
    steps = trainer.estimated_stepping_batches
    if steps == float("inf"):
        return optimizer
    warmup = warmup_epochs / max(1, trainer.max_epochs or 1)
    scheduler = learning_rate_schedule(optimizer, schedule, learning_rate, max(2, int(steps)), warmup)
    return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


def learning_rate_schedule(
    optimizer: torch.optim.Optimizer, kind: Schedule, peak: float, steps: int, warmup_share: float = 0.0
) -> LRScheduler:
    """The learning rate over all steps of a run.

    Args:
        optimizer: The optimiser.
        kind: ``one_cycle``, which rises over the first fifth, or ``cosine``.
        peak: Highest learning rate.
        steps: Number of steps, at least 2.
        warmup_share: Share of the steps over which the rate rises before ``cosine``.
    """
    if kind == "one_cycle":
        # torch divides by the length of the rise, pct_start * steps - 1, which must not be 0 (0.2 * 5 - 1 is).
        return OneCycleLR(optimizer, peak, total_steps=steps, pct_start=max(0.2, 1.5 / steps))
    warmup = min(steps - 1, round(steps * warmup_share))
    fall = CosineAnnealingLR(optimizer, T_max=steps - warmup)
    if not warmup:
        return fall
    rise = LinearLR(optimizer, start_factor=0.01, total_iters=warmup)
    return SequentialLR(optimizer, [rise, fall], milestones=[warmup])
