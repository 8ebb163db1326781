import math

import pytest
import torch
from FrEIA.modules import AllInOneBlock
from sklearn.decomposition import PCA
from torch import nn

from cflow_plugin.model.flow import ConditionalFlow, CouplingBlock, Whitening, log_likelihood
from cflow_plugin.model.position import positional_encoding_2d


@pytest.fixture(autouse=True)
def double_precision():
    torch.manual_seed(0)
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def randomise(module):
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.5)
    return module


@pytest.mark.parametrize("dimensions", [6, 7])
@pytest.mark.parametrize("condition_dims", [0, 8])
@pytest.mark.parametrize("permutation", ["swap", "random", "soft"])
def test_coupling_block_equals_freias(dimensions, condition_dims, permutation):
    dims_c = [(condition_dims,)] if condition_dims else []

    def subnet(inputs, outputs):
        return nn.Sequential(nn.Linear(inputs, 2 * inputs), nn.ReLU(), nn.Linear(2 * inputs, outputs))

    block = randomise(CouplingBlock([(dimensions,)], dims_c, clamp=1.9, permutation=permutation))
    reference = AllInOneBlock(
        [(dimensions,)], dims_c, subnet_constructor=subnet, affine_clamping=1.9, permute_soft=False
    ).double()  # FrEIA makes its permutation in single precision whatever the default is
    weights = block.state_dict()
    matrix = weights.pop("rotation") if permutation == "soft" else torch.eye(dimensions)[weights.pop("permutation")]
    weights["w_perm"], weights["w_perm_inv"] = matrix, matrix.T
    reference.load_state_dict(weights)

    x, c = torch.randn(5, dimensions), [torch.randn(5, condition_dims)] if condition_dims else []
    (ours,), our_log_det = block((x,), c)
    (theirs,), their_log_det = reference((x,), c)
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(our_log_det, their_log_det.expand(5), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dimensions", [4, 5])
@pytest.mark.parametrize("condition_dims", [0, 4])
@pytest.mark.parametrize("permutation", ["swap", "random", "soft"])
def test_inverse_and_log_determinant(dimensions, condition_dims, permutation):
    flow = randomise(ConditionalFlow(dimensions, condition_dims, coupling_blocks=3, permutation=permutation))
    flow.whitening.fit(torch.randn(200, dimensions) @ torch.randn(dimensions, dimensions) + 2)
    x, c = torch.randn(1, dimensions), [torch.randn(1, condition_dims)]
    u, log_det = flow(x, c)
    jacobian = torch.autograd.functional.jacobian(lambda v: flow(v[None], c)[0][0], x[0])
    torch.testing.assert_close(log_det[0], jacobian.det().abs().log())
    back, inverse_log_det = flow(u, c, rev=True)
    torch.testing.assert_close(back, x)
    torch.testing.assert_close(inverse_log_det, -log_det)


def test_gradient_reaches_every_parameter():
    flow = randomise(ConditionalFlow(6, 4, coupling_blocks=2))
    flow.log_likelihood(torch.randn(3, 5, 6), torch.randn(5, 4)).sum().backward()
    assert all(parameter.grad is not None and parameter.grad.any() for parameter in flow.parameters())


@pytest.mark.parametrize("at_once", [65_536, 999])
def test_whitening_makes_unit_covariance(monkeypatch, at_once):
    monkeypatch.setattr("cflow_plugin.model.flow._VECTORS_AT_ONCE", at_once)
    vectors = torch.randn(5000, 3) @ torch.tensor([[2.0, 0, 0], [1, 0.5, 0], [0, 1, 3]]) + 7
    whitening = Whitening([(3,)], shrinkage=0.0)
    whitening.fit(vectors)
    (white,), log_det = whitening((vectors,))
    torch.testing.assert_close(torch.cov(white.T), torch.eye(3), rtol=0, atol=1e-9)
    torch.testing.assert_close(log_det, -0.5 * torch.cov(vectors.T).logdet())


def test_whitening_takes_in_how_features_change_from_image_to_image():
    vectors, changes = torch.randn(500, 3) * torch.tensor([1.0, 2.0, 0.1]), torch.randn(40, 3)
    whitening = Whitening([(3,)], shrinkage=0.0)
    whitening.fit(vectors, changes)
    total = torch.cov(vectors.T) + changes.T @ changes / len(changes)
    torch.testing.assert_close(whitening.matrix @ total @ whitening.matrix.T, torch.eye(3), rtol=0, atol=1e-5)
    torch.testing.assert_close(whitening.mean, vectors.mean(0))


def test_whitening_survives_a_constant_channel_and_refuses_nan():
    vectors = torch.randn(10, 3)
    vectors[:, 1] = 4.0
    whitening = Whitening([(3,)])
    whitening.fit(vectors)
    assert torch.isfinite(whitening.matrix).all()
    vectors[0, 0] = float("nan")
    with pytest.raises(ValueError, match="not finite"):
        whitening.fit(vectors)


def test_noise_is_added_behind_the_whitening():
    flow = randomise(ConditionalFlow(4, 4, coupling_blocks=2))
    vectors, condition, noise = torch.randn(3, 4), torch.randn(3, 4), torch.randn(3, 4)
    flow.whitening.fit(torch.randn(50, 4) * 3)
    shifted = vectors + torch.linalg.solve(flow.whitening.matrix, noise.T).T
    torch.testing.assert_close(flow.log_likelihood(vectors, condition, noise), flow.log_likelihood(shifted, condition))


def test_what_the_blocks_do_not_take_is_gaussian():
    vectors, condition = torch.randn(300, 6) @ torch.randn(6, 6) + 2, torch.randn(5, 4)
    flow = randomise(ConditionalFlow(6, 4, coupling_blocks=2, kept=4))
    flow.whitening.shrinkage = 0.0
    flow.whitening.fit(vectors)
    principal = PCA(4, whiten=True).fit(vectors.numpy()).transform(vectors.numpy())
    (kept,), _ = flow.whitening((vectors,))
    torch.testing.assert_close(kept.abs(), torch.from_numpy(principal).abs())  # an axis may point either way

    def whole(vector, position):
        white = flow.whitening.matrix @ (vector - flow.whitening.mean)
        u = (white[None, :4],)
        for block in flow.blocks:
            u, _ = block(u, (position[None],))
        return torch.cat([u[0][0], white[4:]])

    normal = torch.distributions.MultivariateNormal(torch.zeros(6), torch.eye(6))
    for vector, position, likelihood in zip(
        vectors, condition, flow.log_likelihood(vectors[:5], condition), strict=False
    ):
        jacobian = torch.autograd.functional.jacobian(lambda v, p=position: whole(v, p), vector)
        expected = normal.log_prob(whole(vector, position)) + jacobian.det().abs().log()
        torch.testing.assert_close(likelihood, expected / 6)
    back, _ = flow(torch.randn(5, 4), [condition], rev=True)
    torch.testing.assert_close(flow(flow(back, [condition])[0], [condition], rev=True)[0], back)


def test_equation_8():
    u, log_det = torch.randn(5, 7), torch.randn(5)
    normal = torch.distributions.MultivariateNormal(torch.zeros(7), torch.eye(7))
    torch.testing.assert_close(log_likelihood(u, log_det), (normal.log_prob(u) + log_det) / 7)


@pytest.mark.long
def test_likelihood_of_a_plane_integrates_to_one():
    flow = ConditionalFlow(2, 0, coupling_blocks=4)
    for block in flow.module_list[1:]:  # far from the identity, but not from the origin
        for layer in (block.subnet[0], block.subnet[2]):
            nn.init.normal_(layer.weight, std=2.0)
        nn.init.normal_(block.global_offset, std=0.5)
    axis = torch.linspace(-40, 40, 1601)
    grid = torch.cartesian_prod(axis, axis)
    with torch.no_grad():
        u = torch.randn(20_000, 2)
        samples = flow(u, rev=True)[0]
        assert samples.abs().max() < 40, "the density must lie within the grid"
        density = torch.exp(2 * flow.log_likelihood(grid, torch.empty(len(grid), 0)))
    integral = density.sum() * (axis[1] - axis[0]) ** 2
    assert abs(integral - 1) < 0.02


def test_positional_encoding_against_its_formula():
    height, width, channels = 3, 4, 8
    table = positional_encoding_2d(channels, height, width)
    for row in range(height):
        for column in range(width):
            expected = []
            for place in (column, row):
                for harmonic in range(channels // 4):
                    angle = place / 10_000 ** (2 * harmonic / (channels / 2))
                    expected += [math.sin(angle), math.cos(angle)]
            torch.testing.assert_close(table[row * width + column], torch.tensor(expected))


def test_impossible_settings_are_refused():
    with pytest.raises(ValueError, match="multiple of four"):
        positional_encoding_2d(6, 2, 2)
    with pytest.raises(ValueError, match="two dimensions"):
        CouplingBlock([(1,)])
    with pytest.raises(ValueError, match="at least one"):
        ConditionalFlow(4, 4, coupling_blocks=0)
    with pytest.raises(ValueError, match="permutation"):
        ConditionalFlow(4, 4, permutation="none")
