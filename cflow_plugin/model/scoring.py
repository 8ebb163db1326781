"""From log-likelihoods to an anomaly map and an image score (end of section 4.2)."""

__all__ = ["Aggregation", "AnomalyScoring", "FoldedScoring", "cells_inside", "fill_unknown", "means_inside"]

import math
from collections.abc import Sequence
from functools import reduce
from typing import Literal

import numpy as np
import torch
from scipy.ndimage import distance_transform_edt
from torch import nn
from torch.nn import functional

from cflow_plugin.errors import CflowError
from cflow_plugin.modules import FullPrecision, as_on, in_double, take_shapes_from_checkpoints

Aggregation = Literal["surprise", "probability"]

# A single extreme training vector must not set a scale's constant, so the "maximum" of the paper is this quantile.
_UPPER_QUANTILE = 0.999
# Among good cells the logarithm of the share that is as unlikely falls about linearly with the log-likelihood. The line
# goes through these two shares: one is well known from few images, the other shows how far good cells go astray.
_OFTEN, _RARELY = 0.1, 0.001
# A cell that is ten times rarer comes closer to 1 by this exponent: 0.5 is one good cell in 3,000, 0.9 one in 10^11.
_RATE = 0.2
# Good cells may all be alike, as in images of one colour; a shorter decade (nats per dimension) is not believed.
_SHORTEST_DECADE = 1e-3
# To images that were not trained on so many are added that found the usual: of two scales the finer one, with four
# times as many cells, counts three times as much.
_USUAL_COUNTS, _PER_CELL = 3, math.log(3, 4)
# The image score is read on every fourth pixel: the map is smooth at that distance, and the selection 16 times cheaper.
_SCORE_STRIDE = 4
# From fewer good images it cannot be said how their scores differ.
_FEWEST_IMAGES = 8
_STILLEST, _MOST_POWER = 1e-3, 4.0
# About what a typical good cell has: a scale that sees nothing must not silence another that does.
_LEAST = 0.05


class AnomalyScoring(FullPrecision):
    r"""Turn log-likelihoods of all scales into an anomaly map and an image score.

    For each scale :math:`k` and position :math:`i`,

    .. math:: p_i^k = \min\big(1, e^{(\ell_i^k - e_i^k - m_k) / \tau_k}\big)

    with :math:`\ell` the log-likelihood per dimension, :math:`e_i` a correction of what is usual at the position, and
    two constants of the scale. They are of *good* cells, not of what else is in a batch, so neither does any score
    depend on that. :math:`b` is bilinear upsampling and Gaussian smoothing.

    ``surprise``: :math:`p = e^{-x / 5}` for a cell as unlikely as one good cell in :math:`10^x` is; a typical
    good cell has p = 1, so that good parts are dark at every scale. The map is a weighted geometric mean over the
    scales,

    .. math:: S \propto \prod_k \max\big(\epsilon, b(1 - p^k)\big)^{w_k} - \epsilon, \qquad w_k \propto \tau_k^{-2}.

    So both scales must be surprised, and the one whose good cells differ less says where: :math:`\tau` is the length
    of their distribution's tail, the noise that an anomaly has to stand out from, and weights inverse to the squared
    noise are those of the best linear combination of independent measurements. Where few images say how long the tails
    are, the weights lean towards what is usual.

    ``probability``: the paper's sum of probabilities, :math:`S = 1 - \frac{1}{K} \sum_k b(p^k)` with :math:`\tau = 1`
    and :math:`m` the upper quantile of :math:`\ell - e` over training features. Dividing by K keeps scores below one:
    torchmetrics takes larger ones for logits, and changes them batch by batch.

    The image score is the mean of the map's highest values, and what its mean over the image adds: a speck is high in
    few places, and what is odd everywhere, or in rough images whose highest values are noise, is in the mean.

    .. math:: 1 - s = (1 - s_{top}) (1 - \bar S)^{c}, \qquad
        c = w \frac{\sigma(\log(1 - s_{top}))}{\sigma(\log(1 - \bar S))}

    with standard deviations over good images, so that the mean counts w times what the highest values do, each in
    units of how good images differ in it. With fewer than eight good images :math:`c = 0`.

    Without :math:`e` the outermost cells, whose features the encoder computes from its zero padding, look anomalous in
    every image. They are corrected by their whole distance to the interior, and each position by the share
    ``position_correction`` of its own mean: the whole mean would forgive too much where parts differ most.

    Args:
        scales: Number K of scales.
        sigma: Standard deviation of the smoothing, in pixels of the map; 0 switches it off.
        top_fraction: The image score is the mean of this fraction of the map's highest values; 0 takes the maximum.
        position_correction: Share of a position's mean that is corrected; 0 switches the correction off, borders
            included.
        aggregation: How the scales make one map.
        map_mean: The weight w of the map's mean in the image score; 0 leaves it out.

    Attributes:
        interest: Which pixels are looked at, ``(H, W)``; ``(1, 1)`` for all. The others are 0 in the map, and no part
            of the image score.
        score_area: The fraction that makes the image score is of so many pixels at most; ``None`` for all there are.

    Raises:
        CflowError: If a setting is out of range.
    """

    def __init__(
        self,
        scales: int,
        sigma: float = 2.0,
        top_fraction: float = 0.0025,
        position_correction: float = 0.25,
        aggregation: Aggregation = "surprise",
        map_mean: float = 0.15,
    ) -> None:
        super().__init__()
        for name, value in (("sigma", sigma), ("map_mean", map_mean)):
            if not value >= 0:
                msg = f"{name} must not be negative, got {value}."
                raise CflowError(msg)
        for name, value in (("top_fraction", top_fraction), ("position_correction", position_correction)):
            if not 0 <= value <= 1:
                msg = f"{name} must lie between 0 and 1, got {value}."
                raise CflowError(msg)
        if aggregation not in ("surprise", "probability"):
            msg = f"aggregation must be 'surprise' or 'probability', got {aggregation!r}."
            raise CflowError(msg)
        self.sigma = sigma
        self.top_fraction = top_fraction
        self.position_correction = position_correction
        self.aggregation: Aggregation = aggregation
        self.map_mean = map_mean
        self.mean_power: torch.Tensor
        self.register_buffer("mean_power", torch.zeros(()))
        self.score_area: int | None = None
        self.log_maximum: torch.Tensor
        self.temperature: torch.Tensor
        self.register_buffer("log_maximum", torch.full((scales,), float("nan")))
        self.register_buffer("temperature", torch.ones(scales))
        self.weights: torch.Tensor
        self.register_buffer("weights", torch.full((scales,), 1 / scales))
        for scale in range(scales):
            # Of the map's size once it is known; one cell stands for every size.
            self.register_buffer(f"correction_{scale}", torch.zeros(1, 1))
        self.interest: torch.Tensor
        self.register_buffer("interest", torch.ones(1, 1, dtype=torch.bool))
        take_shapes_from_checkpoints(self)

    @property
    def is_calibrated(self) -> bool:
        """Whether the constants have been set from training features."""
        return bool(torch.isfinite(self.log_maximum).all())

    @torch.no_grad()
    def calibrate(self, log_likelihoods: Sequence[torch.Tensor], unseen: Sequence[torch.Tensor] | None = None) -> None:
        """Set the constants from good images' log-likelihoods.

        Args:
            log_likelihoods: For each scale ``(N, H_k, W_k)``, nats per dimension, of training features; NaN at
                positions not looked at. The corrections are theirs.
            unseen: The same of good images that were not trained on, which say how far good cells go astray. ``None``
                takes the training features for them.
        """
        self.mean_power.zero_()
        for scale, values in enumerate(log_likelihoods):
            values = values.float()
            correction = values.new_zeros(1, 1)
            if self.position_correction:
                mean = fill_unknown(values.nanmean(0))
                border = _border_correction(mean)
                correction = border + self.position_correction * (mean - border)
            setattr(self, f"correction_{scale}", correction)
            if self.aggregation == "probability":
                self.log_maximum[scale] = _quantile(values - correction, _UPPER_QUANTILE)
                continue
            cells = (values if unseen is None else unseen[scale].float()) - correction
            often, rarely = _quantile(cells, _OFTEN), _quantile(cells, _RARELY)
            decade = (often - rarely) / math.log10(_OFTEN / _RARELY)
            self.log_maximum[scale] = often - math.log10(_OFTEN) * decade
            self.temperature[scale] = decade.clamp_min(_SHORTEST_DECADE) / _RATE
        if self.aggregation == "surprise":
            self._weigh([values.shape[1:] for values in log_likelihoods], 0 if unseen is None else len(unseen[0]))

    @torch.no_grad()
    def calibrate_mean(self, tops: torch.Tensor, means: torch.Tensor) -> None:
        """Set what the map's mean counts, by how good images' scores differ; without this it counts nothing.

        Args:
            tops: Means of their maps' highest values, ``(N,)``, between 0 and 1; fewer than eight are not looked at.
            means: Their maps' means, ``(N,)``.
        """
        if len(tops) >= _FEWEST_IMAGES:
            spread = [torch.log1p(-in_double(values).clamp(max=1 - 1e-6)).std() for values in (tops, means)]
            power = self.map_mean * spread[0] / spread[1].clamp_min(_STILLEST)
            self.mean_power.copy_(as_on(power.clamp_max(_MOST_POWER), self.mean_power))

    def _weigh(self, sizes: Sequence[torch.Size], images: int) -> None:
        """What each scale counts in the map: the inverse square of how far good cells go astray.

        How far they do is known as well as there are images that were not trained on. With few the weights lean towards
        what held on average of many sets, that a finer scale counts more.

        Args:
            sizes: Of the scales' feature maps.
            images: Number of images that were not trained on.
        """
        cells = torch.tensor([math.prod(size) for size in sizes]).to(self.temperature)
        usual = _PER_CELL * cells.log()
        found = -2 * self.temperature.log()
        self.weights.copy_(torch.softmax((images * found + _USUAL_COUNTS * usual) / (images + _USUAL_COUNTS), 0))

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
        return FoldedScoring(self, sizes, size)

    def forward(
        self, log_likelihoods: Sequence[torch.Tensor], size: tuple[int, int]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Compute anomaly maps and image scores.

        Args:
            log_likelihoods: For each scale ``(B, H_k, W_k)``, nats per dimension.
            size: Height and width of the map.

        Returns:
            The maps, ``(B, 1, H, W)``, between 0 (as likely as good cells are) and 1, and the image scores, ``(B,)``.
        """
        sizes = [(values.shape[-2], values.shape[-1]) for values in log_likelihoods]
        return self.folded(sizes, size)(log_likelihoods)


class FoldedScoring(nn.Module):
    """The scoring with all its constants computed for fixed sizes.

    Args:
        scoring: The calibrated scoring.
        sizes: Height and width of each scale's feature map.
        size: Height and width of the anomaly map.
    """

    def __init__(self, scoring: AnomalyScoring, sizes: Sequence[tuple[int, int]], size: tuple[int, int]) -> None:
        super().__init__()
        self.temperatures: list[float] = scoring.temperature.tolist()
        self.weights: list[float] = scoring.weights.tolist()
        for scale, (height, width) in enumerate(sizes):
            normalizer = scoring.log_normalizer(scale, (height, width)).float()
            self.register_buffer(f"normalizer_{scale}", normalizer)
            rows = _upsampling_matrix(height, size[0], scoring.sigma)
            self.register_buffer(f"rows_{scale}", rows.to(normalizer))
            columns = _upsampling_matrix(width, size[1], scoring.sigma).T
            self.register_buffer(f"columns_{scale}", columns.to(normalizer).contiguous())
            # Cells that are not looked at have the value of the nearest that is: none of their own reaches the map.
            cells = cells_inside(scoring.interest, (height, width))
            self.register_buffer(
                f"source_{scale}", None if cells.all() else _nearest(cells)[0] * width + _nearest(cells)[1]
            )
        inside = functional.interpolate(scoring.interest[None, None].float(), size)[0, 0]
        self.inside: torch.Tensor | None
        self.register_buffer("inside", None if inside.all() else inside)
        # Of a small region every pixel counts.
        self.stride = _SCORE_STRIDE if inside[::_SCORE_STRIDE, ::_SCORE_STRIDE].sum() >= _SCORE_STRIDE**2 else 1
        self.looked_at = self.pixels = int(inside[:: self.stride, :: self.stride].sum())
        if scoring.score_area is not None:
            self.pixels = min(self.pixels, scoring.score_area // self.stride**2)
        self.is_product = scoring.aggregation == "surprise"
        self.top_fraction = scoring.top_fraction
        self.mean_power = float(scoring.mean_power)

    def forward(self, log_likelihoods: Sequence[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        """Compute what :meth:`AnomalyScoring.forward` computes."""
        maps = []
        for scale, (values, temperature, weight) in enumerate(
            zip(log_likelihoods, self.temperatures, self.weights, strict=True)
        ):
            normalizer, rows, columns = (getattr(self, f"{name}_{scale}") for name in ("normalizer", "rows", "columns"))
            if values.dtype != normalizer.dtype:
                values = values.to(normalizer.dtype)
            surprise = 1 - torch.exp((values - normalizer) / temperature).clamp(max=1)
            source = getattr(self, f"source_{scale}")
            if source is not None:
                surprise = surprise.flatten(1)[:, source.flatten()].unflatten(1, source.shape)
            upsampled = rows @ surprise @ columns
            maps.append(weight * (upsampled.clamp_min(_LEAST).log() if self.is_product else upsampled))
        anomaly_map = reduce(torch.add, maps)
        if self.is_product:
            anomaly_map = ((anomaly_map.exp() - _LEAST) / (1 - _LEAST)).clamp_min(0)  # of what rounding makes negative
        if self.inside is not None:
            anomaly_map = anomaly_map * self.inside
        return anomaly_map[:, None], self._image_score(anomaly_map)

    def _image_score(self, anomaly_map: torch.Tensor) -> torch.Tensor:
        top, mean = self.statistics(anomaly_map)
        if not self.mean_power:
            return top
        # By rounding a mean may be more than 1, and no power of what is negative is a number.
        return 1 - (1 - top) * (1 - mean).clamp_min(0) ** self.mean_power

    def statistics(self, anomaly_map: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The mean of a map's highest values, and that of all that is looked at.

        Args:
            anomaly_map: ``(B, H, W)``.

        Returns:
            Both ``(B,)``.
        """
        values = anomaly_map[:, :: self.stride, :: self.stride].flatten(1)
        mean = values.sum(1) / self.looked_at
        if not self.top_fraction:
            return anomaly_map.flatten(1).amax(1), mean
        return values.topk(max(1, round(self.top_fraction * self.pixels)), dim=1).values.mean(1), mean


def _upsampling_matrix(cells: int, pixels: int, sigma: float) -> torch.Tensor:
    """Linear upsampling (aligned corners, as in the original code) followed by Gaussian smoothing, as one matrix.

    Both are separable and linear, so a map costs two small matrix products instead of a bilinear pass and a
    convolution over every pixel.

    Returns:
        ``(pixels, cells)``; each row sums to one.
    """
    identity = torch.eye(cells, dtype=torch.float32)
    matrix = functional.interpolate(identity[None], size=pixels, mode="linear", align_corners=True)[0].T
    if sigma == 0:
        return matrix
    position = torch.arange(pixels, dtype=torch.float32)
    # The kernel is cut at the border and renormalised, so that no value from outside the image is invented.
    kernel = torch.exp(-0.5 * ((position[:, None] - position) / sigma) ** 2)
    return (kernel / kernel.sum(1, keepdim=True)) @ matrix


def _quantile(values: torch.Tensor, share: float) -> torch.Tensor:
    """The value that a share of all finite values does not exceed."""
    finite = values[torch.isfinite(values)]
    # ``torch.quantile`` refuses more than 2^24 values; the k-th value has no such limit.
    return finite.kthvalue(max(1, round(share * finite.numel()))).values


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


def fill_unknown(values: torch.Tensor) -> torch.Tensor:
    """Give positions without a value that of the nearest one with a value.

    Args:
        values: ``(..., H, W)``, NaN at the same positions of all maps.
    """
    known = ~torch.isnan(values.flatten(0, -3)[0] if values.ndim > 2 else values)
    if known.all():
        return values
    rows, columns = _nearest(known)
    return values[..., rows, columns]


def _nearest(known: torch.Tensor) -> torch.Tensor:
    """Row and column of the nearest cell that is known, ``(2, H, W)``."""
    found = distance_transform_edt(~known.cpu().numpy(), return_distances=False, return_indices=True)
    return torch.from_numpy(np.asarray(found)).long().to(known.device)


def cells_inside(interest: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """Which cells of a feature map are looked at: those with half of them in the region of interest, or else any part.

    Args:
        interest: ``(H, W)`` bool.
        size: Rows and columns of the feature map.
    """
    share = functional.adaptive_avg_pool2d(interest[None, None].float(), size)[0, 0]
    cells = share >= 0.5
    return cells if cells.any() else share > 0


def means_inside(pyramid: Sequence[torch.Tensor], cells: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """What has the mean of each scale's features over what is looked at.

    Args:
        pyramid: For each scale ``(B, D_k, H_k, W_k)``.
        cells: For each scale ``(H_k, W_k)`` bool.

    Returns:
        For each scale the features, or where not all is looked at ``(B, D_k, 1, 1)``.
    """
    return [
        part if inside.all() else (part * (inside / inside.sum()).to(part)).sum((2, 3), keepdim=True)
        for part, inside in zip(pyramid, cells, strict=True)
    ]
