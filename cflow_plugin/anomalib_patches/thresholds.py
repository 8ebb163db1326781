"""Thresholds of anomalib's post-processor, set from outside.

- What: writes the buffers ``_image_threshold`` and ``_pixel_threshold``, and reads what their F1 scores are fitted to.
- Why: anomalib 2.7 has public properties to read them, and none to set them but fitting F1 scores. These maximise F1 of
  what is *at least* the threshold, which is one of the scores; what is decided is whether a score lies *above* it.
- Since: anomalib 2.0.
- Upstream: to be asked for: setters. No report is known.
- Can go: when the properties ``image_threshold`` and ``pixel_threshold`` can be assigned, and what is anomalous at the
  fitted threshold is called so.
"""

__all__ = ["set_thresholds", "validation_scores"]

import torch
from anomalib.post_processing import PostProcessor


@torch.no_grad()
def set_thresholds(post_processor: PostProcessor, image: float | torch.Tensor, pixel: float | torch.Tensor) -> None:
    """Set the raw scores above which images and pixels are anomalous.

    Args:
        post_processor: anomalib's, or one derived from it.
        image: Threshold of image scores, before normalisation.
        pixel: Threshold of maps, before normalisation.
    """
    post_processor._image_threshold.fill_(image)  # noqa: SLF001
    post_processor._pixel_threshold.fill_(pixel)  # noqa: SLF001


def validation_scores(post_processor: PostProcessor) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """What this process has collected to fit thresholds to: image scores, and values of maps, in parts.

    Args:
        post_processor: anomalib's, or one derived from it, before the epoch's end.
    """
    metrics = post_processor._image_threshold_metric, post_processor._pixel_threshold_metric  # noqa: SLF001
    images, pixels = (list(getattr(metric, "preds", [])) for metric in metrics)
    return images, pixels
