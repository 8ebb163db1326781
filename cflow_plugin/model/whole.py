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
# An image that is ten times rarer comes closer to 1 by this exponent.
_RATE = 0.5


class WholeImage(FullPrecision):
    r"""A Gaussian of the features' means over an image, and what it adds to the image score.

    A defect may be no place that is unlikely but a whole that is: a part that is missing, a texture too coarse
    everywhere. With :math:`z` the means of all scales' features over the image, less their mean over training images,

    .. math:: d = \frac{1}{D} z^T (\hat\Sigma + \lambda I)^{-1} z, \qquad
        p = \min\big(1, e^{-(d - m) / 2 \delta}\big), \qquad s' = 1 - (1 - s) (1 - w (1 - p)) .

    Each good image's :math:`d` by a Gaussian of other images says what is usual: :math:`m` is their median,
    :math:`\delta` how much further one image in ten times as many lies. Since :math:`p` has an end, a change that
    shifts all images, as of light or focus, leaves their order to the map.

    :math:`\hat\Sigma` is kept by its strongest directions; its other ones share their mean variance, as in
    probabilistic principal component analysis (Tipping and Bishop, 1999).

    Args:
        dimensions: Number D of features at all scales together.
        weight: The weight w; 0 leaves the score alone.

    Raises:
        CflowError: If the weight is not between 0 and 1.
    """

    def __init__(self, dimensions: int, weight: float = 0.5) -> None:
        super().__init__()
        if not 0 <= weight <= 1:
            msg = f"whole_image must lie between 0 and 1, got {weight}."
            raise CflowError(msg)
        self.weight = weight
        self.mean: torch.Tensor
        self.scale: torch.Tensor
        self.directions: torch.Tensor
        self.typical: torch.Tensor
        self.decade: torch.Tensor
        self.register_buffer("mean", torch.zeros(dimensions))
        self.register_buffer("scale", torch.ones(()))
        self.register_buffer("directions", torch.zeros(0, dimensions))
        self.register_buffer("typical", torch.tensor(float("nan")))
        self.register_buffer("decade", torch.ones(()))
        take_shapes_from_checkpoints(self)
        self.register_load_state_dict_pre_hook(_add_unfitted)

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

    def forward(self, pyramid: Sequence[torch.Tensor], score: torch.Tensor) -> torch.Tensor:
        """Add to image scores what the images as a whole say.

        Args:
            pyramid: For each scale ``(B, D_k, H_k, W_k)``.
            score: ``(B,)``, between 0 and 1.

        Returns:
            ``(B,)``, between the score and 1.
        """
        distance = _distance(self.means(pyramid), self.mean, self.scale, self.directions)
        rarity = ((distance - self.typical) / self.decade).clamp_min(0)
        return 1 - (1 - score) * (1 - self.weight * (1 - torch.exp(-_RATE * rarity)))


def _add_unfitted(module: WholeImage, state: dict[str, torch.Tensor], prefix: str, *_: object) -> None:
    """Let checkpoints lack all of this, as those of older releases do: then it says nothing."""
    for name, buffer in module.named_buffers():
        state.setdefault(prefix + name, buffer)


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
    """The squared Mahalanobis distance by all dimensions' common variance, less what the kept directions forgive."""
    scaled = (means - mean) * scale
    return scaled.square().sum(1) - functional.linear(scaled, directions).square().sum(1)
