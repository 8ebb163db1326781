"""anomalib's post-processing, with thresholds that keep a stated false-alarm rate."""

__all__ = ["ConformalPostProcessor"]

from typing import Any

import torch
from anomalib.data import Batch, InferenceBatch
from anomalib.post_processing import PostProcessor
from lightning import LightningModule, Trainer

from cflow_plugin.decisions.conformal import check_enough, images_needed, p_values, threshold_rank
from cflow_plugin.errors import CflowError

_HELD_OUT = ("held_out_scores", "held_out_maxima")


class ConformalPostProcessor(PostProcessor):
    """Decisions whose false-alarm rate on normal images is chosen beforehand.

    Without ``target_false_alarm_rate`` this is anomalib's post-processor: thresholds that maximise F1 on the validation
    images, which takes images of defects. With it, thresholds come from normal images alone that nothing was trained
    on, and validation does not touch them:

    - *Image*: the threshold is the ``ceil((n + 1) (1 - rate))``-th smallest of the n held-out image scores. A new
      normal image, exchangeable with them, is called anomalous with a probability of at most ``rate``.
    - *Pixel*: a map has thousands of pixels, and with a rate a pixel nearly every normal image would show something.
      The threshold is therefore the same order statistic of the n maps' *highest* values. A new normal image shows any
      anomalous pixel at all with a probability of at most ``rate``, however its pixels depend on each other.

    Either guarantee is per image, on average over which images were held out (see
    :func:`~cflow_plugin.decisions.conformal.threshold_rank`). It says nothing once the camera, light or process has
    changed: ``cflow-plugin monitor`` watches for that. Thresholds, normalisation (0.5 is the threshold, as in anomalib)
    and the held-out scores are buffers, so they are in checkpoints and in exported files.

    Args:
        target_false_alarm_rate: Share of normal images that may be called anomalous, between 0 and 1; ``None`` for
            anomalib's F1-adaptive thresholds.
        **settings: Settings of anomalib's post-processor. Sensitivities would shift the thresholds, so with a rate they
            stay at 0.5.

    Attributes:
        held_out_scores: Image scores of the held-out images, ascending, before normalisation, ``(n,)``.
        held_out_maxima: Highest values of their maps, ascending, before normalisation, ``(n,)``.

    Raises:
        CflowError: If a setting is out of range, or does not go with a rate.
    """

    def __init__(self, target_false_alarm_rate: float | None = None, **settings: Any) -> None:
        super().__init__(**settings)
        if target_false_alarm_rate is not None:
            images_needed(target_false_alarm_rate)  # refuses what is no rate
            if not self.enable_normalization or (self.image_sensitivity, self.pixel_sensitivity) != (0.5, 0.5):
                msg = "With target_false_alarm_rate leave normalization on and sensitivities at 0.5: change the rate."
                raise CflowError(msg)
        self.target_false_alarm_rate = target_false_alarm_rate
        self.held_out_scores: torch.Tensor
        self.held_out_maxima: torch.Tensor
        for name in _HELD_OUT:
            self.register_buffer(name, torch.empty(0))

    @property
    def is_conformal(self) -> bool:
        """Whether thresholds keep a false-alarm rate."""
        return self.target_false_alarm_rate is not None

    @property
    def is_calibrated(self) -> bool:
        """Whether there are held-out scores."""
        return len(self.held_out_scores) > 0

    def calibrate(self, scores: torch.Tensor, maxima: torch.Tensor) -> None:
        """Set the thresholds from held-out normal images.

        Args:
            scores: Their image scores between 0 and 1, ``(n,)``.
            maxima: The highest values of their anomaly maps, between 0 and 1, ``(n,)``.

        Raises:
            CflowError: If they are too few for the rate, or not finite.
        """
        if not (torch.isfinite(scores).all() and torch.isfinite(maxima).all()):
            msg = "The scores of the held-out good images hold NaN or infinite values: check those images."
            raise CflowError(msg)
        check_enough(len(scores), self.target_false_alarm_rate)
        self.held_out_scores = scores.detach().to(self.image_min).sort().values
        self.held_out_maxima = maxima.detach().to(self.image_min).sort().values
        self._set_thresholds()

    def forget(self) -> None:
        """Drop the held-out scores: the model is no longer the one that gave them."""
        self.held_out_scores = self.held_out_maxima = self.image_min.new_empty(0)

    def check_calibrated(self) -> None:
        """Refuse to go on without held-out scores.

        Raises:
            CflowError: If there are none.
        """
        if not self.is_calibrated:
            msg = (
                "This model has no scores of held-out good images, so no false-alarm rate can be kept. Train it to the "
                "end with --model.target_false_alarm_rate; a run that was cut off goes on with --ckpt_path last.ckpt."
            )
            raise CflowError(msg)

    @torch.no_grad()
    def _set_thresholds(self) -> None:
        rank = threshold_rank(len(self.held_out_scores), self.target_false_alarm_rate)
        for kind, values in (("image", self.held_out_scores), ("pixel", self.held_out_maxima)):
            threshold = values[rank - 1]
            # anomalib divides by the range; this one brings every score between 0 and 1 to where nothing is cut off.
            half_range = torch.maximum(threshold, 1 - threshold)
            getattr(self, f"_{kind}_threshold").copy_(threshold)
            getattr(self, f"{kind}_min").copy_(threshold - half_range)
            getattr(self, f"{kind}_max").copy_(threshold + half_range)

    # p-values

    @property
    def reference_scores(self) -> torch.Tensor:
        """The held-out image scores, normalised as predictions are, ascending, ``(n,)``."""
        return self._normalize(self.held_out_scores, self.image_min, self.image_max, self.image_threshold)

    @property
    def reference_maxima(self) -> torch.Tensor:
        """The highest values of the held-out maps, normalised as predictions are, ascending, ``(n,)``."""
        return self._normalize(self.held_out_maxima, self.pixel_min, self.pixel_max, self.pixel_threshold)

    def image_p_values(self, pred_score: torch.Tensor) -> torch.Tensor:
        """Conformal p-values of images; those of at most ``target_false_alarm_rate`` are the anomalous ones.

        Args:
            pred_score: Scores as predicted (normalised), ``(B,)``.

        Returns:
            For each image ``(1 + #{held-out scores at least as high}) / (n + 1)``.

        Raises:
            CflowError: If there are no held-out scores.
        """
        self.check_calibrated()
        return p_values(pred_score, self.reference_scores)

    def pixel_p_values(self, anomaly_map: torch.Tensor) -> torch.Tensor:
        """Conformal p-values of pixels, corrected for the number of pixels.

        Each pixel is compared with the highest pixel of each held-out map, so for a normal image the *least* p-value of
        the whole map is at most a with a probability of at most a (family-wise error rate).

        Args:
            anomaly_map: Maps as predicted (normalised), ``(B, 1, H, W)`` or any other shape.

        Returns:
            p-values, shaped as the maps; those of at most ``target_false_alarm_rate`` make the predicted mask.

        Raises:
            CflowError: If there are no held-out scores.
        """
        self.check_calibrated()
        return p_values(anomaly_map, self.reference_maxima)

    # What anomalib calls

    def forward(self, predictions: InferenceBatch) -> InferenceBatch:
        """Normalise scores and maps and decide.

        Args:
            predictions: ``pred_score`` ``(B,)`` and ``anomaly_map`` ``(B, 1, H, W)`` of the model.

        Raises:
            CflowError: If a rate is asked for and there are no held-out scores.
        """
        if self.is_conformal and not torch.compiler.is_compiling():
            self.check_calibrated()
        return super().forward(predictions)

    def post_process_batch(self, batch: Batch) -> None:
        """Normalise a batch's scores and maps and decide, in place.

        Args:
            batch: Predictions of the model.

        Raises:
            CflowError: If a rate is asked for and there are no held-out scores.
        """
        if self.is_conformal:
            self.check_calibrated()
        super().post_process_batch(batch)

    def on_validation_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Batch, *args: Any, **kwargs: Any
    ) -> None:
        """Collect validation scores, unless a rate is asked for: then nothing is fitted on them."""
        if not self.is_conformal:
            super().on_validation_batch_end(trainer, pl_module, outputs, *args, **kwargs)

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Fit thresholds to validation scores, unless a rate is asked for."""
        if not self.is_conformal:
            super().on_validation_epoch_end(trainer, pl_module)

    # Checkpoints

    @property
    def _checkpoint_config_keys(self) -> tuple[str, ...]:
        return (*super()._checkpoint_config_keys, "target_false_alarm_rate")

    def load_checkpoint_config(self, config: dict[str, Any]) -> None:
        """Take over a checkpoint's settings; a rate that was asked for here is kept.

        Args:
            config: What :meth:`checkpoint_config` returned.
        """
        asked = self.target_false_alarm_rate
        super().load_checkpoint_config(config)
        if asked is not None:
            self.target_false_alarm_rate = asked

    def _load_from_state_dict(self, state_dict: dict[str, torch.Tensor], prefix: str, *args: Any) -> None:
        for name in _HELD_OUT:
            # A checkpoint of anomalib's own post-processor has none.
            given = state_dict.setdefault(prefix + name, torch.empty(0))
            setattr(self, name, self.image_min.new_empty(given.shape))
        super()._load_from_state_dict(state_dict, prefix, *args)
        if self.is_conformal and self.is_calibrated:
            # The scores allow any rate that they are enough for.
            self._set_thresholds()
