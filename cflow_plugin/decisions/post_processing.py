"""anomalib's post-processing, with thresholds that keep a stated false-alarm rate."""

__all__ = ["ConformalPostProcessor", "post_processing"]

import inspect
import logging
from dataclasses import asdict, replace
from typing import Any, cast

import torch
from anomalib.data import Batch, InferenceBatch
from anomalib.post_processing import PostProcessor
from lightning import LightningModule, Trainer

from cflow_plugin.anomalib_patches.thresholds import set_thresholds, validation_scores
from cflow_plugin.decisions.conformal import check_enough, images_needed, p_values, threshold_rank
from cflow_plugin.decisions.region_finding import FindsRegions
from cflow_plugin.decisions.regions import RegionSettings
from cflow_plugin.errors import CflowError
from cflow_plugin.modules import FullPrecision, take_shapes_from_checkpoints

logger = logging.getLogger(__name__)

_RATE = "target_false_alarm_rate"
_REGIONS = "regions"
_REFERENCE = ("reference_scores", "reference_maxima")


class ConformalPostProcessor(FindsRegions, FullPrecision, PostProcessor):
    """Decisions whose false-alarm rate on normal images is chosen beforehand.

    Without ``target_false_alarm_rate`` this is anomalib's post-processor: thresholds that maximise F1 on the validation
    images, which takes images of defects; where there are none of them, nothing is decided. With it, thresholds come
    from normal images alone that nothing was trained on, and validation does not touch them:

    - *Image*: the threshold is the ``ceil((n + 1) (1 - rate))``-th smallest of the n reference scores. A new
      normal image, exchangeable with them, is called anomalous with a probability of at most ``rate``.
    - *Pixel*: a map has thousands of pixels, and with a rate a pixel nearly every normal image would show something.
      The threshold is therefore the same order statistic of the n maps' *highest* values, or with ``smallest_region``
      of the highest levels at which they have a region of that size. A new normal image has any such region above it
      at all with a probability of at most ``rate``, however its pixels depend on each other.
    - *Both*: two such rules together would call up to twice as many anomalous. So the image decides, and a mask shows
      pixels only in an image that is anomalous: a normal image is called so by score or by mask with a probability of
      at most ``rate``.

    The guarantee is per image, on average over which images the reference images are (see
    :func:`~cflow_plugin.decisions.conformal.threshold_rank`). It says nothing once the camera, light or process has
    changed: ``cflow-plugin monitor`` watches for that. Thresholds, normalisation (0.5 is the threshold, as in anomalib)
    and the reference scores are buffers, so they are in checkpoints and in exported files.

    Args:
        target_false_alarm_rate: Share of normal images that may be called anomalous, between 0 and 1; ``None`` for
            anomalib's F1-adaptive thresholds.
        smallest_region: Pixels of the map that a region has at least to be shown.
        most_regions: Regions shown of an image, those with the highest peaks; ``None`` for all.
        mm_per_pixel: Length of a picture's pixel in millimetres, where areas are wanted in mm².
        **settings: Settings of anomalib's post-processor. Sensitivities would shift the thresholds, so with a rate they
            stay at 0.5.

    Attributes:
        reference_scores: Image scores of the reference images, ascending, before normalisation, ``(n,)``.
        reference_maxima: Highest levels at which their maps have a region, ascending, before normalisation, ``(n,)``;
            where a pixel is a region, their highest values.

    Raises:
        CflowError: If a setting is out of range, or does not go with a rate.
    """

    def __init__(
        self,
        target_false_alarm_rate: float | None = None,
        smallest_region: int = 1,
        most_regions: int | None = None,
        mm_per_pixel: float | None = None,
        **settings: Any,
    ) -> None:
        super().__init__(**settings)
        self._regions = RegionSettings(smallest_region, most_regions, mm_per_pixel)
        if target_false_alarm_rate is not None:
            images_needed(target_false_alarm_rate)  # refuses what is no rate
            if not self.enable_normalization or (self.image_sensitivity, self.pixel_sensitivity) != (0.5, 0.5):
                msg = "With target_false_alarm_rate leave normalization on and sensitivities at 0.5: change the rate."
                raise CflowError(msg)
        self.target_false_alarm_rate: float | None = target_false_alarm_rate
        self.reference_scores: torch.Tensor
        self.reference_maxima: torch.Tensor
        for name in _REFERENCE:
            self.register_buffer(name, torch.empty(0))
        self._seen = torch.zeros(2)  # good and anomalous images that validation has shown
        self.register_load_state_dict_pre_hook(_fill_in)
        take_shapes_from_checkpoints(self)
        self.register_load_state_dict_post_hook(_set_thresholds_anew)

    @property
    def is_conformal(self) -> bool:
        """Whether thresholds keep a false-alarm rate."""
        return self.target_false_alarm_rate is not None

    @property
    def rate(self) -> float:
        """The false-alarm rate to be kept.

        Raises:
            CflowError: If none is.
        """
        if self.target_false_alarm_rate is None:
            msg = "No false-alarm rate is asked for; set target_false_alarm_rate."
            raise CflowError(msg)
        return self.target_false_alarm_rate

    @property
    def is_calibrated(self) -> bool:
        """Whether there are reference scores."""
        return len(self.reference_scores) > 0

    def calibrate(self, scores: torch.Tensor, maxima: torch.Tensor) -> None:
        """Set the thresholds from reference images.

        Args:
            scores: Their image scores between 0 and 1, ``(n,)``.
            maxima: What :meth:`levels` says of their anomaly maps, between 0 and 1, ``(n,)``.

        Raises:
            CflowError: If they are too few for the rate, or not finite.
        """
        if not (torch.isfinite(scores).all() and torch.isfinite(maxima).all()):
            msg = "The scores of the reference images hold NaN or infinite values: check those images."
            raise CflowError(msg)
        check_enough(len(scores), self.rate)
        self.reference_scores = scores.detach().to(self.image_min).sort().values
        self.reference_maxima = maxima.detach().to(self.image_min).sort().values
        self.apply_rate()

    @property
    def decides(self) -> bool:
        """Whether there is a threshold to decide by."""
        return self.enable_thresholding and bool(torch.isfinite(self.image_threshold))

    def describe(self) -> str:
        """What decisions rest on, in a sentence, for a file."""
        if self.is_conformal and self.is_calibrated:
            images = len(self.reference_scores)
            return (
                f"A false-alarm rate of {self.rate:g}, by the scores of {images} good images that were not trained on."
            )
        if self.decides:
            return "The threshold that maximises F1 on the validation images."
        return "There is no threshold: this model gives scores and maps, and decides nothing."

    @torch.no_grad()
    def forget(self) -> None:
        """Drop thresholds and reference scores: the model is no longer the one that gave them."""
        self.reference_scores = self.reference_maxima = self.image_min.new_empty(0)
        set_thresholds(self, float("nan"), float("nan"))
        for bound in (self.image_min, self.image_max, self.pixel_min, self.pixel_max):
            bound.fill_(float("nan"))

    def check_calibrated(self) -> None:
        """Refuse to go on without reference scores.

        Raises:
            CflowError: If there are none.
        """
        if not self.is_calibrated:
            msg = (
                "This model has no scores of reference images, so no false-alarm rate can be kept. Train it to the "
                "end with --model.target_false_alarm_rate; a run that was cut off goes on with --ckpt_path last.ckpt."
            )
            raise CflowError(msg)

    @torch.no_grad()
    def apply_rate(self) -> None:
        """Set thresholds and normalisation by the reference scores and the rate."""
        rank = threshold_rank(len(self.reference_scores), self.rate)
        image, pixel = self.reference_scores[rank - 1], self.reference_maxima[rank - 1]
        set_thresholds(self, image, pixel)
        self._cut_nothing_off()

    @torch.no_grad()
    def _cut_nothing_off(self) -> None:
        """Normalise such that every score between 0 and 1 has a value of its own.

        anomalib divides by the range of the validation scores. With a threshold near one of its ends, all beyond half
        of the range on the other side becomes 0, or 1: an order that was there is lost, for metrics and for the eye.
        """
        for threshold, low, high in (
            (self.image_threshold, self.image_min, self.image_max),
            (self.pixel_threshold, self.pixel_min, self.pixel_max),
        ):
            if torch.isfinite(threshold):
                half_range = torch.maximum(threshold, 1 - threshold)
                low.copy_(threshold - half_range)
                high.copy_(threshold + half_range)

    # p-values

    @property
    def normalized_reference_scores(self) -> torch.Tensor:
        """The reference scores, normalised as predictions are, ascending, ``(n,)``."""
        return self._normalized()[0]

    @property
    def normalized_reference_maxima(self) -> torch.Tensor:
        """The reference maps' highest levels with a region, normalised as predictions are, ascending, ``(n,)``."""
        return self._normalized()[1]

    def _normalized(self) -> tuple[torch.Tensor, torch.Tensor]:
        raw = InferenceBatch(pred_score=self.reference_scores, anomaly_map=self.reference_maxima)
        scores, _, maxima, _ = super().forward(raw)
        return cast("torch.Tensor", scores), cast("torch.Tensor", maxima)

    def image_p_values(self, pred_score: torch.Tensor) -> torch.Tensor:
        """Conformal p-values of images; those of at most ``target_false_alarm_rate`` are the anomalous ones.

        Args:
            pred_score: Scores as predicted (normalised), ``(B,)``.

        Returns:
            For each image ``(1 + #{reference scores at least as high}) / (n + 1)``.

        Raises:
            CflowError: If there are no reference scores.
        """
        self.check_calibrated()
        return _p_values(pred_score, self.normalized_reference_scores)

    def pixel_p_values(self, anomaly_map: torch.Tensor) -> torch.Tensor:
        """Conformal p-values of pixels, corrected for the number of pixels.

        Each pixel is compared with the highest pixel of each reference map, so for a normal image the *least* p-value
        of the whole map is at most a with a probability of at most a (family-wise error rate).

        Args:
            anomaly_map: Maps as predicted (normalised), ``(B, 1, H, W)`` or any other shape.

        Returns:
            p-values, shaped as the maps; those of at most ``target_false_alarm_rate`` make the predicted mask.

        Raises:
            CflowError: If there are no reference scores.
        """
        self.check_calibrated()
        return _p_values(anomaly_map, self.normalized_reference_maxima)

    # Regions

    @property
    def region_settings(self) -> RegionSettings:
        """Which regions are shown, and by which levels they have p-values."""
        known = self.is_conformal and self.is_calibrated
        return replace(self._regions, levels=self.normalized_reference_maxima.tolist() if known else ())

    # What anomalib calls

    def forward(self, predictions: InferenceBatch) -> InferenceBatch:
        """Normalise scores and maps and decide; without a threshold leave them as they are, and decide nothing.

        Args:
            predictions: ``pred_score`` ``(B,)`` and ``anomaly_map`` ``(B, 1, H, W)`` of the model.

        Raises:
            CflowError: If a rate is asked for and there are no reference scores.
        """
        if not torch.compiler.is_compiling():
            if self.is_conformal:
                self.check_calibrated()
            elif not self.decides:
                return predictions
        scores, labels, maps, masks = super().forward(predictions)
        return InferenceBatch(scores, labels, maps, self._of_anomalous_images(masks, labels))

    def _of_anomalous_images(self, masks: torch.Tensor | None, labels: torch.Tensor | None) -> torch.Tensor | None:
        """Masks ``(B, ...)``, empty where the label is not anomalous."""
        if not self.is_conformal or masks is None or labels is None:
            return masks
        return masks & labels.reshape(-1, *[1] * (masks.ndim - 1))

    def post_process_batch(self, batch: Batch) -> None:
        """Normalise a batch's scores and maps and decide, in place; without a threshold leave it as it is.

        Args:
            batch: Predictions of the model.

        Raises:
            CflowError: If a rate is asked for and there are no reference scores.
        """
        if self.is_conformal:
            self.check_calibrated()
        elif not self.decides:
            return
        super().post_process_batch(batch)
        mask = self._of_anomalous_images(batch.pred_mask, batch.pred_label)
        batch.update(pred_mask=self._shown(batch.anomaly_map, mask))

    def on_validation_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Batch, *args: Any, **kwargs: Any
    ) -> None:
        """Collect validation scores, unless a rate is asked for: then nothing is fitted on them."""
        if not self.is_conformal:
            labels = outputs.gt_label
            if labels is not None:
                anomalous = int(labels.sum())
                self._seen = self._seen + torch.tensor([labels.numel() - anomalous, anomalous])
            super().on_validation_batch_end(trainer, pl_module, outputs, *args, **kwargs)

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Fit thresholds to validation scores, unless a rate is asked for, or there is no F1 score to maximise."""
        if self.is_conformal:
            return
        images, pixels = validation_scores(self)
        super().on_validation_epoch_end(trainer, pl_module)
        if self.enable_thresholding:
            image = _below(self.image_threshold, images, trainer) if images else self.image_threshold
            # Without masks none is fitted, and the threshold of images serves for pixels.
            set_thresholds(self, image, _below(self.pixel_threshold, pixels, trainer) if pixels else float("nan"))
        seen, self._seen = self._seen.to(self.image_min.device), torch.zeros(2)
        if trainer is not None:
            seen = trainer.strategy.reduce(seen, reduce_op="sum")
        if not seen.all():
            logger.warning(
                "There is no threshold: validation has shown %d good and %d anomalous images, and takes some of both. "
                "The model gives scores and maps, and decides nothing; see target_false_alarm_rate.",
                *seen.int().tolist(),
            )
            self.forget()
        elif self.enable_normalization:
            self._cut_nothing_off()

    # Checkpoints

    def checkpoint_config(self) -> dict[str, Any]:
        """Settings to keep in a checkpoint, the rate and those of regions among them."""
        regions = {name: value for name, value in asdict(self._regions).items() if name != "levels"}
        return {**super().checkpoint_config(), _RATE: self.target_false_alarm_rate, _REGIONS: regions}

    def load_checkpoint_config(self, config: dict[str, Any]) -> None:
        """Take over a checkpoint's settings; a rate that was asked for here is kept, and how regions are shown.

        The smallest region is the checkpoint's, since its thresholds were set for that.

        Args:
            config: What :meth:`checkpoint_config` returned.
        """
        super().load_checkpoint_config(config)
        if self.target_false_alarm_rate is None:
            self.target_false_alarm_rate = config.get(_RATE)
        own, found = self._regions, RegionSettings(**config.get(_REGIONS, {}))
        if own.smallest not in (1, found.smallest):
            logger.warning(
                "The checkpoint's thresholds are set for regions of at least %d pixels (smallest_region), which is "
                "what is used; for %d, train anew.",
                found.smallest,
                own.smallest,
            )
        self._regions = replace(found, most=own.most or found.most, mm_per_pixel=own.mm_per_pixel or found.mm_per_pixel)


def post_processing(given: PostProcessor | bool, rate: float | None, **regions: Any) -> PostProcessor | bool:
    """The post-processor that was asked for.

    Args:
        given: A post-processor, or whether to use the default one.
        rate: The default one's false-alarm rate.
        **regions: Its settings of regions, by the names that :class:`ConformalPostProcessor` has for them.

    Raises:
        CflowError: If regions are asked for that the post-processor that is given would know nothing of.
    """
    if given is True:
        return ConformalPostProcessor(rate, **regions)
    defaults = inspect.signature(ConformalPostProcessor).parameters
    if asked := [name for name, value in regions.items() if value != defaults[name].default]:
        msg = f"Give {' and '.join(asked)} or a post_processor, not both: ConformalPostProcessor takes such settings."
        raise CflowError(msg)
    return given


def _below(threshold: torch.Tensor, scores: list[torch.Tensor], trainer: Trainer | None) -> torch.Tensor:
    """The middle between a threshold that is the lowest anomalous score, and the next score below it.

    A score has to lie above the threshold to be called anomalous. On the score itself the defect that it is of would be
    missed, and decisions would hang on the last digit.
    """
    parts = [part[part < threshold] for part in scores]
    next_one = torch.stack([threshold.new_zeros(()), *(part.max().to(threshold) for part in parts if len(part))]).max()
    if trainer is not None:
        next_one = trainer.strategy.reduce(next_one, reduce_op="max")
    middle = next_one + (threshold - next_one) / 2
    return torch.where(middle < threshold, middle, next_one)


def _fill_in(post_processor: ConformalPostProcessor, state_dict: dict[str, Any], prefix: str, *_: Any) -> None:
    """A checkpoint of anomalib's own post-processor has no reference scores."""
    for name in _REFERENCE:
        state_dict.setdefault(prefix + name, torch.empty(0, device=post_processor.image_min.device))


def _set_thresholds_anew(post_processor: ConformalPostProcessor, _: object) -> None:
    """The scores that were loaded allow any rate that they are enough for."""
    if post_processor.is_conformal and post_processor.is_calibrated:
        post_processor.apply_rate()


def _p_values(scores: torch.Tensor, reference: torch.Tensor) -> torch.Tensor:
    """:func:`p_values` of tensors."""
    found = torch.from_numpy(p_values(scores.detach().to(reference).cpu().numpy(), reference.cpu().numpy()))
    try:
        return found.to(scores.device)
    except TypeError:  # Apple's devices have no doubles
        return found.float().to(scores.device)
