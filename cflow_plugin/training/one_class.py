"""What all models of this package have in common: one class, one way to read images, one set of metrics."""

__all__ = ["OneClassMixin"]

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from anomalib import LearningType
from anomalib.data import Batch, InferenceBatch
from anomalib.metrics import Evaluator
from anomalib.models.components import AnomalibModule
from anomalib.pre_processing import PreProcessor
from anomalib.visualization import ImageVisualizer
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities.types import STEP_OUTPUT
from torch import nn

from cflow_plugin.images.pre_processing import CflowPreProcessor
from cflow_plugin.metrics.evaluator import CflowEvaluator, write_metrics
from cflow_plugin.model.backbones import IMAGENET
from cflow_plugin.model.encoder import Encoder
from cflow_plugin.model.torch_model import CflowModel
from cflow_plugin.modules import in_full_single_precision
from cflow_plugin.training.checkpoints import translate_errors
from cflow_plugin.training.results import ResultFiles

logger = logging.getLogger(__name__)

_DEFAULT_SIZE = (256, 256)

# anomalib lists every direct subclass of its module as a model, which this is not.
_Module = AnomalibModule if TYPE_CHECKING else object


class OneClassMixin(_Module):
    """To be named in front of anomalib's own module among a model's bases."""

    @property
    def learning_type(self) -> LearningType:
        """One-class: training images are good parts."""
        return LearningType.ONE_CLASS

    @staticmethod
    def configure_pre_processor(image_size: tuple[int, int] | None = None) -> PreProcessor:
        """Resize, and normalise with ImageNet's constants; the encoder's own are taken by :meth:`pre_processing`."""
        return CflowPreProcessor.of(image_size or _DEFAULT_SIZE, *IMAGENET)

    @staticmethod
    def pre_processing(given: nn.Module | bool, encoder: Encoder, bits: int | None = None) -> nn.Module | bool:
        """The pre-processor that was asked for.

        Args:
            given: A pre-processor, of which its transform (and bits) are kept; or whether to use the default,
                which resizes and normalises as was done to the images that the encoder's weights were trained on.
            encoder: The encoder.
            bits: Bits of a value in the images; ``None`` where the training images decide.
        """
        if given is True:
            given = CflowPreProcessor.of(encoder.image_size or _DEFAULT_SIZE, *encoder.input)
        bits = getattr(given, "bits", None) if bits is None else bits
        return CflowPreProcessor(given.transform, bits) if isinstance(given, PreProcessor) else given

    @staticmethod
    def configure_evaluator() -> Evaluator:
        """Image AUROC and F1, pixel AUROC, AUPRO and F1."""
        return CflowEvaluator()

    def configure_callbacks(self) -> Sequence[Callback]:
        """anomalib's, but that pictures are written where none overwrites another."""
        callbacks = cast("Sequence[Callback]", super().configure_callbacks())
        if self.visualizer is not None and not isinstance(self.visualizer, ImageVisualizer):
            return [*callbacks, ResultFiles(None)]
        return [*(one for one in callbacks if one is not self.visualizer), ResultFiles(self.visualizer)]

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
        # In true half precision Lightning rounds the values of a batch, and anomalib's batch widens them again.
        images = self.trainer.precision_plugin.convert_input(images.to(self.device)).to(images.dtype)
        if isinstance(self.pre_processor, CflowPreProcessor):
            return self.pre_processor(images)
        # anomalib's engine calls the transform itself; its pre-processor's forward() resizes without smoothing.
        transform = getattr(self.pre_processor, "transform", None) or self.pre_processor
        return transform(images) if transform else images

    def features(self, images: torch.Tensor) -> list[torch.Tensor]:
        """What the encoder makes of images as they are loaded, to be trained on.

        The encoder computes in half precision where the trainer does (``--trainer.precision bf16-mixed``), which on a
        GPU saves most of its time.

        Args:
            images: ``(B, 3, H, W)``.

        Returns:
            For each layer ``(B, D_k, H_k, W_k)``, in the model's own number format.
        """
        prepared = self.prepared(images).to(self.dtype)
        with in_full_single_precision(), self.trainer.precision_plugin.forward_context():
            model: Any = self.model
            pyramid = (model.features if isinstance(model, CflowModel) else model.encoder)(prepared)
        return [part.to(self.dtype) for part in pyramid]

    def scored(self, images: torch.Tensor | None) -> InferenceBatch:
        """Scores and maps of prepared images, before post-processing.

        At least in single precision whatever the trainer's: an image has one score, in training, in use, and in a file.

        Args:
            images: ``(B, 3, H, W)``.
        """
        assert images is not None  # optional in anomalib's type only
        default = torch.get_default_dtype()
        torch.set_default_dtype(torch.float32)
        try:
            with in_full_single_precision(), torch.autocast(images.device.type, enabled=False):
                return self.model(images)
        finally:
            torch.set_default_dtype(default)

    def forward(self, batch: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        """What anomalib's own gives, with scores like those of :meth:`scored`."""
        with in_full_single_precision():
            return super().forward(batch, *args, **kwargs)

    def validation_step(self, batch: Batch, *args: Any, **kwargs: Any) -> STEP_OUTPUT:
        """Score a batch of validation images."""
        del args, kwargs
        return batch.update(**self.scored(batch.image)._asdict())

    predict_step = validation_step

    def test_step(self, batch: Batch, *args: Any, **kwargs: Any) -> STEP_OUTPUT:
        """Score a batch of test images, and let the metrics have the scores as they are before post-processing."""
        del args, kwargs
        result = self.scored(batch.image)
        if isinstance(self.evaluator, CflowEvaluator):
            self.evaluator.take_scores(result)
        return batch.update(**result._asdict())

    def on_test_end(self) -> None:
        """Write the metrics next to the pictures."""
        write_metrics(self.trainer)

    def teardown(self, stage: str) -> None:
        """Say, after Lightning has shown the metrics, where they are."""
        if stage == "test" and self.trainer.is_global_zero:
            folder = Path(self.trainer.default_root_dir).resolve()
            logger.info("Metrics, pictures and weights are in %s.", folder)
