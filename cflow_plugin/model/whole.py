"""How unusual an image is as a whole, beside what each of its places says."""

__all__ = ["WholeImage"]

from collections.abc import Sequence

import torch
from torch.nn import functional

from cflow_plugin.errors import CflowError
from cflow_plugin.modules import FullPrecision, as_on, in_double, take_shapes_from_checkpoints

_FEWEST_IMAGES = 8
# More say little that is new, and the decomposition's time grows with them.
_MOST_IMAGES = 1000
_DIRECTIONS = 256
# Added to all directions' variance, in units of its mean: the fewer bits a runtime computes in, the less can be told of
# directions in which good images hardly differ.
_SHRINKAGE = 0.05
_FOLDS = 10
# From the median of a normal distribution to its thousandth are 3.1 standard deviations, and 2.7 decades of rarity.
_DECADE = 1.15
# Decades that an image's rarity as a whole approaches, and never exceeds.
_MOST_DECADES = 2.0


class WholeImage(FullPrecision):
    r"""A Gaussian of the features' means over an image, and what it adds to the image score.

    A defect may be no place that is unlikely but a whole that is: a part that is missing, a texture too coarse
    everywhere. With :math:`z` the means of all scales' features over the image, less their mean over training images,

    .. math:: d = \frac{1}{D} z^T (\hat\Sigma + \lambda I)^{-1} z, \qquad
        r = \max\Big(0, \frac{d - m}{\delta}\Big), \qquad
        1 - s' = (1 - s) \, e^{-w \delta_s g(r)}, \qquad g(r) = 2 (1 - e^{-r / 2}) .

    Each good image's :math:`d` by a Gaussian of other images says what is usual: :math:`m` is their median,
    :math:`\delta` how much further one image in ten times as many lies, so :math:`r` are decades of rarity. In the same
    way :math:`\delta_s` is how much further :math:`-\log(1 - s)` of one good image in ten times as many lies: so a
    decade counts the same, but for the weight, whether the map or the whole says it, and where the map tells good
    images from others by far, the whole changes nothing. Since :math:`g` has an end, a change that shifts all images,
    as of light or focus, leaves their order to the map.

    :math:`\hat\Sigma` is kept by its strongest directions; its other ones share their mean variance, as in
    probabilistic principal component analysis (Tipping and Bishop, 1999).

    Args:
        dimensions: Number D of features at all scales together.
        weight: The weight w; 0 leaves the score alone.

    Raises:
        CflowError: If the weight is negative.
    """

    def __init__(self, dimensions: int, weight: float = 2.0) -> None:
        super().__init__()
        if not weight >= 0:
            msg = f"whole_image must not be negative, got {weight}."
            raise CflowError(msg)
        self.weight = weight
        self.mean: torch.Tensor
        self.scale: torch.Tensor
        self.directions: torch.Tensor
        self.typical: torch.Tensor
        self.decade: torch.Tensor
        self.score_decade: torch.Tensor
        self.register_buffer("mean", torch.zeros(dimensions))
        self.register_buffer("scale", torch.ones(()))
        self.register_buffer("directions", torch.zeros(0, dimensions))
        self.register_buffer("typical", torch.tensor(float("nan")))
        self.register_buffer("decade", torch.ones(()))
        self.register_buffer("score_decade", torch.zeros(()))
        take_shapes_from_checkpoints(self)

    @property
    def is_fitted(self) -> bool:
        """Whether the module has seen enough images to say something."""
        return bool(torch.isfinite(self.typical))

    @staticmethod
    def means(pyramid: Sequence[torch.Tensor]) -> torch.Tensor:
        """The features' means over the image.

        Args:
            pyramid: For each scale ``(B, D_k, H_k, W_k)``.

        Returns:
            ``(B, D)``, at least in single precision.
        """
        return torch.cat(
            [part.to(torch.promote_types(part.dtype, torch.float32)).mean((2, 3)) for part in pyramid], dim=1
        )

    @torch.no_grad()
    def fit(self, means: torch.Tensor) -> None:
        """Take note of good images.

        Args:
            means: What :meth:`means` gives for them, ``(N, D)``; fewer than eight are not looked at.
        """
        if len(means) < _FEWEST_IMAGES or not self.weight:
            return
        images = in_double(means)
        order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))[:_MOST_IMAGES]
        images = images[order.to(images.device)]
        folds = torch.arange(len(images)).tensor_split(min(_FOLDS, len(images)))
        apart = []
        for fold in folds:
            others = torch.ones(len(images), dtype=torch.bool)
            others[fold] = False
            apart.append(_distance(images[fold], *_gaussian(images[others])))
        distances = torch.cat(apart)
        typical, decade = distances.median(), (_DECADE * distances.std()).clamp_min(1e-12)
        for name, value in zip(("mean", "scale", "directions"), _gaussian(images), strict=True):
            setattr(self, name, as_on(value, self.mean))
        self.typical.copy_(as_on(typical, self.typical))
        self.decade.copy_(as_on(decade, self.decade))

    @torch.no_grad()
    def calibrate(self, scores: torch.Tensor) -> None:
        """Take note of how the map's scores differ among good images; without this the whole adds nothing.

        Args:
            scores: ``(N,)``, between 0 and 1; fewer than eight are not looked at.
        """
        if len(scores) >= _FEWEST_IMAGES:
            decade = _DECADE * torch.log1p(-in_double(scores).clamp(max=1 - 1e-6)).std()
            self.score_decade.copy_(as_on(decade, self.score_decade))

    def forward(self, pyramid: Sequence[torch.Tensor], score: torch.Tensor) -> torch.Tensor:
        """Add to image scores what the images as a whole say.

        Args:
            pyramid: For each scale ``(B, D_k, H_k, W_k)``.
            score: ``(B,)``, between 0 and 1.

        Returns:
            ``(B,)``, between the score and 1.
        """
        scaled = (self.means(pyramid) - self.mean) * self.scale
        # By no matrix product: a runtime in bf16 would round what goes into it, and the difference has few digits left.
        distance = scaled.square().sum(1) - (scaled[:, None] * self.directions).sum(2).square().sum(1)
        rarity = ((distance - self.typical) / self.decade).clamp_min(0)
        decades = _MOST_DECADES * (1 - torch.exp(-rarity / _MOST_DECADES))
        return 1 - (1 - score) * torch.exp(-self.weight * self.score_decade * decades)


def _gaussian(images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Mean, scale and directions of a Gaussian, as :func:`_distance` takes them; all images the same are no problem."""
    mean = images.mean(0)
    _, lengths, axes = torch.linalg.svd(images - mean, full_matrices=False)
    variance = lengths.square() / (len(images) - 1)
    dimensions, kept = images.shape[1], min(_DIRECTIONS, len(images) - 1)
    floor = (_SHRINKAGE * variance.sum() / dimensions).clamp_min(1e-12)
    others = floor + variance[kept:].sum() / max(1, dimensions - kept)
    missing = 1 - others / (variance[:kept] + floor)
    # Where few directions are kept, the weakest may fall behind the mean of the others.
    return mean, (dimensions * others).rsqrt(), missing.clamp_min(0).sqrt()[:, None] * axes[:kept]


def _distance(means: torch.Tensor, mean: torch.Tensor, scale: torch.Tensor, directions: torch.Tensor) -> torch.Tensor:
    """The squared Mahalanobis distance by all dimensions' common variance, less what the kept directions forgive.

    By a matrix product, unlike :meth:`WholeImage.forward`: of many images at once it needs far less memory.
    """
    scaled = (means - mean) * scale
    return scaled.square().sum(1) - functional.linear(scaled, directions).square().sum(1)
