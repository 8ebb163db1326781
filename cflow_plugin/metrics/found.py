"""What the threshold finds: true regions by their size, and regions where nothing is."""

__all__ = ["SIZES", "FalseRegions", "RegionRecall"]

import math
from typing import Any

import cv2
import numpy as np
import torch
from anomalib.metrics import AnomalibMetric
from torchmetrics import Metric

SIZES = ((0, 8), (8, 16), (16, 32), (32, 64), (64, math.inf))
"""Classes of sizes, the square root of a region's area, in pixels of the map."""


class _Share(Metric):
    """A count by another count, of all images."""

    full_state_update = False
    counted: torch.Tensor
    total: torch.Tensor

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        for name in ("counted", "total"):
            self.add_state(name, default=torch.tensor(0, dtype=torch.long), dist_reduce_fx="sum")

    def update(self, preds: torch.Tensor, target: torch.Tensor) -> None:
        """Take in masks.

        Args:
            preds: Predicted masks, ``(B, H, W)`` or ``(B, 1, H, W)``.
            target: True masks, as many pixels.
        """
        size = preds.shape[-2:]
        predicted, true = ((part > 0).reshape(-1, *size).cpu().numpy() for part in (preds, target))
        for one, truth in zip(predicted, true, strict=True):
            counted, total = self._count(one, truth)
            self.counted += counted
            self.total += total

    def _count(self, predicted: np.ndarray, true: np.ndarray) -> tuple[int, int]:
        raise NotImplementedError

    def _value(self) -> torch.Tensor:
        return self.counted / self.total

    @property
    def has_examples(self) -> bool:
        """Whether there is anything to count."""
        return bool(self.total)


class _Recall(_Share):
    def __init__(self, sizes: tuple[float, float] = (0, math.inf), **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.sizes = sizes

    def _count(self, predicted: np.ndarray, true: np.ndarray) -> tuple[int, int]:
        _, labels, stats, _ = cv2.connectedComponentsWithStats(true.astype(np.uint8), connectivity=8)
        side = np.sqrt(stats[:, cv2.CC_STAT_AREA])
        wanted = (side >= self.sizes[0]) & (side < self.sizes[1])
        wanted[0] = False
        touched = np.bincount(labels[predicted], minlength=len(stats)) > 0
        return int((wanted & touched).sum()), int(wanted.sum())


class RegionRecall(AnomalibMetric, _Recall):
    """The share of true regions (8-connected) that the predicted mask touches.

    Args:
        fields: Names of the predicted and of the true masks in a batch.
        prefix: What the metric's name starts with.
        strict: Whether a batch without these fields is an error.
        **kwargs: ``sizes``, what regions' sizes (square roots of their areas) lie between, and torchmetrics' settings.

    Example:
        >>> masks = torch.zeros(1, 8, 8)
        >>> masks[0, 1, 1] = masks[0, 5:, 5:] = 1
        >>> recall = RegionRecall(fields=["pred_mask", "gt_mask"])
        >>> recall.name
        'region_recall'
        >>> _Share.update(recall, masks * (torch.arange(8) > 3), masks)
        >>> recall.compute()
        tensor(0.5000)
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        low, high = self.sizes
        # torchmetrics and loggers know metrics by names like these.
        of = "" if (low, high) == (0, math.inf) else f"_{low}px" if high == math.inf else f"_{low}-{high}px"
        self.name = self.name.replace(type(self).__name__, f"region_recall{of}")

    def compute(self) -> torch.Tensor:
        """The share, NaN without such a region."""
        return self._value()


class _False(_Share):
    def _count(self, predicted: np.ndarray, true: np.ndarray) -> tuple[int, int]:
        count, labels = cv2.connectedComponents(predicted.astype(np.uint8), connectivity=8)
        touched = np.unique(labels[predicted & true])
        return count - 1 - len(touched), 1


class FalseRegions(AnomalibMetric, _False):
    """The mean number of predicted regions in an image that touch no true one.

    Args:
        fields: Names of the predicted and of the true masks in a batch.
        prefix: What the metric's name starts with.
        strict: Whether a batch without these fields is an error.
        **kwargs: torchmetrics' settings.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.name = self.name.replace(type(self).__name__, "false_regions_per_image")

    def compute(self) -> torch.Tensor:
        """The mean number, NaN without an image."""
        return self._value()
