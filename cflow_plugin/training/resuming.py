"""What a checkpoint brings beside weights: settings, seed, reference images, and the planned length of the run."""

__all__ = ["Progress", "take_over_settings"]

import inspect
import logging
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from anomalib.models.components import AnomalibModule
from lightning import Trainer
from lightning.pytorch.trainer.states import TrainerFn

from cflow_plugin.anomalib_patches.augmentations import resize_as_model_does
from cflow_plugin.decisions.reference_images import ReferenceImages
from cflow_plugin.errors import CflowError
from cflow_plugin.model.encoder import Encoder
from cflow_plugin.model.torch_model import CflowModel
from cflow_plugin.training.checkpoints import versions, warn_of_other_versions
from cflow_plugin.training.optimization import Pace

if TYPE_CHECKING:
    from pathlib import Path

logger = logging.getLogger(__name__)

_KEY = "cflow_plugin"


class Progress:
    """How far a model has come, in this run and in the one that it goes on from.

    Attributes:
        training_has_begun: Whether the decoders have seen training images.
        seed: Seed of the training batches and of the choice of reference images.
        planned_steps: Optimisation steps over which the learning rate falls.
        pace: Which share of the run is done.
        continued_from: The checkpoint that the last training went on from.
    """

    def __init__(self) -> None:
        self.training_has_begun = False
        self.seed: int | None = None
        self.planned_steps: int | None = None
        self.pace = Pace()
        self.continued_from: str | Path | None = None

    def seed_of(self, trainer: Trainer) -> int:
        """The seed, drawn on first use: one for all processes, which have to draw the same batches.

        Args:
            trainer: The trainer; every process has to call this.
        """
        if self.seed is None:
            self.seed = trainer.strategy.broadcast(torch.initial_seed() % 2**31)
        return self.seed

    def plan(self, trainer: Trainer) -> None:
        """Note the length of a run that begins; refuse to go on for longer than that.

        Args:
            trainer: The trainer, about to train.

        Raises:
            CflowError: If a run that is resumed is to be longer: its learning rate has come to its end.
        """
        asked = trainer.estimated_stepping_batches
        if trainer.ckpt_path is None or self.planned_steps is None:
            self.planned_steps = None if asked == float("inf") else int(asked)
        elif asked > self.planned_steps and trainer.max_epochs:
            epochs = self.planned_steps * trainer.max_epochs / asked
            msg = (
                f"This run was planned for {epochs:.0f} epochs, over which its learning rate falls, and cannot go on "
                f"for {trainer.max_epochs}. Leave the number of epochs as it was, or train anew."
            )
            raise CflowError(msg)

    def write(self, checkpoint: dict[str, Any], reference: ReferenceImages, encoder: Encoder) -> None:
        """Add to a checkpoint what a resumed run has to know, as plain values.

        Args:
            checkpoint: What Lightning writes.
            reference: The images that set the thresholds.
            encoder: The encoder, whose weights' source is kept.
        """
        checkpoint[_KEY] = {
            "seed": self.seed,
            "planned_steps": self.planned_steps,
            "pace": self.pace.state(),
            "reference_images": reference.chosen,
            "reference_files": reference.files,
            "reference_steps": reference.steps,
            "encoder_weights": encoder.source,
            "versions": versions(),
        }

    def read(
        self, checkpoint: Mapping[str, Any], reference: ReferenceImages, encoder: Encoder, trainer: Trainer | None
    ) -> None:
        """Go on from a checkpoint.

        Args:
            checkpoint: What Lightning read.
            reference: Is told which images set the thresholds.
            encoder: The encoder, whose weights it brings.
            trainer: The trainer, if there is one.

        Raises:
            CflowError: If a run is to end before the epoch that the checkpoint is of.
        """
        done, longest = checkpoint.get("epoch", 0), trainer.max_epochs if trainer else None
        if trainer and trainer.state.fn == TrainerFn.FITTING and longest is not None and 0 <= longest < done:
            msg = (
                f"The checkpoint is of epoch {done}, and this run ends with epoch {longest}: set --model.epochs higher."
            )
            raise CflowError(msg)
        found = checkpoint.get(_KEY, {})
        warn_of_other_versions(found.get("versions"))
        self.seed, self.planned_steps = found.get("seed"), found.get("planned_steps")
        self.pace.restore(found.get("pace", {}))
        self.training_has_begun = True
        encoder.source = found.get("encoder_weights") or "a checkpoint that does not say where they are from"
        reference.chosen, reference.files = found.get("reference_images"), found.get("reference_files", [])
        reference.steps = found.get("reference_steps", [])

    def tests_what_was_trained(self, module: AnomalibModule, checkpoint: dict[str, Any]) -> bool:
        """Whether a test is of the model as it was just trained; the checkpoint is then made to hold that model.

        anomalib's ``Engine.train`` tests what it was given to go on from; wanted is what came of it.

        Args:
            module: The model.
            checkpoint: What it is about to be restored from.
        """
        if self.continued_from is None or module.trainer.state.fn != TrainerFn.TESTING:
            return False
        continued_from, self.continued_from = self.continued_from, None
        if continued_from != module.trainer.ckpt_path:
            return False
        logger.info("Testing the model as trained, and not %s, which it went on from.", continued_from)
        checkpoint["state_dict"] = module.state_dict()
        checkpoint.pop("callbacks", None)  # the post-processor is one, and its thresholds are there, too
        return True


def take_over_settings(module: AnomalibModule, found: Mapping[str, Any]) -> None:
    """Build the model anew if a checkpoint was made with other settings: its weights and thresholds need them.

    Args:
        module: The model.
        found: The checkpoint's settings.
    """
    found = {name: list(value) if name == "image_size" else value for name, value in found.items()}
    built_with = {name: found[name] for name in inspect.signature(CflowModel).parameters if name in found}
    given = {**module.hparams, "image_size": list(module.hparams["image_size"])}
    other = {name: value for name, value in built_with.items() if value != given.get(name)}
    if other:
        module.model = CflowModel(**built_with).to(module.device)
        settings = ", ".join(f"{name}={value}" for name, value in other.items())
        logger.info("The checkpoint was made with %s; this is what is used.", settings)
        module.hparams.update(other)
    data = getattr(trainer_of(module), "datamodule", None)
    if data is not None:  # it resizes images, too, and was set up before the checkpoint brought its pre-processing
        resize_as_model_does(data)


def trainer_of(module: AnomalibModule) -> Trainer | None:
    try:
        return module.trainer
    except RuntimeError:  # it has none
        return None
