"""How the decoders are trained (section 5.1), as an anomalib model: its settings, and what Lightning calls when."""

__all__ = ["CflowPlugin"]

import inspect
from collections.abc import Sequence
from typing import Any, Literal, cast

from anomalib.metrics import Evaluator
from anomalib.models.components import AnomalibModule
from anomalib.post_processing import PostProcessor
from anomalib.visualization import Visualizer
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities.types import STEP_OUTPUT, OptimizerLRScheduler
from torch import nn

from cflow_plugin.anomalib_patches.registration import publish
from cflow_plugin.anomalib_patches.screen import keep_quiet
from cflow_plugin.decisions.post_processing import post_processing
from cflow_plugin.decisions.reference_images import ReferenceImages
from cflow_plugin.deploy.export import FoldedExport
from cflow_plugin.images.checking import ImageFileCheck
from cflow_plugin.model.encoder import Padding, Precision
from cflow_plugin.model.flow import Permutation
from cflow_plugin.model.scoring import Aggregation
from cflow_plugin.model.torch_model import CflowModel
from cflow_plugin.training import checkpoints, optimization, resuming
from cflow_plugin.training.best import KeepBest
from cflow_plugin.training.calibration import Calibration
from cflow_plugin.training.distributed import ScoreEveryImageOnce, join_processes
from cflow_plugin.training.feature_bank import VectorBatch
from cflow_plugin.training.loss import logged_loss
from cflow_plugin.training.one_class import OneClassMixin
from cflow_plugin.training.preparation import prepare
from cflow_plugin.training.settings import (
    check_not_negative,
    check_positive,
    check_region,
    false_alarm_rate,
    one_image_at_a_time,
    plan_run,
    refuse_tiler,
)
from cflow_plugin.training.vector_loader import TrainOnVectors

_OF_NETWORK = inspect.signature(CflowModel).parameters


class CflowPlugin(FoldedExport, OneClassMixin, AnomalibModule):
    """CFLOW-AD: conditional normalizing flows over a pretrained CNN's multi-scale features.

    The encoder runs over the training images once (in each epoch, if there are random augmentations); a training step
    then takes feature vectors of many images and positions at each scale and descends the summed loss of all scales.

    Args:
        backbone: timm name of the encoder, a CNN or a transformer; `cflow-plugin encoders` lists them.
        layers: Layers to take features from, fine to coarse: names, numbers among timm's features, or ``stride8``. By
            default the paper's three, or those at strides 8, 16 and 32, or three blocks of a plain transformer.
        encoder_precision: ``int8`` lets the convolutions of the encoder compute with 8-bit numbers, in training as in
            exported files, see :mod:`~cflow_plugin.model.quantized`.
        pre_trained: Give the encoder trained weights: those of ``weights`` or else timm's; ``false``: no weights.
        weights: Local file or folder with the encoder's weights, for machines without a network.
        image_size: Height and width in pixels that images are resized to; rounded to what the encoder's patches take.
        tile_size: Let a convolutional encoder see larger images in tiles of so many pixels, for bounded memory.
        condition_dims: Length of the positional condition vector; 0 makes the decoders unconditional (UFLOW).
        coupling_blocks: Coupling blocks of each decoder; the paper has 8, which take twice the time.
        clamp: Soft clamp of the coupling blocks' log-scales.
        permutation: ``swap`` exchanges halves between blocks, ``random`` permutes (paper), ``soft`` rotates (its code).
        neighbourhood: Average features over so many cells in either direction (odd), one number or one for each layer;
            1 as in the paper. By default 1 for the finest layer and 3 for the others.
        padding: Beyond the border convolutions see ``zeros``, or their input mirrored (``reflect``), as originally.
        whiten: Start the decoders from the training features' covariance. The paper does not.
        flow_dimensions: Of longer vectors that are whitened the coupling blocks take so many principal components; what
            is left is taken to be Gaussian. ``null`` takes all, as the paper does.
        camera_variation: How much a camera may vary, see :mod:`~cflow_plugin.training.camera`. 0 as in the paper.
        noise: Standard deviation of noise on training features, in units of their whitened one. 0 as in the paper.
        sigma: Gaussian smoothing of the anomaly map in pixels; 0 as in the paper.
        top_fraction: The image score is the mean of this fraction of the map's highest pixels; 0: maximum (paper).
        position_correction: Share of a position's mean log-likelihood that is not held against it; the outermost
            cells, which see the encoder's zero padding, are corrected in full. 0 as in the paper.
        aggregation: ``surprise`` multiplies the scales' evidence, measured by how rare it is among good cells;
            ``probability`` adds up probabilities as in the paper.
        map_mean: What the map's mean counts in the image score, beside its highest pixels; 0 as in the paper.
            See :class:`~cflow_plugin.model.scoring.AnomalyScoring`.
        whole_image: What the image as a whole counts in its score, in units of what its map does; 0 as in the paper.
            See :class:`~cflow_plugin.model.whole.WholeImage`.
        unseen_share: Share of the training images that only says how likely good cells are; 0 with fewer than eight.
        epochs: Length, where ``--trainer.max_epochs`` sets none; by default it grows with the number of images.
        steps_per_epoch: Optimisation steps in an epoch; by default as many as one pass over all feature vectors takes.
        vectors_per_step: Feature vectors of the finest scale in a step; coarser scales have their share.
        learning_rate: Peak learning rate of Adam.
        schedule: ``one_cycle`` or ``cosine``.
        warmup_epochs: Epochs of linear warm-up before ``cosine``.
        target_false_alarm_rate: Share of good images that may be called anomalous, for example 0.05. Thresholds then
            come from held-out good images alone. ``null`` asks for anomalib's, which maximise F1 on the validation
            images. ``auto`` does so where that is sound, and takes 0.05 where these are the test images or show no
            defect. See :class:`~cflow_plugin.decisions.post_processing.ConformalPostProcessor`.
        held_out_share: Share of the training images that is held out where a false-alarm rate is to be kept and does
            not need more of them. Validation images that are all good, and enough, are taken instead.
        held_out_images: Folder of other good images to take instead; then all training images are trained on.
        region_of_interest: What is looked at: a mask image's file; ``bright`` or ``dark`` for what is so in the mean
            training picture; boxes and polygons, ``[[left, top, right, bottom], …]`` in shares of width and height.
        ignored_border: Pixels of the map at its edges that are not looked at.
        smallest_region: Pixels of the map that a region has at least to be shown; the thresholds are set for it.
        most_regions: Regions shown of an image, those with the highest peaks; by default all.
        mm_per_pixel: Length of a picture's pixel in millimetres, for areas in mm².
        bits: Bits of a value in the images, up to 16 in a grey camera's files. By default the training images decide.
        pre_processor: Pre-processor, or whether to use the default one.
        post_processor: Post-processor, or whether to use the default one.
        evaluator: Evaluator, or whether to use the default one.
        visualizer: Visualizer, or whether to use the default one.

    Raises:
        CflowError: If a setting is out of range, or the encoder cannot be built.

    Example:
        >>> from anomalib.data import MVTecAD
        >>> from anomalib.engine import Engine
        >>> from cflow_plugin import CflowPlugin
        >>> Engine().train(model=CflowPlugin(), datamodule=MVTecAD(category="screw"))  # doctest: +SKIP

    References:
        Gudovskiy, Ishizaka, Kozuka: CFLOW-AD: Real-Time Unsupervised Anomaly Detection with Localization via
        Conditional Normalizing Flows. WACV 2022.
    """

    def __init__(
        self,
        backbone: str = "resnet18",
        layers: list[str | int] | None = None,
        encoder_precision: Precision = "float32",
        pre_trained: bool = True,
        weights: str | None = None,
        image_size: tuple[int, int] = (256, 256),
        tile_size: int | None = None,
        condition_dims: int = 128,
        coupling_blocks: int = 4,
        clamp: float = 1.9,
        permutation: Permutation = "swap",
        neighbourhood: int | list[int] | None = None,
        padding: Padding = "zeros",
        whiten: bool = True,
        flow_dimensions: int | None = 256,
        camera_variation: float = 1.0,
        noise: float = 0.6,
        sigma: float = 2.0,
        top_fraction: float = 0.0025,
        position_correction: float = 0.25,
        aggregation: Aggregation = "surprise",
        map_mean: float = 0.15,
        whole_image: float = 2.0,
        unseen_share: float = 0.1,
        epochs: int | None = None,
        steps_per_epoch: int | None = 30,
        vectors_per_step: int = 512,
        learning_rate: float = 2e-3,
        schedule: optimization.Schedule = "one_cycle",
        warmup_epochs: int = 0,
        target_false_alarm_rate: float | Literal["auto"] | None = "auto",
        held_out_share: float = 0.2,
        held_out_images: str | None = None,
        region_of_interest: str | list[list[float]] | None = None,
        ignored_border: int = 0,
        smallest_region: int = 1,
        most_regions: int | None = None,
        mm_per_pixel: float | None = None,
        bits: int | None = None,
        pre_processor: nn.Module | bool = True,
        post_processor: PostProcessor | bool = True,
        evaluator: Evaluator | bool = True,
        visualizer: Visualizer | bool = True,
    ) -> None:
        check_positive(epochs=epochs, steps_per_epoch=steps_per_epoch, vectors_per_step=vectors_per_step)
        check_positive(learning_rate=learning_rate, clamp=clamp)
        check_not_negative(noise=noise, unseen_share=unseen_share, camera_variation=camera_variation)
        check_region(smallest_region, image_size)
        rate, may_choose_rate = false_alarm_rate(target_false_alarm_rate, post_processor is True)
        flow_dimensions = flow_dimensions if whiten else None
        network = CflowModel(**{name: value for name, value in locals().items() if name in _OF_NETWORK})
        super().__init__(
            pre_processor=self.pre_processing(pre_processor, network.encoder, bits),
            post_processor=post_processing(
                post_processor,
                rate,
                smallest_region=smallest_region,
                most_regions=most_regions,
                mm_per_pixel=mm_per_pixel,
            ),
            evaluator=evaluator,
            visualizer=visualizer,
        )
        size = network.encoder.image_size or image_size  # rounded where that was needed
        self.hparams.update(image_size=size, flow_dimensions=flow_dimensions)
        self.model: CflowModel = network  # pyright: ignore[reportIncompatibleVariableOverride]
        self.reference = ReferenceImages(held_out_share, held_out_images, may_choose_rate)
        self.progress = resuming.Progress()
        self.calibration = Calibration()

    @property
    def trainer_arguments(self) -> dict[str, Any]:
        """No sanity check: before training there is nothing to validate."""
        keep_quiet()
        return {"num_sanity_val_steps": 0}

    def configure_callbacks(self) -> Sequence[Callback]:
        """A look at the images, vectors in their place, thresholds, and a checkpoint to resume a dead run from."""
        refuse_tiler(self.trainer)
        checkpoints.keep_last_epoch(self.trainer)
        best = KeepBest(self.calibration, self.progress.pace, lambda: self.progress.seed_of(self.trainer))
        vectors = TrainOnVectors(lambda images: prepare(self, images))
        own = [ImageFileCheck(), vectors, ScoreEveryImageOnce(), best, self.calibration]
        return [*cast("Sequence[Callback]", super().configure_callbacks()), *own]

    def setup(self, stage: str) -> None:
        """Join the other processes, and plan the run."""
        join_processes(self.trainer)
        checkpoints.use_checkpoint_files(self.trainer)
        one_image_at_a_time(self.trainer, self.model.tile_size)
        if stage == "fit":
            plan_run(self.trainer, self.hparams["epochs"])

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """Adam on the decoders, with the schedule asked for."""
        settings = {name: self.hparams[name] for name in ("learning_rate", "schedule", "warmup_epochs")}
        return optimization.configure(self.model.decoders.parameters(), self.trainer, self.progress.pace, **settings)

    def on_train_start(self) -> None:
        """Refuse to go on with a run for longer than it was planned for."""
        self.progress.plan(self.trainer)

    def training_step(self, batch: VectorBatch, batch_idx: int) -> STEP_OUTPUT:
        """Compute the loss of one batch, summed over scales."""
        del batch_idx
        self.log("learning_rate", self.trainer.optimizers[0].param_groups[0]["lr"], batch_size=1)
        return logged_loss(self, batch)

    def on_fit_end(self) -> None:
        """Leave a model where it is looked for."""
        self.reference.loader = None
        self.progress.continued_from = self.trainer.ckpt_path
        checkpoints.write_missing_checkpoints(self.trainer)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep what a resumed run has to know beside weights."""
        super().on_save_checkpoint(checkpoint)
        self.progress.write(checkpoint, self.reference, self.model.encoder)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Take over the checkpoint's settings, and note that the weights are its own.

        Raises:
            CflowError: If it is of another kind of model, or its weights are not finite.
        """
        if self.progress.tests_what_was_trained(self, checkpoint):
            return
        super().on_load_checkpoint(checkpoint)
        resuming.take_over_settings(self, checkpoint.get("hyper_parameters", {}))
        checkpoints.check_weights(checkpoint["state_dict"], self.model)
        self.progress.read(checkpoint, self.reference, self.model.encoder, resuming.trainer_of(self))


publish("anomalib.models", CflowPlugin)
