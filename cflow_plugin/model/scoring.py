"""From log-likelihoods to an anomaly map and an image score (end of section 4.2)."""

__all__ = ["AnomalyScoring", "FoldedScoring"]

from collections.abc import Sequence
from functools import reduce

import numpy as np
import torch
from scipy.ndimage import distance_transform_edt
from torch import nn
from torch.nn import functional

from cflow_plugin.errors import CflowError
from cflow_plugin.modules import take_shapes_from_checkpoints

# A single extreme training vector must not set a scale's constant, so the "maximum" of the paper is this quantile.
_UPPER_QUANTILE = 0.999
# The image score is read on every fourth pixel: the map is smooth at that distance, and the selection 16 times cheaper.
_SCORE_STRIDE = 4


class AnomalyScoring(nn.Module):
    r"""Turn log-likelihoods of all scales into an anomaly map and an image score.

    For each scale :math:`k` and position :math:`i`, :math:`p_i^k = \min(1, e^{\ell_i^k - e_i^k - m_k})` with
    :math:`\ell` the log-likelihood per dimension, :math:`e_i` a correction of what is usual at the position, and
    :math:`m_k` the upper quantile of :math:`\ell - e` over *training* features; the map is
    :math:`S = 1 - \frac{1}{K} \sum_k b(p^k)` with :math:`b` bilinear upsampling and Gaussian smoothing. The constants
    :math:`e` and :math:`m` do not depend on what else is in a batch, so neither does any score. Dividing by K keeps
    scores below one: torchmetrics takes larger ones for logits, and changes them batch by batch.

    Without :math:`e` the outermost cells, whose features the encoder computes from its zero padding, look anomalous in
    every image. They are corrected by their whole distance to the interior, and each position by the share
    ``position_correction`` of its own mean: the whole mean would forgive too much where parts differ most.

    Args:
        scales: Number K of scales.
        sigma: Standard deviation of the smoothing, in pixels of the map; 0 switches it off.
        top_fraction: The image score is the mean of this fraction of the map's highest values; 0 takes the maximum.
        position_correction: Share of a position's mean that is corrected; 0 switches the correction off, borders
            included.

    Raises:
        CflowError: If a setting is out of range.
    """

    def __init__(
        self, scales: int, sigma: float = 4.0, top_fraction: float = 0.01, position_correction: float = 0.25
    ) -> None:
        super().__init__()
        if not sigma >= 0:
            msg = f"sigma must not be negative, got {sigma}."
            raise CflowError(msg)
        for name, value in (("top_fraction", top_fraction), ("position_correction", position_correction)):
            if not 0 <= value <= 1:
                msg = f"{name} must lie between 0 and 1, got {value}."
                raise CflowError(msg)
        self.sigma = sigma
        self.top_fraction = top_fraction
        self.position_correction = position_correction
        self.log_maximum: torch.Tensor
        self.register_buffer("log_maximum", torch.full((scales,), float("nan")))
        for scale in range(scales):
            # Of the map's size once it is known; one cell stands for every size.
            self.register_buffer(f"correction_{scale}", torch.zeros(1, 1))
        take_shapes_from_checkpoints(self)

    @property
    def is_calibrated(self) -> bool:
        """Whether the constants have been set from training features."""
        return bool(torch.isfinite(self.log_maximum).all())

    @torch.no_grad()
    def calibrate(self, log_likelihoods: Sequence[torch.Tensor]) -> None:
        """Set the constants from the training features' log-likelihoods.

        Args:
            log_likelihoods: For each scale ``(N, H_k, W_k)``, nats per dimension; NaN at positions not looked at.
        """
        for scale, values in enumerate(log_likelihoods):
            values = values.float()
            correction = values.new_zeros(1, 1)
            if self.position_correction:
                mean = _fill(values.nanmean(0))
                border = _border_correction(mean)
                correction = border + self.position_correction * (mean - border)
            setattr(self, f"correction_{scale}", correction)
            corrected = values - correction
            corrected = corrected[torch.isfinite(corrected)]
            # ``torch.quantile`` refuses more than 2^24 values; the k-th value has no such limit.
            rank = max(1, round(_UPPER_QUANTILE * corrected.numel()))
            self.log_maximum[scale] = corrected.kthvalue(rank).values

    def log_normalizer(self, scale: int, size: tuple[int, int]) -> torch.Tensor:
        """The constants :math:`e_i^k + m_k` of one scale, ``(H_k, W_k)``, for a feature map of this size."""
        correction = getattr(self, f"correction_{scale}")
        if tuple(correction.shape) != size:
            # An image of another size than in training: the same place in the image keeps its correction.
            correction = functional.interpolate(correction[None, None], size, mode="bilinear", align_corners=True)[0, 0]
        return correction + self.log_maximum[scale]

    def folded(self, sizes: Sequence[tuple[int, int]], size: tuple[int, int]) -> "FoldedScoring":
        """The scoring for feature maps and images of fixed sizes.

        Args:
            sizes: Height and width of each scale's feature map.
            size: Height and width of the anomaly map.
        """
        return FoldedScoring(
            [self.log_normalizer(scale, map_size) for scale, map_size in enumerate(sizes)],
            size,
            self.sigma,
            self.top_fraction,
        )

    def forward(
        self, log_likelihoods: Sequence[torch.Tensor], size: tuple[int, int]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Compute anomaly maps and image scores.

        Args:
            log_likelihoods: For each scale ``(B, H_k, W_k)``, nats per dimension.
            size: Height and width of the map.

        Returns:
            The maps, ``(B, 1, H, W)``, between 0 (as likely as the likeliest training features) and 1, and the image
            scores, ``(B,)``.
        """
        sizes = [(values.shape[-2], values.shape[-1]) for values in log_likelihoods]
        return self.folded(sizes, size)(log_likelihoods)


class FoldedScoring(nn.Module):
    """The scoring with all its constants computed for fixed sizes.

    Args:
        log_normalizers: For each scale ``(H_k, W_k)``, in nats per dimension.
        size: Height and width of the anomaly map.
        sigma: See :class:`AnomalyScoring`.
        top_fraction: See :class:`AnomalyScoring`.
    """

    def __init__(
        self, log_normalizers: Sequence[torch.Tensor], size: tuple[int, int], sigma: float, top_fraction: float
    ) -> None:
        super().__init__()
        for scale, normalizer in enumerate(log_normalizers):
            self.register_buffer(f"normalizer_{scale}", normalizer)
            rows = _upsampling_matrix(normalizer.shape[0], size[0], sigma) / len(log_normalizers)
            self.register_buffer(f"rows_{scale}", rows.to(normalizer))
            columns = _upsampling_matrix(normalizer.shape[1], size[1], sigma).T
            self.register_buffer(f"columns_{scale}", columns.to(normalizer).contiguous())
        self.top_fraction = top_fraction

    def forward(self, log_likelihoods: Sequence[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        """Compute what :meth:`AnomalyScoring.forward` computes."""
        maps = []
        for scale, values in enumerate(log_likelihoods):
            normalizer, rows, columns = (getattr(self, f"{name}_{scale}") for name in ("normalizer", "rows", "columns"))
            surprise = 1 - torch.exp(values - normalizer).clamp(max=1)
            maps.append(rows @ surprise @ columns)
        anomaly_map = reduce(torch.add, maps)
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


def _border_correction(mean: torch.Tensor) -> torch.Tensor:
    """How far the outermost cells' mean log-likelihood lies below the interior's, there; zero elsewhere.

    Args:
        mean: Mean log-likelihood of each position, ``(H, W)``.
    """
    correction = torch.zeros_like(mean)
    inside = torch.zeros_like(mean, dtype=torch.bool)
    inside[1:-1, 1:-1] = True
    if inside.any():
        correction[~inside] = (mean[~inside].mean() - mean[inside].mean()).clamp(max=0)
    return correction


def _fill(mean: torch.Tensor) -> torch.Tensor:
    """Give positions without a value that of the nearest one with a value."""
    missing = torch.isnan(mean).cpu().numpy()
    if not missing.any():
        return mean
    nearest = np.asarray(distance_transform_edt(missing, return_distances=False, return_indices=True))
    rows, columns = torch.from_numpy(nearest).long()
    return mean[rows, columns]
