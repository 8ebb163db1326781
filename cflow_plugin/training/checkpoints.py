"""Checkpoints that are on the disk whole or not at all, and that run no code when they are read."""

__all__ = [
    "CheckpointFiles",
    "LastEpoch",
    "check_weights",
    "complete_checkpoints",
    "keep_last_epoch",
    "translate_errors",
    "use_checkpoint_files",
    "versions",
    "warn_of_other_versions",
    "write_checkpoints",
    "write_missing_checkpoints",
]

import io
import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from anomalib.engine.plugins import AnomalibCheckpointIO
from lightning import Trainer
from lightning.pytorch.callbacks import Callback, Checkpoint, ModelCheckpoint
from torch import nn

from cflow_plugin.errors import CflowError
from cflow_plugin.files import atomic_file, remove_unfinished

logger = logging.getLogger(__name__)

_PACKAGES = ("anomalib", "cflow-plugin")


class CheckpointFiles(AnomalibCheckpointIO):
    """anomalib's way of reading and writing checkpoints, made safe against a full disk, a killed run and hostile files.

    Lightning writes to the system's temporary folder and moves the file from there, which between two file systems is
    copying: a run killed meanwhile leaves half a file with the name of a whole one.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None) -> None:
        """Write a checkpoint; until it is complete, an older one of that name stays."""
        if "://" in str(path):  # of a store that takes whole files only
            super().save_checkpoint(checkpoint, path, storage_options)
            return
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        content = io.BytesIO()  # torch's own writing to files does not say that the disk is full
        torch.save(checkpoint, content)
        with atomic_file(path) as partial:
            partial.write_bytes(content.getbuffer())
        remove_unfinished(path)

    def load_checkpoint(self, path: str | Path, map_location: Any = "cpu", weights_only: bool | None = True) -> Any:
        """Read a checkpoint: tensors and plain values, and no other objects whatever the caller says.

        It is read into main memory, since the machine that it was made on may have had other devices.

        Raises:
            CflowError: If the file is absent, damaged, or holds anything else.
        """
        del weights_only
        with translate_errors(path):
            checkpoint = super().load_checkpoint(path, map_location, weights_only=True)
            if not isinstance(checkpoint, dict) or "state_dict" not in checkpoint:
                message = "it holds something else"
                raise ValueError(message)
            return checkpoint


class LastEpoch(ModelCheckpoint):
    """A checkpoint after every epoch, so that a run that dies can be resumed."""

    def __init__(self) -> None:
        super().__init__(filename="last", save_on_train_epoch_end=True, enable_version_counter=False)


def keep_last_epoch(trainer: Trainer) -> None:
    """Add :class:`LastEpoch` to a trainer.

    As a callback of the model's it would take the place of the user's own ``ModelCheckpoint``, of which it is a kind.

    Args:
        trainer: The trainer, being given its model.
    """
    callbacks: list[Callback] = trainer.callbacks  # pyright: ignore[reportAttributeAccessIssue]  set when it is made
    if not any(isinstance(callback, LastEpoch) for callback in callbacks):
        callbacks.append(LastEpoch())


def write_missing_checkpoints(trainer: Trainer) -> None:
    """Leave a model where anomalib looks for it.

    Resumed after its last epoch, a run has nothing to train, and Lightning then writes no checkpoint.

    Args:
        trainer: The trainer, whose training has ended; every process has to call this.
    """
    for file in _files_of_the_engine(trainer):
        if not trainer.strategy.broadcast(file.exists()):
            trainer.save_checkpoint(file)


def write_checkpoints(trainer: Trainer) -> list[Path]:
    """Write the model as it is to where anomalib looks for it, unless the user keeps the best by some metric there.

    Args:
        trainer: The trainer; every process has to call this.

    Returns:
        The files.
    """
    files = _files_of_the_engine(trainer, best_as_well=False)
    for file in files:
        trainer.save_checkpoint(file)
    return files


def _files_of_the_engine(trainer: Trainer, best_as_well: bool = True) -> list[Path]:
    return [
        Path(callback.dirpath) / f"{callback.filename}.ckpt"
        for callback in trainer.checkpoint_callbacks
        if isinstance(callback, ModelCheckpoint)
        and callback.dirpath
        and Path(callback.dirpath).name == "lightning"
        and (best_as_well or callback.monitor is None)
    ]


def complete_checkpoints(trainer: Trainer) -> None:
    """Bring files up to date that were written for the last step before constants and thresholds were set.

    All else in them is left as it is, so that a run goes on from them as it would have.

    Args:
        trainer: The trainer, whose training has ended.
    """
    module, files = trainer.lightning_module, trainer.strategy.checkpoint_io
    if not trainer.is_global_zero:
        return
    # What is best by some metric is what that metric was computed of, and may have thresholds from then.
    chosen = {
        path
        for callback in trainer.checkpoint_callbacks
        if isinstance(callback, ModelCheckpoint) and callback.monitor is not None
        for path in callback.best_k_models
    }
    for path in _files_of_this_run(trainer):
        checkpoint = files.load_checkpoint(path, "cpu")
        if checkpoint["global_step"] != trainer.global_step or (path in chosen and _is_complete(checkpoint)):
            continue
        checkpoint["state_dict"] = module.state_dict()
        for callback in trainer.callbacks:  # pyright: ignore[reportAttributeAccessIssue]  set when it is made
            if callback.state_key in checkpoint["callbacks"] and not isinstance(callback, Checkpoint):
                checkpoint["callbacks"][callback.state_key] = callback.state_dict()
        module.on_save_checkpoint(checkpoint)
        files.save_checkpoint(checkpoint, path)


def _is_complete(checkpoint: Mapping[str, Any]) -> bool:
    return checkpoint["callbacks"].get("Calibration", {}).get("step") == checkpoint["global_step"]


def _files_of_this_run(trainer: Trainer) -> set[str]:
    """All files that its callbacks have written and know of, in their own folders."""
    found = set()
    for callback in trainer.checkpoint_callbacks:
        if isinstance(callback, ModelCheckpoint) and callback.dirpath:
            known = {callback.best_model_path, callback.last_model_path, *callback.best_k_models}
            found |= {path for path in known if path and Path(path).parent == Path(callback.dirpath)}
    return {path for path in found if "://" in path or Path(path).is_file()}


def use_checkpoint_files(trainer: Trainer) -> None:
    """Let a trainer read and write checkpoints by :class:`CheckpointFiles`, unless the user chose another way.

    Args:
        trainer: The trainer, being set up.
    """
    used = trainer.strategy.checkpoint_io
    if type(used) is AnomalibCheckpointIO:
        trainer.strategy.checkpoint_io = CheckpointFiles(used.extra_safe_globals)


def _of_earlier_run(path: Path) -> Path | None:
    """The same file of the newest run that has it, where a path goes through anomalib's link to the latest run."""
    if "latest" not in path.parts:
        return None
    place = path.parts.index("latest")
    runs, file = Path(*path.parts[:place]), Path(*path.parts[place + 1 :])
    found = [run / file for run in runs.glob("v*") if (run / file).is_file()]
    return max(found, key=lambda one: one.stat().st_mtime, default=None)


@contextmanager
def translate_errors(path: str | Path) -> Iterator[None]:
    """Turn what goes wrong when a checkpoint is read into a sentence.

    Args:
        path: The checkpoint.
    """
    if "://" not in str(path) and not Path(path).is_file():
        message = f"There is no checkpoint at {path}; training writes one to weights/lightning/model.ckpt."
        if earlier := _of_earlier_run(Path(path)):
            message += f" The newest run has ended without; an earlier one has {earlier}."
        raise CflowError(message)
    try:
        yield
    except CflowError:
        raise
    except UnpicklingError as error:
        message = (
            f"{path} holds other objects than tensors and settings, which are not loaded because they could run any "
            "code, or is damaged. Use a checkpoint that training wrote."
        )
        raise CflowError(message) from error
    except Exception as error:  # damaged files fail in many ways
        reason = str(error).strip().splitlines()[0][:200] if str(error).strip() else type(error).__name__
        message = f"{path} could not be read as a checkpoint of this model ({reason})."
        raise CflowError(message) from error


def check_weights(found: Mapping[str, torch.Tensor], model: nn.Module) -> None:
    """Raise if a checkpoint is of another model, or corrupt.

    Args:
        found: A checkpoint's tensors by their names.
        model: The model that it is to be loaded into.

    Raises:
        CflowError: If one is not, or a tensor of weights is not finite.
    """
    names = [name for name in model.state_dict() if not name.endswith("num_batches_tracked")]  # which nothing reads
    if missing := [name for name in (f"model.{name}" for name in names) if name not in found]:
        message = (
            f"The checkpoint is of another kind of model: it lacks {missing[0]}, and {len(missing)} weights in all."
        )
        raise CflowError(message)
    # What makes scores of likelihoods is not a number until training ends.
    weights = [f"model.{name}" for name in names if not name.startswith(("scoring.", "whole."))]
    if bad := [name for name in weights if not torch.isfinite(found[name]).all()]:
        message = f"The checkpoint's weights hold NaN or infinite values ({bad[0]}); train anew, or take an older one."
        raise CflowError(message)


def versions() -> dict[str, str]:
    """The versions that a checkpoint is made with, to be kept in it."""
    return {name: version(name) for name in _PACKAGES}


def warn_of_other_versions(made_with: Mapping[str, str] | None) -> None:
    """Warn if a checkpoint is of another release.

    Args:
        made_with: What :func:`versions` was then, or ``None``.
    """
    for name, found in versions().items():
        made = (made_with or {}).get(name)
        if made is not None and made.split(".")[:2] != found.split(".")[:2]:
            logger.warning(
                "The checkpoint was made with %s %s, and this is %s: compare a few scores before you rely on it.",
                name, made, found,
            )  # fmt: skip
