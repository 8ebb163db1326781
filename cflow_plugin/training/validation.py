"""When a run validates: as often as somebody looks at it, and of the model that it ends with in any case."""

__all__ = ["is_watched", "validate_now"]

from anomalib.metrics import Evaluator
from lightning import Trainer
from lightning.pytorch.callbacks import Callback
from torch import nn

_HOOKS = [name for name in dir(Callback) if name.startswith("on_validation_")]
_LIBRARIES = {"anomalib", "cflow_plugin", "lightning", "pytorch_lightning"}


def is_watched(trainer: Trainer) -> bool:
    """Whether anything but the thresholds comes of a validation while training goes on.

    That is so with metrics on the validation images, with callbacks that stop or save by some metric, and with
    callbacks of the user's own that validation calls.

    Args:
        trainer: The trainer, with its model.
    """
    evaluator = getattr(trainer.lightning_module, "evaluator", None)
    if isinstance(evaluator, Evaluator) and len(evaluator.val_metrics):
        return True
    return any(getattr(callback, "monitor", None) or _looks_on(callback) for callback in _callbacks(trainer))


def _callbacks(trainer: Trainer) -> list[Callback]:
    return trainer.callbacks  # pyright: ignore[reportAttributeAccessIssue]  set when it is made


def _looks_on(callback: Callback) -> bool:
    kind = type(callback)
    if kind.__module__.partition(".")[0] in _LIBRARIES or isinstance(callback, nn.Module):
        return False
    return any(getattr(kind, name) is not getattr(Callback, name) for name in _HOOKS)


def validate_now(trainer: Trainer) -> None:
    """Validate the model as it is, in the midst of ``fit``, as the trainer itself would.

    Args:
        trainer: The trainer.
    """
    trainer.validating = True
    trainer.fit_loop.epoch_loop.val_loop.run()
    trainer.training = True
