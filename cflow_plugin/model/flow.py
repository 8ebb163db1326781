"""One decoder: a conditional normalizing flow over the feature vectors of one scale (section 4.2)."""

__all__ = ["ConditionalFlow", "CouplingBlock", "Whitening", "log_likelihood"]

import math
from collections.abc import Sequence
from functools import reduce
from typing import Literal, cast

import torch
from FrEIA.framework import SequenceINN
from FrEIA.modules import InvertibleModule
from torch import nn
from torch.nn import functional

from cflow_plugin.modules import as_on, in_double

Permutation = Literal["swap", "random", "soft"]
_VECTORS_AT_ONCE = 65_536


def log_likelihood(u: torch.Tensor, log_det: torch.Tensor) -> torch.Tensor:
    r"""Log-likelihood per dimension (Eq. 8 divided by :math:`D`).

    .. math:: \frac{1}{D}\Big(-\frac{\|u\|_2^2 + D \log 2\pi}{2} + \log |\det J|\Big)

    Args:
        u: Vectors in the base distribution's space, ``(..., D)``.
        log_det: :math:`\log |\det J|` of the map to ``u``, ``(...)``, in nats.

    Returns:
        Nats per dimension, ``(...)``.
    """
    dimensions = u.shape[-1]
    return (
        log_det - 0.5 * _total(u.to(torch.promote_types(u.dtype, torch.float32)).square())
    ) / dimensions - 0.5 * math.log(2 * math.pi)


def _total(values: torch.Tensor) -> torch.Tensor:
    """The sum over the last dimension, at least in single precision: in half, hundreds of terms leave two digits."""
    return values.sum(-1, dtype=torch.promote_types(values.dtype, torch.float32))


class Whitening(InvertibleModule):
    r"""A linear first layer, :math:`y = W (x - \mu)`, set from training features in closed form.

    With :math:`W \hat\Sigma W^T = I` the flow starts at the multivariate Gaussian of Eq. 2, the prior that section
    3.2 finds in earlier models, and the coupling blocks have only the departure from it to learn. Of all such W this
    one spares a quarter of the work: the first half of :math:`y` is the whitened first half of :math:`x`, the second
    half what the first cannot predict of the second, whitened,

    .. math::

        W = \begin{bmatrix} \Sigma_{11}^{-1/2} & 0 \\ -S^{-1/2} \Sigma_{21} \Sigma_{11}^{-1} & S^{-1/2} \end{bmatrix},
        \qquad S = \Sigma_{22} - \Sigma_{21} \Sigma_{11}^{-1} \Sigma_{12} .

    Of long vectors it puts out a part alone, the ``kept`` whitened principal components of largest variance, which
    bounds the cost of the blocks behind it. The others are taken to be Gaussian, as Eq. 2 has them: the logarithm of
    their density is added to the log-determinant, as that of what a multi-scale flow factors out. So the likelihood
    stays one of the whole vector.

    Until :meth:`fit` is called the matrix is the identity.

    Args:
        dims_in: FrEIA's input dimensions, ``[(D,)]``.
        dims_c: Must be empty: the layer takes no condition.
        kept: Length of the vectors that are put out; D if it is ``None`` or larger.
        shrinkage: Weight of the isotropic part added to the covariance, in units of its mean variance. It keeps
            directions without variance (dead channels, fewer vectors than dimensions) finite.
    """

    def __init__(
        self,
        dims_in: Sequence[tuple[int]],
        dims_c: Sequence[tuple[int]] | None = None,
        kept: int | None = None,
        shrinkage: float = 0.01,
    ) -> None:
        super().__init__(dims_in, dims_c or [])
        dimensions = dims_in[0][0]
        self.kept = min(kept or dimensions, dimensions)
        self.shrinkage = shrinkage
        self.first_half = dimensions - dimensions // 2
        self.mean: torch.Tensor
        self.matrix: torch.Tensor
        self.log_det: torch.Tensor
        self.register_buffer("mean", torch.zeros(dimensions))
        self.register_buffer("matrix", torch.eye(dimensions))
        self.register_buffer("log_det", torch.zeros(()))

    def fit(self, vectors: torch.Tensor, changes: torch.Tensor | None = None) -> None:
        """Set mean and matrix from feature vectors.

        Args:
            vectors: Training features, ``(N, D)``, N at least 2.
            changes: By how much features of one part differ from image to image, ``(M, D)``: their covariance is
                added, so that such differences are not magnified where good parts themselves hardly differ.

        Raises:
            ValueError: If the features are not finite.
        """
        # In parts: a copy of all vectors in float64 would be twice as large as they are.
        parts = vectors.split(_VECTORS_AT_ONCE)
        mean = reduce(torch.add, (in_double(part).sum(0) for part in parts)) / len(vectors)
        centred = (in_double(part) - mean for part in parts)
        covariance = reduce(torch.add, (part.T @ part for part in centred)) / max(1, len(vectors) - 1)
        if changes is not None:
            parts = (in_double(part) for part in changes.split(_VECTORS_AT_ONCE))
            covariance = covariance + reduce(torch.add, (part.T @ part for part in parts)) / len(changes)
        if not torch.isfinite(covariance).all():
            msg = "The training features are not finite: the encoder's weights or the training images hold NaN or Inf."
            raise ValueError(msg)
        # A constant image set has no variance at all; the floor keeps the matrix finite there, too.
        isotropic = (self.shrinkage * covariance.diagonal().mean()).clamp_min(1e-12)
        covariance = covariance + isotropic * torch.eye(len(mean)).to(covariance)
        self.mean.copy_(as_on(mean, self.mean))
        whole = self.kept == len(mean)
        matrix, log_det = self._split(covariance) if whole else _inverse_root(covariance, symmetric=False)
        self.matrix.copy_(as_on(matrix, self.matrix))
        self.log_det.copy_(as_on(log_det, self.log_det))

    def _split(self, covariance: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The matrix that whitens each half, and its log-determinant."""
        first, second = slice(None, self.first_half), slice(self.first_half, None)
        prediction = torch.linalg.solve(covariance[first, first], covariance[first, second]).T
        unpredicted = covariance[second, second] - prediction @ covariance[first, second]
        root, log_det = _inverse_root(covariance[first, first])
        other_root, other_log_det = _inverse_root(unpredicted)
        matrix = torch.zeros_like(covariance)
        matrix[first, first] = root
        matrix[second, first] = -other_root @ prediction
        matrix[second, second] = other_root
        return matrix, log_det + other_log_det

    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]  the base class says Iterable and indexes
        self, x: Sequence[torch.Tensor], c: Sequence[torch.Tensor] = (), rev: bool = False, jac: bool = True
    ) -> tuple[tuple[torch.Tensor], torch.Tensor]:
        """See :class:`FrEIA.modules.InvertibleModule`; vectors are ``(..., D)``."""
        del c, jac  # no condition; the determinant is a constant and costs nothing
        if rev:
            whole = functional.pad(x[0], (0, len(self.mean) - self.kept))  # of what is not kept the likeliest
            inverse = torch.linalg.solve(self.matrix, whole.flatten(0, -2).T).T.view_as(whole)
            return (inverse + self.mean,), -self.log_det - self._rest(whole)
        whole = functional.linear(x[0] - self.mean, self.matrix)
        return (whole[..., : self.kept],), self.log_det + self._rest(whole)

    def _rest(self, whole: torch.Tensor) -> torch.Tensor | float:
        """The log-likelihood of what is not kept."""
        if self.kept == len(self.mean):
            return 0.0
        rest = whole[..., self.kept :]
        return rest.shape[-1] * log_likelihood(rest, self.log_det.new_zeros(()))

    def output_dims(self, input_dims: list[tuple[int]]) -> list[tuple[int]]:
        """Return the dimensions that are kept."""
        del input_dims
        return [(self.kept,)]


def _inverse_root(covariance: torch.Tensor, symmetric: bool = True) -> tuple[torch.Tensor, torch.Tensor]:
    """An inverse square root of a positive definite matrix, and its log-determinant.

    It is symmetric, or else has the principal axes for rows, that of largest variance first.
    """
    variance, axes = torch.linalg.eigh(covariance)
    # Rounding must not make a direction without variance negative.
    variance = variance.clamp_min(variance[-1] * 1e-12)
    whitened = axes / variance.sqrt()
    return whitened @ axes.T if symmetric else whitened.T.flip(0), -0.5 * variance.log().sum()


class CouplingBlock(InvertibleModule):
    r"""Affine coupling, learned global affine and a permutation, conditioned on position.

    For an input :math:`[x_1, x_2]` (:math:`x_1` the larger half if D is odd) and a condition :math:`c`,

    .. math::

        [s, t] &= 0.1 \, \mathrm{subnet}([x_1, c]) \\
        y &= P \big( \Psi \odot [x_1,\; x_2 \odot e^{\alpha \tanh s} + t] + b \big)

    which is FrEIA's ``AllInOneBlock`` (same parameters, names and initial values), except that the permutation
    :math:`P`, unless it is soft, is an index instead of a D×D matrix and that the condition enters the first linear
    layer as a term of its own. Since vectors at one position share their condition, that term is computed once a
    position and broadcast.

    Args:
        dims_in: FrEIA's input dimensions, ``[(D,)]``.
        dims_c: Condition dimensions, ``[(C,)]``, or empty for an unconditional block (UFLOW).
        clamp: Soft clamp :math:`\alpha` of the log-scale (the original code uses 1.9).
        permutation: ``"swap"`` lets the halves change roles, ``"random"`` draws a permutation as the paper does. A
            permutation within a half is absorbed by the neighbouring linear layers, so swapping loses nothing but
            the exchange between halves; it needs no gather, in training and inference. ``"soft"`` draws a random
            orthogonal matrix, which mixes all dimensions, as the original code does; it costs D² multiplications a
            vector, and nothing in the log-determinant.

    Attributes:
        permutation: The index, ``(D,)``, or ``None`` where the permutation is soft.
        rotation: The matrix, ``(D, D)``, or ``None`` where it is not.
    """

    def __init__(
        self,
        dims_in: Sequence[tuple[int]],
        dims_c: Sequence[tuple[int]] | None = None,
        clamp: float = 1.9,
        permutation: Permutation = "swap",
    ) -> None:
        super().__init__(dims_in, dims_c or [])
        dimensions = dims_in[0][0]
        if dimensions < 2:
            msg = f"A coupling block needs vectors of at least two dimensions to split, got {dimensions}."
            raise ValueError(msg)
        self.condition_dims = sum(dims[0] for dims in self.dims_c)
        self.passive = dimensions - dimensions // 2
        self.active = dimensions // 2
        self.clamp = clamp
        inputs = self.passive + self.condition_dims
        self.subnet = nn.Sequential(nn.Linear(inputs, 2 * inputs), nn.ReLU(), nn.Linear(2 * inputs, 2 * self.active))
        # softplus^-1 of an initial scale of one, in FrEIA's parametrisation 0.1 softplus(x, beta=0.5)
        self.global_scale = nn.Parameter(torch.full((1, dimensions), 2 * math.log(math.expm1(5.0))))
        self.global_offset = nn.Parameter(torch.zeros(1, dimensions))
        index, matrix = None, None
        if permutation == "swap":
            index = torch.arange(dimensions).roll(self.active)
        elif permutation == "random":
            index = torch.randperm(dimensions)
        elif permutation == "soft":
            matrix = nn.init.orthogonal_(torch.empty(dimensions, dimensions))
        else:
            msg = f"permutation must be 'swap', 'random' or 'soft', got {permutation!r}."
            raise ValueError(msg)
        self.permutation: torch.Tensor | None
        self.rotation: torch.Tensor | None
        self.register_buffer("permutation", index)
        self.register_buffer("rotation", matrix)
        self.swaps = permutation == "swap"

    @property
    def linear_layers(self) -> tuple[nn.Linear, nn.Linear]:
        """The two of the sub-network."""
        return cast("nn.Linear", self.subnet[0]), cast("nn.Linear", self.subnet[2])

    def _coefficients(self, x1: torch.Tensor, c: Sequence[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        """Log-scale and shift for the active half."""
        first, second = self.linear_layers
        if self.condition_dims:
            from_position = functional.linear(torch.cat(list(c), -1), first.weight[:, self.passive :], first.bias)
            hidden = functional.linear(x1, first.weight[:, : self.passive]).add_(from_position)
        else:
            hidden = first(x1)
        coefficients = 0.1 * second(hidden.relu_())
        return self.clamp * torch.tanh(coefficients[..., : self.active]), coefficients[..., self.active :]

    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]  the base class says Iterable and indexes
        self, x: Sequence[torch.Tensor], c: Sequence[torch.Tensor] = (), rev: bool = False, jac: bool = True
    ) -> tuple[tuple[torch.Tensor], torch.Tensor]:
        """See :class:`FrEIA.modules.InvertibleModule`; vectors are ``(..., D)``, conditions broadcast against them."""
        del jac  # a sum over what is computed anyway
        scale = 0.1 * functional.softplus(self.global_scale[0], beta=0.5)
        log_scale = scale.log().sum()
        if rev:
            y = x[0]
            if self.permutation is not None:
                y = y.index_select(-1, self.permutation.argsort())
            if self.rotation is not None:
                y = y @ self.rotation
            x1, x2 = ((y - self.global_offset[0]) / scale).split([self.passive, self.active], dim=-1)
            s, t = self._coefficients(x1, c)
            return (torch.cat([x1, (x2 - t) * torch.exp(-s)], -1),), -(_total(s) + log_scale)
        x1, x2 = x[0].split([self.passive, self.active], dim=-1)
        s, t = self._coefficients(x1, c)
        scale1, scale2 = scale.split([self.passive, self.active])
        offset1, offset2 = self.global_offset[0].split([self.passive, self.active])
        y1 = torch.addcmul(offset1, x1, scale1)
        y2 = torch.addcmul(offset2, torch.addcmul(t, x2, torch.exp(s)), scale2)
        if self.swaps:
            # Joined in the other order: the gradient of an index is a scatter.
            y = torch.cat([y2, y1], -1)
        elif self.rotation is None:
            y = torch.cat([y1, y2], -1)[..., self.permutation]
        else:
            y = functional.linear(torch.cat([y1, y2], -1), self.rotation)
        return (y,), _total(s) + log_scale

    def output_dims(self, input_dims: list[tuple[int]]) -> list[tuple[int]]:
        """Return the dimensions unchanged."""
        return input_dims


class ConditionalFlow(SequenceINN):
    """The decoder of one scale: whitening, then coupling blocks, on FrEIA's sequence.

    Args:
        dimensions: Length D of a feature vector.
        condition_dims: Length C of a condition vector; 0 makes an unconditional flow (UFLOW).
        coupling_blocks: Number of coupling blocks; the paper has 8.
        clamp: Soft clamp of the blocks' log-scales.
        permutation: See :class:`CouplingBlock`.
        kept: How many dimensions the coupling blocks take, see :class:`Whitening`.

    Example:
        >>> flow = ConditionalFlow(dimensions=16, condition_dims=8, coupling_blocks=4)
        >>> u, log_det = flow(torch.randn(5, 16), [torch.randn(5, 8)])
        >>> log_likelihood(u, log_det).shape
        torch.Size([5])
    """

    def __init__(
        self,
        dimensions: int,
        condition_dims: int = 128,
        coupling_blocks: int = 4,
        clamp: float = 1.9,
        permutation: Permutation = "swap",
        kept: int | None = None,
    ) -> None:
        super().__init__(dimensions)
        if coupling_blocks < 1:
            msg = f"A flow needs at least one coupling block, got {coupling_blocks}."
            raise ValueError(msg)
        self.condition_dims = condition_dims
        self.append(Whitening, kept=kept)
        conditioning = {"cond": 0, "cond_shape": (condition_dims,)} if condition_dims else {}
        for _ in range(coupling_blocks):
            self.append(CouplingBlock, clamp=clamp, permutation=permutation, **conditioning)

    @property
    def whitening(self) -> Whitening:
        """The linear first layer."""
        return cast("Whitening", self[0])

    @property
    def blocks(self) -> list[CouplingBlock]:
        """The coupling blocks, in the order of the flow."""
        return [cast("CouplingBlock", block) for block in self.module_list[1:]]

    def log_likelihood(
        self, vectors: torch.Tensor, condition: torch.Tensor, noise: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Log-likelihood per dimension of feature vectors given their positions.

        Args:
            vectors: ``(..., P, D)``.
            condition: ``(P, C)``, one row a position, shared by all leading dimensions; ignored by a UFLOW.
            noise: Added behind the whitening, where all directions have the same variance; shaped as ``vectors``.

        Returns:
            Nats per dimension, ``(..., P)``.
        """
        share = self.whitening.kept / vectors.shape[-1]  # per dimension of the whole vector, not of what is kept
        if noise is None:
            return share * log_likelihood(*self(vectors, [condition]))
        (u,), log_det = self.whitening((vectors,))
        u = u + noise[..., : self.whitening.kept]
        for block in self.blocks:
            (u,), contribution = block((u,), (condition,) if self.condition_dims else ())
            log_det = log_det + contribution
        return share * log_likelihood(u, log_det)
