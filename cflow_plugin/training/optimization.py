"""Adam and its learning rate over a run (section 5.1)."""

__all__ = ["Pace", "Schedule", "configure", "learning_rate_schedule"]

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Literal

import torch
from lightning import Trainer
from lightning.pytorch.callbacks import Callback, Timer
from lightning.pytorch.trainer.states import RunningStage
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import nn
from torch.optim.lr_scheduler import LambdaLR

Schedule = Literal["one_cycle", "cosine"]

_RISE = 0.2  # share of a run over which ``one_cycle`` rises,
_FIRST, _LAST = 1 / 25, 1e-4 / 25  # and where it begins and ends, as shares of the peak: torch's OneCycleLR
_FIRST_OF_WARMUP = 0.01


class Pace:
    """Which share of a run is done: of its steps, or of its time where that is bounded and sooner over.

    A run can be told to hasten: it then comes to its end in fewer steps than it was planned for.
    """

    def __init__(self) -> None:
        self._trainer: Trainer | None = None
        self._begin_anew()

    def _begin_anew(self) -> None:
        self.share = 0.0
        self._steps: int | None = None
        self._from_step, self._from_share = 0, 0.0

    def begin(self, trainer: Trainer, steps: int | None) -> None:
        """Plan a run, or go on with one.

        Args:
            trainer: The trainer; a :class:`~lightning.pytorch.callbacks.Timer` among its callbacks bounds the time.
            steps: Number of steps; ``None`` where time alone bounds it.
        """
        if trainer.ckpt_path is None:
            self._begin_anew()
        self._trainer, self._since = trainer, None
        self._steps = self._steps or steps

    def hasten(self, step: int, steps: int) -> None:
        """Come to the end in fewer steps, if more than those are left.

        Args:
            step: The step that the run has come to.
            steps: How many more it may take.
        """
        if self._steps is None or step + steps < self._steps:
            self._from_step, self._from_share, self._steps = step, self.share, step + steps

    def __call__(self, step: int) -> float:
        """The share that is done at a step."""
        share = self.share
        if self._steps is not None:
            by_steps = (step - self._from_step) / max(1, self._steps - self._from_step)
            share = max(share, self._from_share + (1 - self._from_share) * by_steps)
        if step:  # before the first one features are extracted, which is nobody's share
            share = max(share, self._share_of_time())
        self.share = min(1.0, share)
        return self.share

    def _share_of_time(self) -> float:
        trainer = self._trainer
        timer = _timer_of(trainer) if trainer else None
        left = timer.time_remaining(RunningStage.TRAINING) if timer else None
        if trainer is None or timer is None or left is None:
            return 0.0
        now = timer.time_elapsed(RunningStage.TRAINING)
        self._since = self._since or (now, self.share)
        then, share = self._since
        share += (1 - share) * (now - then) / max(1e-9, now + left - then)
        return float(trainer.strategy.broadcast(share))  # all processes at one rate

    def __getstate__(self) -> dict[str, Any]:
        """A copied or pickled model leaves its trainer behind."""
        return {**self.__dict__, "_trainer": None}

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps, as plain values."""
        return {"share": self.share, "steps": self._steps, "since": [self._from_step, self._from_share]}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on from a checkpoint.

        Args:
            state: What :meth:`state` was then; empty for a checkpoint that has none.
        """
        if state:
            self.share, self._steps = state["share"], state["steps"]
            self._from_step, self._from_share = state["since"]


def _timer_of(trainer: Trainer) -> Timer | None:
    callbacks: list[Callback] = getattr(trainer, "callbacks")  # noqa: B009  set, but not declared
    return next((one for one in callbacks if isinstance(one, Timer)), None)


def configure(
    parameters: Iterable[nn.Parameter],
    trainer: Trainer,
    pace: Pace,
    learning_rate: float,
    schedule: Schedule,
    warmup_epochs: int,
) -> OptimizerLRScheduler:
    """Adam with a schedule over all of a run, as Lightning takes them.

    Args:
        parameters: What is optimised.
        trainer: The trainer.
        pace: Told here how long the run is to be.
        learning_rate: Peak learning rate.
        schedule: See :func:`learning_rate_schedule`.
        warmup_epochs: Epochs of linear warm-up before ``cosine``.
    """
    # A gradient scaler has to see the gradients before the optimiser does, which fusing prevents.
    parameters = list(parameters)
    # The usual 1e-8 is zero in that format, and so are the squares of small gradients.
    eps = 1e-4 if parameters[0].dtype == torch.float16 else 1e-8
    optimizer = torch.optim.Adam(parameters, lr=learning_rate, eps=eps, fused=trainer.precision != "16-mixed")
    steps = trainer.estimated_stepping_batches
    if steps == float("inf") and _timer_of(trainer) is None:
        return optimizer
    pace.begin(trainer, None if steps == float("inf") else int(steps))
    warmup = warmup_epochs / max(1, trainer.max_epochs or 1)
    scheduler = learning_rate_schedule(optimizer, schedule, pace, warmup)
    return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


def learning_rate_schedule(
    optimizer: torch.optim.Optimizer, kind: Schedule, pace: Callable[[int], float], warmup_share: float = 0.0
) -> LambdaLR:
    """The learning rate over a run.

    Args:
        optimizer: The optimiser, at its highest learning rate.
        kind: ``one_cycle``, which rises over the first fifth and falls to almost nothing, or ``cosine``.
        pace: Which share of the run is done at a step.
        warmup_share: Share of the run over which the rate rises before ``cosine``.

    References:
        one_cycle: Smith and Topin, Super-Convergence, 2018, with :class:`torch.optim.lr_scheduler.OneCycleLR`'s shape.
    """
    if kind == "one_cycle":
        return LambdaLR(optimizer, lambda step: _one_cycle(pace(step)))
    return LambdaLR(optimizer, lambda step: _warm_up_and_fall(pace(step), warmup_share))


def _one_cycle(share: float) -> float:
    if share < _RISE:
        return _between(_FIRST, 1.0, share / _RISE)
    return _between(1.0, _LAST, (share - _RISE) / (1 - _RISE))


def _warm_up_and_fall(share: float, warmup: float) -> float:
    if share < warmup:
        return _FIRST_OF_WARMUP + (1 - _FIRST_OF_WARMUP) * share / warmup
    return _between(1.0, 0.0, (share - warmup) / max(1e-9, 1 - warmup))


def _between(first: float, last: float, share: float) -> float:
    """Half a cosine from one value to another."""
    return last + (first - last) * (1 + math.cos(math.pi * share)) / 2
