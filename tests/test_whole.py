"""What an image says as a whole, against SciPy's distance and scikit-learn's probabilistic PCA."""

import numpy as np
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
    module = module.double()  # near 1 a score has few digits left
    score = module([means.double()[:, :, None, None]], torch.zeros(len(means)).double())
    rarity = -torch.log(1 - score / module.weight) / 0.5
    return module.typical + module.decade * rarity


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
    new = images(200, 30, seed=1)
    added = module([new[:, :, None, None]], torch.zeros(200))
    assert 0.25 < (added == 0).double().mean() < 0.75
    assert (module([new[:, :, None, None] + 5], torch.zeros(200)) > 0.49).all()


@pytest.mark.parametrize("values", [torch.full((10, 4), 0.3), torch.zeros(10, 4)])
def test_images_that_are_all_the_same(values):
    module = WholeImage(4)
    module.fit(values)
    assert module([values[:, :, None, None]], torch.full((10,), 0.2)).tolist() == pytest.approx([0.2] * 10)
    assert (module([values[:, :, None, None] + 1], torch.full((10,), 0.2)) > 0.5).all()


def test_what_the_map_says_keeps_its_order_where_the_whole_is_far_away():
    module = WholeImage(6)
    module.fit(images(40))
    scores = module([(images(2) + 1e4)[:, :, None, None]], torch.tensor([0.1, 0.3]))
    assert scores[0] < scores[1]


def test_few_images_or_no_weight_leave_the_score_alone():
    for module, good in ((WholeImage(6), images(7)), (WholeImage(6, 0.0), images(40))):
        module.fit(good)
        assert not module.is_fitted
    with pytest.raises(CflowError, match="between 0 and 1"):
        WholeImage(6, 1.5)


def test_it_is_part_of_the_model_in_both_modes_and_of_its_state():
    torch.manual_seed(0)
    model = CflowModel("test_resnet", [0, 1], coupling_blocks=1)
    model.encoder.eval()
    good = torch.rand(12, 3, 64, 64)
    model.scoring.log_maximum.zero_()
    pyramid = model.encoder(good)
    model.whole.fit(WholeImage.means(pyramid))
    model.drop_folded()
    folded = model(good * 0.3).pred_score
    assert not torch.allclose(folded, model.whole(model.encoder(good * 0.3), torch.zeros(12)))
    model.train()
    model.encoder.eval()
    torch.testing.assert_close(model(good * 0.3).pred_score, folded, rtol=1e-4, atol=1e-4)
    restored = CflowModel("test_resnet", [0, 1], coupling_blocks=1)
    restored.load_state_dict(model.state_dict())
    torch.testing.assert_close(restored.eval()(good * 0.3).pred_score, folded)
