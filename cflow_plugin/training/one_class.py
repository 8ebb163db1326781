"""What all models of this package have in common: one class, one way to read images, one set of metrics."""

__all__ = ["OneClassMixin", "pre_processor_of"]

import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from anomalib import LearningType
from anomalib.data import Batch
from anomalib.metrics import Evaluator
from anomalib.models.components import AnomalibModule
from anomalib.pre_processing import PreProcessor
from lightning.pytorch.utilities.types import STEP_OUTPUT

from cflow_plugin.images.pre_processing import CflowPreProcessor
from cflow_plugin.metrics.evaluator import CflowEvaluator, write_metrics
from cflow_plugin.model.backbones import IMAGENET
from cflow_plugin.model.encoder import Encoder
from cflow_plugin.training.checkpoints import translate_errors

logger = logging.getLogger(__name__)

_DEFAULT_SIZE = (256, 256)

# anomalib lists every direct subclass of its module as a model, which this is not.
_Module = AnomalibModule if TYPE_CHECKING else object


def pre_processor_of(encoder: Encoder) -> CflowPreProcessor:
    """Resize and normalise images as those were that the encoder's weights were trained on.

    Args:
        encoder: The encoder.
    """
    return CflowPreProcessor.of(encoder.image_size or _DEFAULT_SIZE, *encoder.input)


class OneClassMixin(_Module):
    """To be named in front of anomalib's own module among a model's bases."""

    @property
    def learning_type(self) -> LearningType:
        """One-class: training images are good parts."""
        return LearningType.ONE_CLASS

    @staticmethod
    def configure_pre_processor(image_size: tuple[int, int] | None = None) -> PreProcessor:
        """Resize, and normalise with ImageNet's constants; the encoder's own are in :func:`pre_processor_of`."""
        return CflowPreProcessor.of(image_size or _DEFAULT_SIZE, *IMAGENET)

    @staticmethod
    def configure_evaluator() -> Evaluator:
        """Image AUROC and F1, pixel AUROC, AUPRO and F1."""
        return CflowEvaluator()

    @classmethod
    def load_from_checkpoint(cls, checkpoint_path: str | Path, *args: Any, **kwargs: Any) -> Any:
        """Load a trained model; see Lightning's method of that name.

        Raises:
            CflowError: If the file is absent, damaged, of another model, or holds other objects than tensors.
        """
        with translate_errors(checkpoint_path):
            return super().load_from_checkpoint(checkpoint_path, *args, **kwargs)

    def prepared(self, images: torch.Tensor) -> torch.Tensor:
        """Images ``(B, 3, H, W)`` as they are loaded to what the model takes, on its device."""
        images = images.to(self.device)
        return self.pre_processor(images) if self.pre_processor else images

    def validation_step(self, batch: Batch, *args: Any, **kwargs: Any) -> STEP_OUTPUT:
        """Score a batch of validation images."""
        del args, kwargs
        return batch.update(**self.model(batch.image)._asdict())

    def on_test_end(self) -> None:
        """Write the metrics next to the pictures."""
        write_metrics(self.trainer)

    def teardown(self, stage: str) -> None:
        """Say, after Lightning has shown the metrics, where they are."""
        if stage == "test" and self.trainer.is_global_zero:
            folder = Path(self.trainer.default_root_dir).resolve()
            logger.info("Metrics, pictures and weights are in %s.", folder)
