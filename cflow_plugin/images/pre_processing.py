"""What happens to an image before the encoder sees it."""

__all__ = ["CflowPreProcessor"]

import torch
from anomalib.pre_processing import PreProcessor


class CflowPreProcessor(PreProcessor):
    """anomalib's pre-processing, done the same way wherever a model is used.

    anomalib's own leaves the smoothing of a reduction out behind training and testing, so that an image gets another
    score from its inferencers than from its engine.
    """

    def forward(self, batch: torch.Tensor) -> torch.Tensor:
        """Transform images ``(B, 3, H, W)``."""
        return self.transform(batch) if self.transform else batch
