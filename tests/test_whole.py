"""What an image says as a whole, against SciPy's distance and scikit-learn's probabilistic PCA."""

import math

import numpy as np
import openvino as ov
import pytest
import torch
from scipy.spatial.distance import mahalanobis
from sklearn.decomposition import PCA

from cflow_plugin.errors import CflowError
from cflow_plugin.model import whole
from cflow_plugin.model.torch_model import CflowModel
from cflow_plugin.model.whole import WholeImage

SHRINKAGE = 0.05


def images(number: int, dimensions: int = 6, seed: int = 0) -> torch.Tensor:
    """Means of features that are correlated and of very different lengths."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(dimensions, dimensions, generator=torch.Generator().manual_seed(9))
    return torch.randn(number, dimensions, generator=generator) @ (mixing * torch.logspace(0, -2, dimensions)) + 3


def distance_of(module: WholeImage, means: torch.Tensor) -> torch.Tensor:
    """The distance that a score says: of a score of 0, all that is added is of the whole."""
    module = module.double()  # near its end what is added has few digits left
    module.score_decade.fill_(1)
    score = module([means.double()[:, :, None, None]], torch.zeros(len(means)).double())
    decades = -torch.log1p(-score) / module.weight
    return module.typical - 2 * module.decade * torch.log1p(-decades / 2)


def test_the_distance_is_that_of_all_images_covariance():
    good = images(40)
    module = WholeImage(6)
    module.fit(good)
    covariance = np.cov(good.double().numpy().T)
    covariance += SHRINKAGE * np.trace(covariance) / 6 * np.eye(6)
    inverse, centre = np.linalg.inv(covariance), good.double().mean(0).numpy()
    new = images(20, seed=1) + 2 * torch.eye(6).repeat(4, 1)[:20]
    expected = torch.tensor([mahalanobis(image, centre, inverse) ** 2 / 6 for image in new.double().numpy()])
    further = expected > module.typical
    assert further.sum() > 10
    torch.testing.assert_close(distance_of(module, new)[further].double(), expected[further], rtol=1e-3, atol=1e-3)


def test_few_directions_are_those_of_probabilistic_pca(monkeypatch):
    monkeypatch.setattr(whole, "_DIRECTIONS", 2)
    monkeypatch.setattr(whole, "_SHRINKAGE", 0.0)
    good, new = images(40), 2 * images(20, seed=1) - 3
    module = WholeImage(6)
    module.fit(good)
    pca = PCA(2, svd_solver="full").fit(good.double().numpy())
    # The log-likelihood is half the distance, but for a constant.
    expected = -2 / 6 * torch.tensor(pca.score_samples(new.double().numpy()))
    found = distance_of(module, new).double()
    further = found > module.typical + 1e-3
    assert further.sum() > 5
    expected, found = expected[further], found[further]
    torch.testing.assert_close(found - found[0], expected - expected[0], rtol=1e-3, atol=1e-3)


def test_good_images_that_were_not_seen_say_what_is_usual():
    """With fewer images than dimensions every image that the Gaussian is of looks near to it, and no other one does."""
    module = WholeImage(30)
    module.fit(images(20, 30))
    module.score_decade.fill_(1)
    new = images(200, 30, seed=1)
    added = module([new[:, :, None, None]], torch.zeros(200))
    assert 0.25 < (added == 0).double().mean() < 0.75
    assert (module([new[:, :, None, None] + 5], torch.zeros(200)) > 0.9).all()


@pytest.mark.parametrize("values", [torch.full((10, 4), 0.3), torch.zeros(10, 4)])
def test_images_that_are_all_the_same(values):
    module = WholeImage(4)
    module.fit(values)
    module.score_decade.fill_(1)
    assert module([values[:, :, None, None]], torch.full((10,), 0.2)).tolist() == pytest.approx([0.2] * 10)
    assert (module([values[:, :, None, None] + 1], torch.full((10,), 0.2)) > 0.5).all()


def test_what_the_map_says_keeps_its_order_where_the_whole_is_far_away():
    module = WholeImage(6)
    module.fit(images(40))
    module.score_decade.fill_(0.1)
    scores = module([(images(2) + 1e4)[:, :, None, None]], torch.tensor([0.1, 0.3]))
    assert scores[0] < scores[1]


def test_few_images_or_no_weight_leave_the_score_alone():
    for module, good in ((WholeImage(6), images(7)), (WholeImage(6, 0.0), images(40))):
        module.fit(good)
        assert not module.is_fitted
    with pytest.raises(CflowError, match="not be negative"):
        WholeImage(6, -1.0)


def test_a_decade_counts_the_same_whoever_says_it():
    """Images as rare as one in a hundred by the whole alone score what one in a hundred does by its map."""
    generator = torch.Generator().manual_seed(3)
    evidence = 0.3 + 0.02 * torch.randn(100_000, generator=generator).double()  # of good images' maps
    module = WholeImage(60, 1.0).double()
    module.fit(images(1000, 60))
    module.calibrate(1 - torch.exp(-evidence))
    rare = evidence.quantile(0.99) - evidence.median()
    assert 2 * module.score_decade.item() == pytest.approx(rare.item(), rel=0.03)
    new = images(20_000, 60, seed=5).double()
    added = -torch.log1p(-module([new[:, :, None, None]], torch.zeros(len(new)).double()))
    assert added.max() < 2 * module.score_decade
    # Of good images about one in a hundred lies beyond two decades of rarity; their distances have a longer tail.
    assert 0.002 < (added > 2 * (1 - math.exp(-1)) * module.score_decade).double().mean() < 0.04


def test_where_the_map_tells_images_apart_by_far_the_whole_changes_little():
    module = WholeImage(6)
    module.fit(images(40))
    module.calibrate(torch.linspace(0.2, 0.22, 40))
    far = module([images(1)[:, :, None, None] + 1e4], torch.tensor([0.2]))
    assert 0.2 < far < 0.28
    module.calibrate(torch.full((7,), 0.9))  # too few to say how they differ
    assert torch.equal(far, module([images(1)[:, :, None, None] + 1e4], torch.tensor([0.2])))


@pytest.mark.skipif(
    "BF16" not in ov.Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES"), reason="the processor has no bf16"
)
def test_in_bf16_the_distance_keeps_its_digits():
    module = WholeImage(60)
    module.fit(images(100, 60))
    module.score_decade.fill_(0.2)
    new = images(30, 60, seed=1)[:, :, None, None]
    expected = module.double()([new.double()], torch.zeros(30).double()).numpy()
    assert expected.std() > 0.01

    class Alone(torch.nn.Module):
        def forward(self, features):
            return module([features], torch.zeros(30))

    module.float()
    converted = ov.convert_model(torch.export.export(Alone(), (new,)))
    found = ov.Core().compile_model(converted, "CPU", {"INFERENCE_PRECISION_HINT": "bf16"})(new.numpy())[0]
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-3)


def test_it_is_part_of_the_model_in_both_modes_and_of_its_state():
    torch.manual_seed(0)
    model = CflowModel("test_resnet", [0, 1], coupling_blocks=1)
    model.encoder.eval()
    good = torch.rand(12, 3, 64, 64)
    model.scoring.log_maximum.zero_()
    pyramid = model.encoder(good)
    model.whole.fit(WholeImage.means(pyramid))
    model.whole.score_decade.fill_(0.1)
    model.drop_folded()
    folded = model(good * 0.3).pred_score
    assert not torch.allclose(folded, model.whole(model.encoder(good * 0.3), torch.zeros(12)))
    model.train()
    model.encoder.eval()
    torch.testing.assert_close(model(good * 0.3).pred_score, folded, rtol=1e-4, atol=1e-4)
    restored = CflowModel("test_resnet", [0, 1], coupling_blocks=1)
    restored.load_state_dict(model.state_dict())
    torch.testing.assert_close(restored.eval()(good * 0.3).pred_score, folded)
