"""SPADE as an anomalib model: one pass over the training images fills its gallery."""

__all__ = ["Spade"]

import logging
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from anomalib.data import Batch
from anomalib.metrics import Evaluator
from anomalib.models.components import AnomalibModule, MemoryBankMixin
from anomalib.post_processing import PostProcessor
from anomalib.visualization import Visualizer
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities.types import STEP_OUTPUT
from torch import nn

from cflow_plugin.anomalib_patches.registration import publish
from cflow_plugin.anomalib_patches.screen import keep_quiet
from cflow_plugin.baselines.spade.torch_model import SpadeModel
from cflow_plugin.errors import CflowError
from cflow_plugin.images.checking import ImageFileCheck
from cflow_plugin.model import weights as encoder_weights
from cflow_plugin.training.checkpoints import use_checkpoint_files
from cflow_plugin.training.one_class import OneClassMixin

logger = logging.getLogger(__name__)


class Spade(OneClassMixin, MemoryBankMixin, AnomalibModule):
    """SPADE: the nearest training images, and the nearest positions in their feature pyramids.

    Nothing is learned: the features of all training images are kept and travel in the checkpoint (at 256×256 some 1.8
    MiB an image with ResNet-18's first three stages, 7 with Wide ResNet-50's, half of it with ``half_precision``).

    Args:
        backbone: timm name of the encoder; the default is the paper's. ``gabor`` is a fixed bank of filters that needs
            no download (layers ``scale1`` to ``scale4``), for trying things out.
        layers: Layers of the feature pyramid; coarser ones are brought to the finest one's resolution.
        image_layer: Layer whose average over the image is used to retrieve images and to score them. With a weights
            file that ends earlier than ``layer4`` name its last layer.
        pre_trained: Give the encoder ImageNet weights: those of ``weights``, or else timm's. ``false`` leaves it
            untrained.
        weights: Local file with the encoder's weights (.safetensors or .pth), for machines without internet access.
        image_size: Height and width in pixels that images are resized to.
        k: Nearest training images to retrieve and to average the image score over; all where there are fewer.
        kappa: Nearest positions in the retrieved images to average a position's distance over.
        sigma: Gaussian smoothing of the anomaly map in pixels; 0 switches it off.
        half_precision: Keep the pyramids of the training images in float16: half the memory and half the checkpoint.
        pre_processor: Pre-processor, or whether to use the default one.
        post_processor: Post-processor, or whether to use the default one.
        evaluator: Evaluator, or whether to use the default one.
        visualizer: Visualizer, or whether to use the default one.

    Raises:
        CflowError: If a setting is out of range, or the encoder cannot be built.

    Example:
        >>> from anomalib.data import MVTecAD
        >>> from anomalib.engine import Engine
        >>> from cflow_plugin import Spade
        >>> Engine().train(model=Spade(), datamodule=MVTecAD(category="screw"))  # doctest: +SKIP

    References:
        Cohen, Hoshen: Sub-Image Anomaly Detection with Deep Pyramid Correspondences. arXiv:2005.02357, 2020.
    """

    def __init__(
        self,
        backbone: str = "wide_resnet50_2",
        layers: Sequence[str] = ("layer1", "layer2", "layer3"),
        image_layer: str = "layer4",
        pre_trained: bool = True,
        weights: str | None = None,
        image_size: tuple[int, int] = (256, 256),
        k: int = 50,
        kappa: int = 1,
        sigma: float = 4.0,
        half_precision: bool = False,
        pre_processor: nn.Module | bool = True,
        post_processor: PostProcessor | bool = True,
        evaluator: Evaluator | bool = True,
        visualizer: Visualizer | bool = True,
    ) -> None:
        network = SpadeModel(backbone, layers, image_layer, k, kappa, sigma, half_precision, image_size)
        super().__init__(
            pre_processor=self.pre_processing(pre_processor, network.encoder),
            post_processor=post_processor,
            evaluator=evaluator,
            visualizer=visualizer,
        )
        self.hparams["image_size"] = network.encoder.image_size or image_size  # rounded where that was needed
        self.pre_trained = pre_trained
        self.weights = weights
        self.model: SpadeModel = network  # pyright: ignore[reportIncompatibleVariableOverride]  is any module there

    # What anomalib asks a model

    @property
    def trainer_arguments(self) -> dict[str, Any]:
        """One pass over the training images, on one device."""
        keep_quiet()
        warnings.filterwarnings("ignore", message=".*returned `None`, this fit will run with no optimizer")
        return {"max_epochs": 1, "num_sanity_val_steps": 0, "devices": 1}

    def configure_optimizers(self) -> None:
        """There is nothing to optimise."""

    def configure_callbacks(self) -> Sequence[Callback]:
        """Add a look at the images."""
        callbacks = super().configure_callbacks()
        return [*([callbacks] if isinstance(callbacks, Callback) else callbacks), ImageFileCheck()]

    # Training

    def setup(self, stage: str) -> None:
        """Load the encoder's weights, unless a checkpoint brings them."""
        use_checkpoint_files(self.trainer)
        if stage == "fit" and self.trainer.ckpt_path is None:
            encoder_weights.load(self.model.encoder, self.weights, self.pre_trained)

    def on_train_epoch_start(self) -> None:
        """Begin a gallery, also where the model had one from an earlier training."""
        self.model.gallery.clear()
        self._is_fitted = torch.zeros_like(self._is_fitted)

    def training_step(self, batch: Batch, *args: Any, **kwargs: Any) -> STEP_OUTPUT:
        """Add a batch of training images to the gallery."""
        del args, kwargs
        assert batch.image is not None  # optional in anomalib's type only
        self.model.gallery.add(*self.model.features(batch.image))
        # Lightning counts steps, and so writes a checkpoint, only where there is a loss.
        return torch.zeros((), device=self.device, requires_grad=True)

    def fit(self) -> None:
        """Finish the gallery; anomalib calls this when the training images are through."""
        self.model.finish_gallery()
        gallery = self.model.gallery
        logger.info("The gallery of %d training images takes %.0f MiB.", len(gallery), gallery.megabytes)
        if len(gallery) < self.model.k:
            logger.warning("There are %d training images, fewer than k = %d: all are used.", len(gallery), self.model.k)

    # Export

    def to_onnx(self, *args: Any, **kwargs: Any) -> Path:
        """Refuse: see :meth:`to_openvino`.

        Raises:
            CflowError: Always.
        """
        del args, kwargs
        raise CflowError(self._why_no_graph("ONNX"))

    def to_openvino(self, *args: Any, **kwargs: Any) -> Path:
        """Refuse: the gallery is data, not a model.

        Raises:
            CflowError: Always.
        """
        del args, kwargs
        raise CflowError(self._why_no_graph("OpenVINO"))

    def _why_no_graph(self, kind: str) -> str:
        size = self.model.gallery.megabytes
        return (
            f"Spade is not exported to {kind}: its gallery of training features, {size:.0f} MiB, would be "
            "constants of the graph, and which of them are compared differs from image to image; use "
            "--export_type torch, or train CflowPlugin, whose file needs no training features."
        )


publish("anomalib.models", Spade)
