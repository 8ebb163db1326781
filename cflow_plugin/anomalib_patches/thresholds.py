"""Thresholds of anomalib's post-processor, set from outside.

- What: writes the buffers ``_image_threshold`` and ``_pixel_threshold``.
- Why: anomalib 2.7 has public properties to read them, and none to set them but fitting F1 scores.
- Since: anomalib 2.0.
- Upstream: to be asked for: setters. No report is known.
- Can go: when the properties ``image_threshold`` and ``pixel_threshold`` can be assigned.
"""

__all__ = ["set_thresholds"]

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
