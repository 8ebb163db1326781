"""Settings that are out of range, and the length of a run where the user has not set one."""

__all__ = [
    "check_not_negative",
    "check_positive",
    "check_region",
    "false_alarm_rate",
    "one_image_at_a_time",
    "plan_run",
    "recipe_epochs",
    "refuse_tiler",
]

import sys
from typing import Any, cast

from anomalib.data.utils import ValSplitMode
from lightning import Trainer

from cflow_plugin.anomalib_patches.run_length import is_open, note_lengths
from cflow_plugin.anomalib_patches.screen import leave_out_summary
from cflow_plugin.errors import CflowError
from cflow_plugin.images.loading import data_module_of
from cflow_plugin.training.validation import is_watched

_SHORTEST_RUN = 8  # epochs, for so few images or fewer:
_FEW_IMAGES = 32
_LONGEST_RUN = 200

note_lengths()


def check_positive(**settings: float | None) -> None:
    """Raise if a setting is not above 0.

    Args:
        **settings: Settings by their names; ``None`` is not looked at.

    Raises:
        CflowError: If one is not.
    """
    for name, value in settings.items():
        if value is not None and not value > 0:
            msg = f"{name} must be above 0, got {value}."
            raise CflowError(msg)


def check_not_negative(**settings: float) -> None:
    """Raise if a setting is below 0.

    Args:
        **settings: Settings by their names.

    Raises:
        CflowError: If one is.
    """
    for name, value in settings.items():
        if not value >= 0:
            msg = f"{name} must not be negative, got {value}."
            raise CflowError(msg)


def check_region(smallest: int, size: tuple[int, int]) -> None:
    """Raise if no map has a region that is so large.

    Args:
        smallest: Pixels of the smallest region.
        size: Height and width of the map.

    Raises:
        CflowError: If it has fewer pixels.
    """
    if smallest > size[0] * size[1]:
        msg = f"smallest_region is {smallest} pixels, and the map has {size[0]}×{size[1]}; choose a smaller one."
        raise CflowError(msg)


def false_alarm_rate(asked: float | str | None, may_be_kept: bool) -> tuple[float | None, bool]:
    """The rate that a user asks for.

    Args:
        asked: A rate, ``auto``, or ``None``.
        may_be_kept: Whether the model has the post-processor that keeps rates.

    Returns:
        The rate, or ``None``, and whether another may be chosen.

    Raises:
        CflowError: If a rate is asked for and cannot be kept.
    """
    if asked is None or isinstance(asked, str):
        return None, asked == "auto" and may_be_kept
    if not may_be_kept:
        msg = "Give target_false_alarm_rate or a post_processor, not both: ConformalPostProcessor takes the rate."
        raise CflowError(msg)
    return asked, False


def refuse_tiler(trainer: Trainer) -> None:
    """Say what to use instead of anomalib's tiler, which would have every tile learn one place and one threshold.

    Args:
        trainer: The trainer, with its callbacks.

    Raises:
        CflowError: If it is switched on.
    """
    from anomalib.callbacks import TilerConfigurationCallback  # which imports anomalib's models, and they this

    for callback in cast("Any", trainer).callbacks:
        if isinstance(callback, TilerConfigurationCallback) and callback.enable:
            msg = (
                "CflowPlugin cuts large images into tiles itself: leave anomalib's tiler out, and set "
                "--model.tile_size 1024 and --model.image_size to the pictures' height and width."
            )
            raise CflowError(msg)


def one_image_at_a_time(trainer: Trainer, tile_size: int | None) -> None:
    """Keep no more than one large image in a batch.

    Args:
        trainer: The trainer, being set up.
        tile_size: Where there is one, images are large.
    """
    data = data_module_of(trainer)
    if tile_size is not None and data is not None:
        data.train_batch_size = data.eval_batch_size = 1


def recipe_epochs(images: int) -> int:
    """How many epochs of the default number of steps the recipe takes.

    Few images are soon known by heart, and many have more to tell; but thousands are much alike.

    Args:
        images: Number of training images.

    Example:
        >>> [recipe_epochs(images) for images in (1, 30, 200, 320, 40_000)]
        [8, 8, 20, 25, 200]
    """
    return min(_LONGEST_RUN, round(_SHORTEST_RUN * max(1.0, images / _FEW_IMAGES) ** 0.5))


def plan_run(trainer: Trainer, epochs: int | None) -> None:
    """Give a run the recipe's length, and one validation at its end, where the user has not asked for others.

    Args:
        trainer: The trainer, being set up.
        epochs: The recipe's length; ``None`` takes the one for the number of training images.
    """
    leave_out_summary(trainer)
    data = data_module_of(trainer)
    loops = trainer.fit_loop
    if is_open(trainer):
        # Who passes bare loaders is told so later.
        loops.max_epochs = epochs or recipe_epochs(1 if data is None else len(data.train_data))
    if trainer.check_val_every_n_epoch == 1 and not is_watched(trainer):
        # Thresholds are wanted of the trained model only; whichever epoch is the last will be followed by a validation.
        trainer.check_val_every_n_epoch = loops.max_epochs if loops.max_epochs and loops.max_epochs > 0 else sys.maxsize
    if getattr(data, "val_split_mode", None) == ValSplitMode.NONE:
        # anomalib's data modules fail when they are asked for validation images that they do not have.
        trainer.limit_val_batches = 0
