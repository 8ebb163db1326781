"""From log-likelihoods to an anomaly map and an image score (end of section 4.2)."""

__all__ = ["AnomalyScoring"]

from collections.abc import Sequence

import torch
from torch import nn
from torch.nn import functional

# A single extreme training vector must not set a scale's constant, so the "maximum" of the paper is this quantile.
_UPPER_QUANTILE = 0.999
# The image score is read on every fourth pixel: the map is smooth at that distance, and the selection 16 times cheaper.
_SCORE_STRIDE = 4


class AnomalyScoring(nn.Module):
    r"""Turn log-likelihoods of all scales into an anomaly map and an image score.

    For each scale :math:`k`, :math:`p_i^k = \min(1, e^{\ell_i^k - m_k})` with :math:`\ell` the log-likelihood per
    dimension and :math:`m_k` its upper quantile over *training* features; the map is
    :math:`S = K - \sum_k b(p^k)` with :math:`b` bilinear upsampling and Gaussian smoothing. The constants
    :math:`m_k` and :math:`K` do not depend on what else is in a batch, so neither does any score.

    Args:
        scales: Number K of scales.
        sigma: Standard deviation of the smoothing, in pixels of the map; 0 switches it off.
        top_fraction: The image score is the mean of this fraction of the map's highest values; 0 takes the maximum.
    """

    def __init__(self, scales: int, sigma: float = 4.0, top_fraction: float = 0.01) -> None:
        super().__init__()
        if sigma < 0:
            msg = f"sigma must not be negative, got {sigma}."
            raise ValueError(msg)
        if not 0 <= top_fraction <= 1:
            msg = f"top_fraction must lie between 0 and 1, got {top_fraction}."
            raise ValueError(msg)
        self.sigma = sigma
        self.top_fraction = top_fraction
        self.log_maximum: torch.Tensor
        self.register_buffer("log_maximum", torch.full((scales,), float("nan")))

    @property
    def is_calibrated(self) -> bool:
        """Whether the constants have been set from training features."""
        return bool(torch.isfinite(self.log_maximum).all())

    @torch.no_grad()
    def calibrate(self, log_likelihoods: Sequence[torch.Tensor]) -> None:
        """Set the constants from the training features' log-likelihoods.

        Args:
            log_likelihoods: One tensor of any shape for each scale, nats per dimension.
        """
        for scale, values in enumerate(log_likelihoods):
            # ``torch.quantile`` refuses more than 2^24 values; the k-th value has no such limit.
            rank = max(1, round(_UPPER_QUANTILE * values.numel()))
            self.log_maximum[scale] = values.flatten().float().kthvalue(rank).values

    def forward(
        self, log_likelihoods: Sequence[torch.Tensor], size: tuple[int, int]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Compute anomaly maps and image scores.

        Args:
            log_likelihoods: For each scale ``(B, H_k, W_k)``, nats per dimension.
            size: Height and width of the map.

        Returns:
            The maps, ``(B, 1, H, W)``, between 0 (as likely as the likeliest training features) and K, and the image
            scores, ``(B,)``.
        """
        anomaly_map: torch.Tensor | float = 0.0
        for log_maximum, values in zip(self.log_maximum, log_likelihoods, strict=True):
            surprise = 1 - torch.exp(values - log_maximum).clamp(max=1)
            rows = _upsampling_matrix(values.shape[-2], size[0], self.sigma).to(surprise)
            columns = _upsampling_matrix(values.shape[-1], size[1], self.sigma).to(surprise)
            anomaly_map = anomaly_map + rows @ surprise @ columns.T
        return anomaly_map[:, None], self._image_score(anomaly_map)

    def _image_score(self, anomaly_map: torch.Tensor) -> torch.Tensor:
        if not self.top_fraction:
            return anomaly_map.flatten(1).amax(1)
        values = anomaly_map[:, ::_SCORE_STRIDE, ::_SCORE_STRIDE].flatten(1)
        return values.topk(max(1, round(self.top_fraction * values.shape[1])), dim=1).values.mean(1)


def _upsampling_matrix(cells: int, pixels: int, sigma: float) -> torch.Tensor:
    """Linear upsampling (aligned corners, as in the original code) followed by Gaussian smoothing, as one matrix.

    Both are separable and linear, so a map costs two small matrix products instead of a bilinear pass and a
    convolution over every pixel.

    Returns:
        ``(pixels, cells)``; each row sums to one.
    """
    matrix = functional.interpolate(torch.eye(cells)[None], size=pixels, mode="linear", align_corners=True)[0].T
    if sigma == 0:
        return matrix
    position = torch.arange(pixels, dtype=torch.float32)
    # The kernel is cut at the border and renormalised, so that no value from outside the image is invented.
    kernel = torch.exp(-0.5 * ((position[:, None] - position) / sigma) ** 2)
    return (kernel / kernel.sum(1, keepdim=True)) @ matrix
