"""How the decoders are trained (section 5.1), as an anomalib model."""

__all__ = ["CflowPlugin"]

import inspect
import logging
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from copy import copy
from pathlib import Path
from typing import Any, Literal

import torch
from anomalib import LearningType, TaskType
from anomalib.data import AnomalibDataModule, Batch
from anomalib.data.utils import ValSplitMode
from anomalib.deploy import CompressionType, ExportType
from anomalib.metrics import Evaluator
from anomalib.models.components import AnomalibModule
from anomalib.models.components.base.export_mixin.utils import create_export_root
from anomalib.post_processing import PostProcessor
from anomalib.pre_processing import PreProcessor
from anomalib.visualization import Visualizer
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.types import STEP_OUTPUT, OptimizerLRScheduler
from torch import nn
from torch.nn import functional
from torch.optim.lr_scheduler import CosineAnnealingLR, LinearLR, OneCycleLR, SequentialLR
from torch.utils.data import DataLoader
from torchmetrics import Metric
from torchvision.transforms.v2 import Compose, Identity, Normalize, Resize, Transform

from cflow_plugin.checkpoints import (
    check_weights,
    explained,
    use_checkpoint_files,
    versions,
    warn_of_other_versions,
)
from cflow_plugin.decisions.held_out import HeldOutImages, part_of
from cflow_plugin.decisions.post_processing import ConformalPostProcessor
from cflow_plugin.distributed import (
    let_first_process_speak,
    score_every_image_once,
    share_of_batch,
    share_results_folder,
)
from cflow_plugin.encoder import Padding
from cflow_plugin.errors import CflowError
from cflow_plugin.evaluation import CflowEvaluator, write_metrics
from cflow_plugin.feature_bank import FeatureBank, VectorBatch
from cflow_plugin.files import arriving
from cflow_plugin.flow import Permutation
from cflow_plugin.image_check import ImageFileCheck
from cflow_plugin.pre_processing import CflowPreProcessor
from cflow_plugin.torch_model import CflowModel

logger = logging.getLogger(__name__)

# The scoring constants are means and quantiles over all positions of this many training images, whose sampling error is
# far below their effect. A model still in training makes do with fewer: they serve if the run is cut off there.
_CALIBRATION_IMAGES = 128
_INTERIM_CALIBRATION_IMAGES = 4
_LIGHTNING_DEFAULT_EPOCHS = 1000


class CflowPlugin(AnomalibModule):
    """CFLOW-AD: conditional normalizing flows over a pretrained CNN's multi-scale features.

    The encoder runs over the training images once (in each epoch, if there are random augmentations); a training step
    then takes feature vectors of many images and positions at each scale and descends the summed loss of all scales.

    Args:
        backbone: timm name of the encoder. ``resnet18``, ``wide_resnet50_2`` and ``mobilenetv3_large_100`` are the
            paper's; any other timm CNN works with its ``layers`` named. ``gabor`` is a fixed bank of filters that needs
            no download, for trying things out.
        layers: Layers of the encoder to take features from, fine to coarse. By default the paper's three.
        pre_trained: Give the encoder ImageNet weights: those of ``weights``, or else timm's. ``false`` leaves it
            untrained.
        weights: Local file with the encoder's weights (.safetensors or .pth), for machines without internet access.
        image_size: Height and width in pixels that images are resized to.
        condition_dims: Length of the positional condition vector; 0 makes the decoders unconditional (UFLOW).
        coupling_blocks: Coupling blocks of each decoder.
        clamp: Soft clamp of the coupling blocks' log-scales.
        permutation: ``swap`` exchanges the halves of a vector between blocks, ``random`` permutes it as in the paper,
            ``soft`` multiplies it by a random orthogonal matrix as the original code does.
        neighbourhood: Average each feature over this many cells in either direction (odd); 1 as in the paper.
        padding: What the encoder's convolutions see beyond the border: ``zeros``, or their own input mirrored
            (``reflect``), as in the original code's ResNets.
        whiten: Start the decoders from the training features' covariance. The paper does not.
        noise: Standard deviation of the noise added to training features, in units of their own (whitened) standard
            deviation. It keeps the decoders from learning few training images by heart. 0 as in the paper.
        sigma: Gaussian smoothing of the anomaly map in pixels; 0 as in the paper.
        top_fraction: The image score is the mean over this fraction of the map's highest pixels; 0 takes the maximum
            as the paper does.
        position_correction: Share of a position's mean log-likelihood over the training images that is not held
            against it; the outermost cells, which see the encoder's zero padding, are corrected in full. 0 as in the
            paper.
        epochs: Length of the recipe in epochs, where ``--trainer.max_epochs`` does not set another.
        steps_per_epoch: Optimisation steps in an epoch; by default as many as one pass over all feature vectors takes.
        vectors_per_step: Feature vectors of the finest scale in a step; coarser scales take part in proportion to
            their positions.
        learning_rate: Peak learning rate of Adam.
        schedule: ``one_cycle`` or ``cosine``.
        warmup_epochs: Epochs of linear warm-up before ``cosine``.
        target_false_alarm_rate: Share of good images that may be called anomalous, for example 0.05. Thresholds then
            come from good images that are held out of training, and nothing is fitted on images of defects. ``null``
            asks for anomalib's thresholds, which maximise F1 on the validation images. ``auto`` does so where that is
            sound, and takes 0.05 where the validation images are the test images or show no defect. See
            :class:`~cflow_plugin.decisions.post_processing.ConformalPostProcessor`.
        held_out_share: Share of the training images that is held out where a false-alarm rate is to be kept and does
            not need more of them. Validation images that are all good, and enough, are taken instead.
        held_out_images: Folder of other good images to take instead; then all training images are trained on.
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
        layers: list[str] | None = None,
        pre_trained: bool = True,
        weights: str | None = None,
        image_size: tuple[int, int] = (256, 256),
        condition_dims: int = 128,
        coupling_blocks: int = 8,
        clamp: float = 1.9,
        permutation: Permutation = "swap",
        neighbourhood: int = 3,
        padding: Padding = "zeros",
        whiten: bool = True,
        noise: float = 0.6,
        sigma: float = 4.0,
        top_fraction: float = 0.01,
        position_correction: float = 0.25,
        epochs: int = 8,
        steps_per_epoch: int | None = 30,
        vectors_per_step: int = 512,
        learning_rate: float = 2e-3,
        schedule: Literal["one_cycle", "cosine"] = "one_cycle",
        warmup_epochs: int = 0,
        target_false_alarm_rate: float | Literal["auto"] | None = "auto",
        held_out_share: float = 0.2,
        held_out_images: str | None = None,
        pre_processor: nn.Module | bool = True,
        post_processor: PostProcessor | bool = True,
        evaluator: Evaluator | bool = True,
        visualizer: Visualizer | bool = True,
    ) -> None:
        for name, value in (
            ("epochs", epochs),
            ("steps_per_epoch", steps_per_epoch),
            ("vectors_per_step", vectors_per_step),
            ("learning_rate", learning_rate),
        ):
            if value is not None and not value > 0:
                msg = f"{name} must be above 0, got {value}."
                raise CflowError(msg)
        if not noise >= 0:
            msg = f"noise must not be negative, got {noise}."
            raise CflowError(msg)
        rate = None if target_false_alarm_rate == "auto" else target_false_alarm_rate
        if rate is not None and post_processor is not True:
            msg = "Give target_false_alarm_rate or a post_processor, not both: ConformalPostProcessor takes the rate."
            raise CflowError(msg)
        may_choose_rate = target_false_alarm_rate == "auto" and post_processor is True
        held_out = HeldOutImages(held_out_share, held_out_images, may_choose_rate)
        if post_processor is True:
            post_processor = ConformalPostProcessor(rate)
        super().__init__(
            pre_processor=self.configure_pre_processor(tuple(image_size)) if pre_processor is True else pre_processor,
            post_processor=post_processor,
            evaluator=evaluator,
            visualizer=visualizer,
        )
        self.pre_trained = pre_trained
        self.weights = weights
        self.whiten = whiten
        self.noise = noise
        self.epochs = epochs
        self.steps_per_epoch = steps_per_epoch
        self.vectors_per_step = vectors_per_step
        self.learning_rate = learning_rate
        self.schedule = schedule
        self.warmup_epochs = warmup_epochs
        self.model: CflowModel = CflowModel(
            backbone=backbone,
            layers=layers,
            condition_dims=condition_dims,
            coupling_blocks=coupling_blocks,
            clamp=clamp,
            permutation=permutation,
            neighbourhood=neighbourhood,
            padding=padding,
            sigma=sigma,
            top_fraction=top_fraction,
            position_correction=position_correction,
        )
        self._encoder_is_loaded = False
        self._training_has_begun = False
        self._calibrated_step = -1
        self._seed: int | None = None
        self._continued_from: str | Path | None = None
        self._bank: FeatureBank | None = None
        self._held_out = held_out

    # What anomalib asks a model

    @property
    def learning_type(self) -> LearningType:
        """One-class: training images are good parts."""
        return LearningType.ONE_CLASS

    @property
    def trainer_arguments(self) -> dict[str, Any]:
        """No sanity check: before training there is nothing to validate."""
        # The recipe has a length of its own, and the encoder is in eval mode by intention.
        warnings.filterwarnings("ignore", message=".*max_epochs. was not set")
        warnings.filterwarnings("ignore", message=".*in eval mode at the start of training")
        return {"num_sanity_val_steps": 0}

    @classmethod
    def configure_pre_processor(cls, image_size: tuple[int, int] | None = None) -> PreProcessor:
        """Resize and normalise."""
        return CflowPreProcessor(super().configure_pre_processor(image_size).transform)

    @staticmethod
    def configure_evaluator() -> Evaluator:
        """Image AUROC and F1, pixel AUROC, AUPRO and F1."""
        return CflowEvaluator()

    def configure_callbacks(self) -> Sequence[Callback]:
        """Add a checkpoint after every epoch, so that a run that dies can be resumed, and a look at the images."""
        last = ModelCheckpoint(filename="last", save_on_train_epoch_end=True, enable_version_counter=False)
        return [*super().configure_callbacks(), ImageFileCheck(), last]

    # Before training

    def setup(self, stage: str) -> None:
        """Load the encoder's weights and arrange for training on feature vectors."""
        let_first_process_speak(self.trainer)
        share_results_folder(self.trainer)
        use_checkpoint_files(self.trainer)
        score_every_image_once(self.trainer, stage)
        if stage != "fit":
            return
        loops = self.trainer.fit_loop
        if loops.max_epochs == _LIGHTNING_DEFAULT_EPOCHS:
            loops.max_epochs = self.epochs
        if self.trainer.check_val_every_n_epoch == 1 and loops.max_epochs and loops.max_epochs > 0:
            # Thresholds are wanted of the trained model only.
            self.trainer.check_val_every_n_epoch = loops.max_epochs
        if getattr(self.trainer.datamodule, "val_split_mode", None) == ValSplitMode.NONE:
            # anomalib's data modules fail when they are asked for validation images that they do not have.
            self.trainer.limit_val_batches = 0
        if not isinstance(loops._data_source.instance, _Steps):  # noqa: SLF001
            loops._data_source = copy(loops._data_source)  # noqa: SLF001
            loops._data_source.instance = _Steps(self, copy(loops._data_source).dataloader)  # noqa: SLF001

    def on_fit_start(self) -> None:
        """Load ImageNet weights unless they are there: a restored model brings its own."""
        if not self._encoder_is_loaded:
            self.model.encoder.check_size(self.hparams["image_size"])
            self.model.encoder.load(self.weights, self.pre_trained)
        self._encoder_is_loaded = True

    @property
    def _decides_by_rate(self) -> bool:
        return isinstance(self.post_processor, ConformalPostProcessor) and self.post_processor.is_conformal

    def hold_out(self, images: DataLoader) -> DataLoader:
        """Set good images aside for the thresholds, if a false-alarm rate is to be kept.

        Args:
            images: Loader of training images.

        Returns:
            Loader of the images to train on.

        Raises:
            CflowError: If there are too few images for the rate, or a resumed run would hold out what it has seen.
        """
        if isinstance(self.post_processor, PostProcessor):
            self._held_out.choose_rate(self.post_processor, self.trainer, len(images.dataset), self._training_has_begun)
        if not self._decides_by_rate:
            return images
        # Thresholds of an earlier training would not fit the weights that are saved from now on.
        self.post_processor.forget()
        rate = self.post_processor.target_false_alarm_rate
        data = self.trainer.datamodule
        return self._held_out.take_from(images, data, rate, self._training_seed(), self._training_has_begun)

    def _training_seed(self) -> int:
        if self._seed is None:
            # One for all processes: they have to draw the same batches.
            self._seed = self.trainer.strategy.broadcast(torch.initial_seed() % 2**31)
        return self._seed

    @classmethod
    def load_from_checkpoint(cls, checkpoint_path: str | Path, *args: Any, **kwargs: Any) -> "CflowPlugin":
        """Load a trained model; see Lightning's method of that name.

        Args:
            checkpoint_path: What training wrote, or :mod:`cflow_plugin.import_checkpoint`.
            *args: As Lightning takes them.
            **kwargs: As Lightning takes them; ``weights_only`` is ``True`` unless said otherwise.

        Raises:
            CflowError: If the file is absent, damaged, of another model, or holds other objects than tensors.
        """
        with explained(checkpoint_path):
            return super().load_from_checkpoint(checkpoint_path, *args, **kwargs)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep the seed of the training batches and the held-out images, for a resumed run to continue with."""
        super().on_save_checkpoint(checkpoint)
        checkpoint["cflow_plugin_seed"] = self._seed
        checkpoint["cflow_plugin_held_out"] = self._held_out.chosen
        checkpoint["cflow_plugin_versions"] = versions()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Take over the checkpoint's settings, and note that the weights are its own.

        Raises:
            CflowError: If it is of another kind of model, or its weights are not finite.
        """
        if self._continued_from is not None and self.trainer.state.fn == TrainerFn.TESTING:
            continued_from, self._continued_from = self._continued_from, None
            if continued_from == self.trainer.ckpt_path:
                # anomalib's `Engine.train` tests what it was given to go on from; wanted is what came of it.
                logger.info("Testing the model as trained, and not %s, which it went on from.", continued_from)
                checkpoint["state_dict"] = self.state_dict()
                checkpoint.pop("callbacks", None)  # the post-processor is one, and its thresholds are there, too
                return
        warn_of_other_versions(checkpoint.get("cflow_plugin_versions"))
        super().on_load_checkpoint(checkpoint)
        self._become(checkpoint.get("hyper_parameters", {}))
        weights = [f"model.{name}" for name in self.model.state_dict() if not name.startswith("scoring.")]
        check_weights(checkpoint["state_dict"], weights)
        self._seed = checkpoint.get("cflow_plugin_seed")
        self._held_out.chosen = checkpoint.get("cflow_plugin_held_out")
        self._encoder_is_loaded = self._training_has_begun = True

    def _become(self, settings: Mapping[str, Any]) -> None:
        """Build the model anew if a checkpoint was made with other settings: its weights and thresholds need them."""
        settings = {name: list(value) if name == "image_size" else value for name, value in settings.items()}
        made_with = {name: settings[name] for name in inspect.signature(CflowModel).parameters if name in settings}
        other = {name: value for name, value in made_with.items() if value != self.hparams.get(name)}
        if other:
            self.model = CflowModel(**made_with).to(self.device)
        if settings.get("image_size") not in (None, list(self.hparams["image_size"])):
            other["image_size"] = settings["image_size"]
            datamodule = self._trainer.datamodule if self._trainer else None
            if datamodule is not None:  # it resizes images, too, and was set up for the size that has been replaced
                datamodule._update_augmentations()  # noqa: SLF001
        if other:
            found = ", ".join(f"{name}={value}" for name, value in other.items())
            logger.info("The checkpoint was made with %s; this is what is used.", found)
            self.hparams.update(other)

    # Training

    def training_batches(self, images: DataLoader, epoch: int, steps: int) -> Iterator[VectorBatch]:
        """Draw one epoch's batches; the same seed and epoch give the same batches.

        Args:
            images: Loader of training images.
            epoch: Number of the epoch.
            steps: Number of batches.
        """
        seed = self._training_seed()
        if self._bank is None or _is_random(getattr(images.dataset, "augmentations", None)):
            self._bank = None  # two at once may be more than the memory holds
            self._bank = self._fill_bank(images, torch.Generator().manual_seed(seed))
        bank = self._bank
        if not self._training_has_begun:
            if self.whiten:
                for decoder, features in zip(self.model.decoders, bank.features, strict=True):
                    decoder.whitening.fit(features.flatten(0, 1))
            self._training_has_begun = True
        cells = [height * width for height, width in bank.sizes]
        vectors = [max(1, self.vectors_per_step * count // cells[0]) for count in cells]
        generator = torch.Generator().manual_seed(seed + 1 + epoch)
        for batch in bank.batches(steps, vectors, generator, with_noise=self.noise > 0):
            yield share_of_batch(batch, self.global_rank, self.trainer.world_size)

    def on_train_start(self) -> None:
        """Refuse to go on with a run for longer than it was planned for: its learning rate has come to its end.

        Raises:
            CflowError: If that is asked for.
        """
        scheduler = self.lr_schedulers()
        planned = getattr(scheduler, "planned_steps", None)
        asked = self.trainer.estimated_stepping_batches
        if planned is not None and asked > planned:
            epochs = planned * self.trainer.max_epochs / asked
            msg = (
                f"This run was planned for {epochs:.0f} epochs, over which its learning rate falls, and cannot go on "
                f"for {self.trainer.max_epochs}. Leave the number of epochs as it was, or train anew."
            )
            raise CflowError(msg)

    @torch.no_grad()
    def _fill_bank(self, images: DataLoader, generator: torch.Generator) -> FeatureBank:
        logger.info("Extracting the features of %d training images.", len(images.dataset))
        bank = None
        # The loader anew, unshuffled: the bank's order, and with it a resumed run, must not depend on earlier draws.
        for batch in part_of(images, range(len(images.dataset))):
            pixels = batch.image.to(self.device)
            if self.pre_processor:
                pixels = self.pre_processor(pixels)
            pyramid = self.model.encoder(pixels)
            if any(not torch.isfinite(features).all() for features in pyramid):
                msg = (
                    "The training features hold NaN or infinite values: check the training images and encoder weights."
                )
                raise CflowError(msg)
            if bank is None:
                bank = FeatureBank([tuple(part.shape[-2:]) for part in pyramid], generator)
            bank.add(pyramid, images_expected=len(images.dataset))
        if bank is None:
            msg = "There is no training image; check --data.root and --data.category."
            raise CflowError(msg)
        return bank

    def training_step(self, batch: VectorBatch, batch_idx: int) -> STEP_OUTPUT:
        """Compute the loss of one batch: the negative log-sigmoid of the log-likelihood, summed over scales.

        The log-sigmoid is the original code's: it keeps vectors that are unlikely already from dominating the step.

        Raises:
            CflowError: If the loss is not finite.
        """
        del batch_idx
        losses = []
        names = self.model.encoder.layers
        bank = self._bank
        logged = {"on_step": False, "on_epoch": True, "batch_size": 1, "sync_dist": True}
        for name, decoder, vectors, positions, noise, size in zip(
            names, self.model.decoders, batch.vectors, batch.positions, batch.noise, bank.sizes, strict=True
        ):
            condition = self.model.condition(*size, vectors)[positions]
            likelihood = decoder.log_likelihood(vectors, condition, None if noise is None else self.noise * noise)
            losses.append(-functional.logsigmoid(likelihood).mean() * batch.weight)
            self.log(f"train_nll_{name}", -likelihood.mean().detach() * batch.weight, **logged)
        loss = torch.stack(losses).sum()
        if not torch.isfinite(loss):
            msg = (
                f"The training loss is {loss.item()} in epoch {self.current_epoch}. The last good epoch is kept in "
                "last.ckpt; lower --model.learning_rate, or use --trainer.precision 32."
            )
            raise CflowError(msg)
        self.log("train_loss", loss.detach(), prog_bar=True, **logged)
        self.log("learning_rate", self.trainer.optimizers[0].param_groups[0]["lr"], prog_bar=True, batch_size=1)
        return loss

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """Adam on the decoders, with the schedule asked for."""
        # A gradient scaler has to see the gradients before the optimiser does, which fusing prevents.
        fused = self.trainer.precision != "16-mixed"
        optimizer = torch.optim.Adam(self.model.decoders.parameters(), lr=self.learning_rate, fused=fused)
        steps = self.trainer.estimated_stepping_batches
        if steps == float("inf"):
            return optimizer
        steps = max(2, int(steps))
        if self.schedule == "one_cycle":
            scheduler = OneCycleLR(optimizer, self.learning_rate, total_steps=steps, pct_start=0.2)
        else:
            warmup = min(steps - 1, round(steps * self.warmup_epochs / max(1, self.trainer.max_epochs or 1)))
            scheduler = CosineAnnealingLR(optimizer, T_max=steps - warmup)
            if warmup:
                rise = LinearLR(optimizer, start_factor=0.01, total_iters=warmup)
                scheduler = SequentialLR(optimizer, [rise, scheduler], milestones=[warmup])
        scheduler.planned_steps = steps  # kept in its state, and so in checkpoints
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    # When an epoch ends

    def on_validation_start(self) -> None:
        """Set the scoring constants and thresholds before validation scores anything and writes a checkpoint."""
        if self.trainer.state.fn == TrainerFn.FITTING:
            self._calibrate(_CALIBRATION_IMAGES)
            self._set_thresholds()
            self._calibrated_step = self.global_step

    def on_train_epoch_end(self) -> None:
        """Set the scoring constants, and when training ends the thresholds, before a checkpoint is written."""
        if self._calibrated_step == self.global_step:
            return
        trainer = self.trainer
        last = (
            trainer.should_stop or self.current_epoch + 1 == trainer.max_epochs or self.global_step == trainer.max_steps
        )
        self._calibrate(_CALIBRATION_IMAGES if last else _INTERIM_CALIBRATION_IMAGES)
        if last:
            self._set_thresholds()
        elif self._decides_by_rate:
            self.post_processor.forget()

    @torch.no_grad()
    def _calibrate(self, images: int) -> None:
        """Read the scoring constants off the features of this many training images."""
        bank, likelihoods = self._bank, []
        if bank is None:
            return
        chosen = torch.randperm(len(bank.features[0]), generator=torch.Generator().manual_seed(self._seed))[:images]
        for decoder, features, positions, size in zip(
            self.model.decoders, bank.features, bank.positions, bank.sizes, strict=True
        ):
            condition = self.model.condition(*size, features)[positions]
            likelihood = features.new_full((len(chosen), size[0] * size[1]), float("nan"))
            for row, image in enumerate(chosen):
                likelihood[row, positions] = decoder.log_likelihood(features[image], condition)
            likelihoods.append(likelihood.unflatten(1, size))
        self.model.scoring.calibrate(likelihoods)

    @torch.no_grad()
    def _set_thresholds(self) -> None:
        """Score the held-out images as new ones would be, and set the thresholds by them."""
        if self._held_out.loader is None:
            return
        training = self.model.training
        self.model.eval()
        logger.info("Scoring %d good images for the thresholds.", len(self._held_out.loader.dataset))
        scores, maxima = [], []
        for batch in self._held_out.loader:
            pixels = batch.image.to(self.device)
            result = self.model(self.pre_processor(pixels) if self.pre_processor else pixels)
            scores.append(result.pred_score)
            maxima.append(result.anomaly_map.flatten(1).amax(1))
        self.model.train(training)
        self.post_processor.calibrate(torch.cat(scores), torch.cat(maxima))

    def on_fit_end(self) -> None:
        """Give the features' memory back, and leave a model where it is looked for."""
        self._bank = None
        self._held_out.loader = None
        self._continued_from = self.trainer.ckpt_path
        for callback in self.trainer.checkpoint_callbacks:
            # Resumed after its last epoch, a run has nothing to train, and Lightning then writes no checkpoint.
            if callback.dirpath and Path(callback.dirpath).name == "lightning":
                file = Path(callback.dirpath) / f"{callback.filename}.ckpt"
                if not self.trainer.strategy.broadcast(file.exists()):
                    self.trainer.save_checkpoint(file)

    # Use

    def on_test_end(self) -> None:
        """Write the metrics next to the pictures."""
        write_metrics(self.trainer)

    def validation_step(self, batch: Batch, *args: Any, **kwargs: Any) -> STEP_OUTPUT:
        """Score a batch of validation images."""
        del args, kwargs
        return batch.update(**self.model(batch.image)._asdict())

    # Export

    def to_onnx(
        self,
        export_root: Path | str,
        model_file_name: str = "model",
        input_size: tuple[int, int] | None = None,
        **kwargs: Any,
    ) -> Path:
        """Export to ONNX, with the decoders folded.

        Args:
            export_root: Folder; the file lies in ``weights/onnx`` below it.
            model_file_name: Name of the file without its suffix.
            input_size: Height and width of the images; ``None`` takes images of any size.
            **kwargs: More arguments of :func:`torch.onnx.export`.

        Returns:
            The file's path.
        """
        from cflow_plugin.decisions.held_out_scores import describe
        from cflow_plugin.export import InferenceGraph, note_in_onnx

        self._check_exportable()
        # What the exporter writes by itself; an older version would be asked of it in vain.
        kwargs = {"opset_version": 18, "verbose": False, **kwargs}
        path = create_export_root(export_root, ExportType.ONNX) / f"{model_file_name}.onnx"
        with arriving(path.parent, last=path.name) as passing:
            written = InferenceGraph(self, input_size).to_onnx(passing, model_file_name, input_size, **kwargs)
            note_in_onnx(written, describe(self.post_processor))
        return path

    def to_openvino(
        self,
        export_root: Path | str,
        model_file_name: str = "model",
        input_size: tuple[int, int] | None = None,
        compression_type: CompressionType | None = None,
        datamodule: AnomalibDataModule | None = None,
        metric: Metric | None = None,
        task: TaskType | None = None,
        max_drop: float = 0.01,
        ov_kwargs: dict[str, Any] | None = None,
        onnx_kwargs: dict[str, Any] | None = None,
    ) -> Path:
        """Export to OpenVINO, with the decoders folded.

        Args:
            export_root: Folder; the files lie in ``weights/openvino`` below it.
            model_file_name: Name of the files without suffix.
            input_size: Height and width of the images; ``None`` takes images of any size.
            compression_type: ``FP16`` halves the file, ``INT8`` quarters the weights in it, ``INT8_PTQ`` also computes
                in 8 bits, ``INT8_ACQ`` does so only as far as ``metric`` allows.
            datamodule: Its training images calibrate INT8_PTQ and INT8_ACQ; its validation images measure ``metric``.
            metric: anomalib metric for INT8_ACQ; by default the image F1 score.
            task: Ignored; results are images' and pixels' alike.
            max_drop: How much of the metric INT8_ACQ may lose.
            ov_kwargs: More arguments of :func:`openvino.convert_model`.
            onnx_kwargs: Ignored; nothing goes through ONNX.

        Returns:
            The .xml file's path.

        Raises:
            CflowError: If the model is not trained, or data are needed and not given.
        """
        import openvino

        from cflow_plugin.decisions.held_out_scores import describe
        from cflow_plugin.export import compress, convert_to_openvino

        del task, onnx_kwargs
        self._check_exportable()
        kind = None if compression_type is None else CompressionType(compression_type)
        if kind in {CompressionType.INT8_PTQ, CompressionType.INT8_ACQ} and datamodule is None:
            # Said before the seconds that the conversion takes.
            msg = f"{kind.value} is calibrated on training images: pass the data the model was trained on with --data."
            raise CflowError(msg)
        model = convert_to_openvino(self, input_size, **(ov_kwargs or {}))
        if kind is not None:
            model = compress(model, kind, datamodule, metric, max_drop)
        for key, value in describe(self.post_processor).items():
            model.set_rt_info(value, key)
        path = create_export_root(export_root, ExportType.OPENVINO) / f"{model_file_name}.xml"
        with arriving(path.parent, last=path.name) as passing:
            openvino.save_model(model, passing / path.name, compress_to_fp16=kind == CompressionType.FP16)
        return path

    def to_torch(self, export_root: Path | str, model_file_name: str = "model") -> Path:
        """Export for PyTorch, as a pickle that anomalib's ``TorchInferencer`` reads.

        Args:
            export_root: Folder; the file lies in ``weights/torch`` below it.
            model_file_name: Name of the file without its suffix.

        Returns:
            The file's path.
        """
        path = create_export_root(export_root, ExportType.TORCH) / f"{model_file_name}.pt"
        with arriving(path.parent, last=path.name) as passing:
            super().to_torch(passing, model_file_name)
        return path

    def _check_exportable(self) -> None:
        if not self.model.scoring.is_calibrated:
            msg = "Only a trained model can be exported: pass the checkpoint that training wrote with --ckpt_path."
            raise CflowError(msg)
        if self._decides_by_rate:
            self.post_processor.check_calibrated()


class _Steps:
    """An epoch's batches of feature vectors, in the place of the loader of images."""

    def __init__(self, module: CflowPlugin, images: Callable[[], DataLoader]) -> None:
        self._module = module
        self._make_images = images
        self._images: DataLoader | None = None

    @property
    def images(self) -> DataLoader:
        if self._images is None:
            self._images = self._module.hold_out(self._make_images())
        return self._images

    def __len__(self) -> int:
        if self._module.steps_per_epoch is not None:
            return self._module.steps_per_epoch
        cells = self._finest_cells()
        return max(1, len(self.images.dataset) * cells // self._module.vectors_per_step)

    def _finest_cells(self) -> int:
        """Positions of the finest scale."""
        module = self._module
        pixels = next(iter(DataLoader(self.images.dataset, batch_size=1, collate_fn=self.images.collate_fn))).image
        if module.pre_processor:
            pixels = module.pre_processor(pixels)
        return module.model.encoder(pixels.to(module.device))[0].shape[-2:].numel()

    def __iter__(self) -> Iterator[VectorBatch]:
        yield from self._module.training_batches(self.images, self._module.current_epoch, len(self))


def _is_random(augmentations: Transform | None) -> bool:
    """Whether the same image may come out differently in another epoch."""
    if augmentations is None:
        return False
    parts = augmentations.transforms if isinstance(augmentations, Compose) else [augmentations]
    return not all(isinstance(part, Resize | Normalize | Identity) for part in parts)


# `anomalib benchmark` looks a model up by name among the attributes of anomalib's own package, which may be only half
# imported now.
sys.modules["anomalib.models"].CflowPlugin = CflowPlugin
