import pytest
import torch

from cflow_plugin.model.backbones import BACKBONES
from cflow_plugin.model.flow import ConditionalFlow
from cflow_plugin.model.folded import FoldedFlow
from cflow_plugin.model.position import positional_encoding_2d
from cflow_plugin.model.torch_model import CflowModel

SIZES = [(4, 4), (3, 5)]


@torch.no_grad()
def perturb(module, by=0.1):
    for parameter in module.parameters():
        parameter += by * torch.randn_like(parameter)
    return module


def make_flow(dimensions, condition_dims, permutation="swap", whiten=True, kept=None):
    torch.manual_seed(dimensions)
    flow = perturb(ConditionalFlow(dimensions, condition_dims, coupling_blocks=3, permutation=permutation, kept=kept))
    if whiten:
        flow.whitening.fit(torch.randn(200, dimensions) @ torch.randn(dimensions, dimensions) + 2)
    return flow


def unfolded(flow, features):
    height, width = features.shape[-2:]
    condition = positional_encoding_2d(flow.condition_dims, height, width) if flow.condition_dims else torch.empty(0)
    likelihood = flow.log_likelihood(features.flatten(2).transpose(1, 2), condition.to(features))
    return likelihood.unflatten(1, (height, width))


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 1e-5)])
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("whiten", [True, False])
@pytest.mark.parametrize("permutation", ["swap", "random", "soft"])
@pytest.mark.parametrize("condition_dims", [0, 8])
@pytest.mark.parametrize(("dimensions", "kept"), [(2, None), (5, None), (12, None), (17, 7)])
def test_folded_equals_unfolded(dimensions, kept, condition_dims, permutation, whiten, size, dtype, tolerance):
    flow = make_flow(dimensions, condition_dims, permutation, whiten, kept).to(dtype)
    if permutation == "soft":
        for block in list(flow)[1:]:
            torch.nn.init.orthogonal_(block.rotation)  # as exactly as the dtype allows
    features = torch.randn(3, dimensions, *size, dtype=dtype)
    torch.testing.assert_close(
        FoldedFlow(flow, *size)(features), unfolded(flow, features), rtol=tolerance, atol=tolerance
    )


@pytest.mark.long
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 1e-5)])
@pytest.mark.parametrize("condition_dims", [0, 128])
@pytest.mark.parametrize("backbone", [*BACKBONES, "gabor"])
def test_the_model_s_two_forms_are_equal(backbone, condition_dims, dtype, tolerance):
    torch.manual_seed(0)
    layers = ["layer2"] if backbone == "wide_resnet50_2" else None  # the others' vectors are of up to 1024 numbers
    model = CflowModel(backbone, layers, condition_dims=condition_dims, coupling_blocks=2).to(dtype)
    perturb(model.decoders, 0.02)
    with torch.no_grad():
        for size in ((64, 64), (64, 96)):
            images = torch.randn(2, 3, *size, dtype=dtype)
            trained, folded = model.train().log_likelihoods(images), model.eval().log_likelihoods(images)
            for one, other in zip(trained, folded, strict=True):
                torch.testing.assert_close(other, one, rtol=tolerance, atol=tolerance)


@pytest.fixture
def model():
    torch.manual_seed(0)
    return CflowModel("gabor", coupling_blocks=2)


@pytest.mark.parametrize("how", ["step in eval mode", "step in training mode", "loaded", "whitened", "converted"])
def test_folding_is_never_stale(model, how):
    images = torch.randn(1, 3, 64, 64)
    model.eval()
    with torch.no_grad():
        before = model.log_likelihoods(images)[0]
        assert torch.equal(model.log_likelihoods(images)[0], before)
    if how.startswith("step"):
        training = "training" in how
        model.train(training)
        optimizer = torch.optim.Adam(model.decoders.parameters(), lr=0.01, fused=training)
        for parameter in model.decoders.parameters():
            parameter.grad = torch.randn_like(parameter)
        optimizer.step()
    elif how == "loaded":
        model.load_state_dict(CflowModel("gabor", coupling_blocks=2).state_dict())
        model.decoders[0].load_state_dict(perturb(model.decoders[0]).state_dict())
    elif how == "whitened":
        model.fit_whitening([torch.randn(200, channels) * 3 for channels in model.encoder.channels])
    else:
        model.double()
        images = images.double()
    with torch.no_grad():
        model.eval()  # is when the folded form is looked at anew
        after = model.log_likelihoods(images)[0]
        expected = model.train().log_likelihoods(images)[0]
    assert after.dtype == images.dtype
    assert how == "converted" or not torch.allclose(after, before, atol=1e-3)
    torch.testing.assert_close(after, expected, rtol=1e-5, atol=1e-5)


def test_a_model_made_in_inference_mode():
    with torch.inference_mode():
        model = CflowModel("gabor", coupling_blocks=2).eval()
        first = model.log_likelihoods(torch.ones(1, 3, 64, 64))[0]
        assert torch.equal(model.log_likelihoods(torch.ones(1, 3, 64, 64))[0], first)


def test_folding_costs_no_memory_on_disk(model, tmp_path):
    names = set(model.state_dict())
    sizes = []
    for name in ("fresh", "used"):
        torch.save(model.eval(), tmp_path / name)
        sizes.append((tmp_path / name).stat().st_size)
        with torch.no_grad():
            model.log_likelihoods(torch.randn(1, 3, 64, 64))
    assert sizes[1] < 1.01 * sizes[0]
    assert set(model.state_dict()) == names
