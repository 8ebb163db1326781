"""What happens to an image before the encoder sees it."""

__all__ = ["CflowPreProcessor"]

from collections.abc import Sequence

import torch
from anomalib.pre_processing import PreProcessor
from torchvision.transforms.v2 import Compose, InterpolationMode, Normalize, Resize


class CflowPreProcessor(PreProcessor):
    """anomalib's pre-processing, done the same way wherever a model is used.

    anomalib's own leaves the smoothing of a reduction out behind training and testing, so that an image gets another
    score from its inferencers than from its engine.
    """

    @classmethod
    def of(
        cls, size: tuple[int, int], mean: Sequence[float], std: Sequence[float], interpolation: str = "bilinear"
    ) -> "CflowPreProcessor":
        """Resize and normalise.

        Args:
            size: Height and width in pixels.
            mean: Mean of each colour, of values between 0 and 1.
            std: Standard deviation of each colour.
            interpolation: ``bilinear`` or ``bicubic``; both smooth what they reduce.
        """
        resize = Resize(size, InterpolationMode(interpolation), antialias=True)
        return cls(Compose([resize, Normalize(list(mean), list(std))]))

    def forward(self, batch: torch.Tensor) -> torch.Tensor:
        """Transform images ``(B, 3, H, W)``."""
        return self.transform(batch) if self.transform else batch
