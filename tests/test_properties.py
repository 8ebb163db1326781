"""What holds for any layers, sizes, settings and batches."""

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cflow_plugin.model.filter_bank import FilterBank
from cflow_plugin.model.torch_model import CflowModel

SIZES = st.tuples(st.integers(32, 72), st.integers(32, 72))
LAYERS = st.lists(st.sampled_from(FilterBank.layers[:3]), min_size=1, max_size=3, unique=True).map(sorted)
MANY = settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)


def build(layers, blocks, condition, permutation, sigma, top, size, seed):
    """A model with random decoders and constants, as training would leave it."""
    torch.manual_seed(seed)
    model = CflowModel(
        backbone="gabor", layers=layers, coupling_blocks=blocks, condition_dims=condition, permutation=permutation,
        sigma=sigma, top_fraction=top,
    )  # fmt: skip
    for parameter in model.decoders.parameters():
        torch.nn.init.normal_(parameter, std=0.05)
    with torch.no_grad():
        model.calibrate(model.log_likelihoods(torch.randn(3, 3, *size)))
    return model.eval()


MODELS = st.builds(
    build,
    layers=LAYERS,
    blocks=st.integers(1, 3),
    condition=st.sampled_from([0, 4, 8, 64]),
    permutation=st.sampled_from(["swap", "random", "soft"]),
    sigma=st.sampled_from([0.0, 1.0, 4.0]),
    top=st.sampled_from([0.0, 0.01, 0.5]),
    size=st.shared(SIZES, key="size"),
    seed=st.integers(0, 100),
)


@pytest.mark.long
@MANY
@given(MODELS, st.shared(SIZES, key="size"), st.integers(1, 5), st.integers(1, 4))
@torch.no_grad()
def test_any_model_any_size_any_batch(model, size, images, part):
    torch.manual_seed(images)
    pictures = torch.randn(images, 3, *size)
    whole = model(pictures)
    assert whole.anomaly_map.shape == (images, 1, *size)
    assert whole.pred_score.shape == (images,)
    assert torch.isfinite(whole.anomaly_map).all()
    assert torch.isfinite(whole.pred_score).all()
    assert whole.anomaly_map.min() >= 0
    assert whole.anomaly_map.max() <= 1
    # Scores do not depend on the company an image is in.
    parts = [model(batch) for batch in pictures.split(part)]
    torch.testing.assert_close(torch.cat([one.anomaly_map for one in parts]), whole.anomaly_map, rtol=0, atol=2e-5)
    torch.testing.assert_close(torch.cat([one.pred_score for one in parts]), whole.pred_score, rtol=0, atol=2e-5)
    order = torch.randperm(images)
    torch.testing.assert_close(model(pictures[order]).pred_score, whole.pred_score[order], rtol=0, atol=2e-5)
    # What is exported is the same function.
    folded = model.folded(size)(pictures)
    torch.testing.assert_close(folded.anomaly_map, whole.anomaly_map, rtol=0, atol=5e-5)
    torch.testing.assert_close(folded.pred_score, whole.pred_score, rtol=0, atol=5e-5)


@settings(MANY, max_examples=25)
@given(MODELS, st.shared(SIZES, key="size"))
@torch.no_grad()
def test_less_likely_is_more_anomalous(model, size):
    """The score falls wherever a log-likelihood rises (end of section 4.2)."""
    torch.manual_seed(0)
    likelihoods = model.log_likelihoods(torch.randn(1, 3, *size))
    before, _ = model.scoring(likelihoods, size)
    for scale in range(len(likelihoods)):
        lower = [values.clone() for values in likelihoods]
        lower[scale] -= 0.5
        after, _ = model.scoring(lower, size)
        assert (after >= before - 1e-6).all()
