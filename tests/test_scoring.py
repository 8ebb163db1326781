import numpy as np
import pytest
import torch
from scipy.ndimage import gaussian_filter
from torch.nn import functional

from cflow_plugin.scoring import AnomalyScoring

SIZES = [(16, 12), (8, 6)]


def likelihoods(images, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(images, *size, generator=generator) for size in SIZES]


@pytest.fixture
def scoring():
    scoring = AnomalyScoring(scales=2)
    scoring.calibrate(likelihoods(20, seed=1))
    return scoring


def test_constants_are_high_quantiles():
    scoring, training = AnomalyScoring(scales=2), likelihoods(20)
    assert not scoring.is_calibrated
    scoring.calibrate(training)
    assert scoring.is_calibrated
    expected = [np.quantile(values.numpy(), 0.999, method="nearest") for values in training]
    np.testing.assert_allclose(scoring.log_maximum.numpy(), expected, rtol=0, atol=0.05)


def test_one_extreme_training_vector_does_not_set_the_scale(scoring):
    training = likelihoods(20, seed=1)
    training[0][0, 0, 0] = 1e6
    other = AnomalyScoring(scales=2)
    other.calibrate(training)
    torch.testing.assert_close(other.log_maximum, scoring.log_maximum, rtol=0, atol=0.1)


@pytest.mark.parametrize("sigma", [0.0, 2.0])
def test_map_against_the_formula(sigma):
    scoring = AnomalyScoring(scales=2, sigma=sigma)
    scoring.calibrate(likelihoods(20, seed=1))
    test, size = likelihoods(3), (64, 48)
    expected = np.zeros((3, *size))
    for values, log_maximum in zip(test, scoring.log_maximum, strict=True):
        probability = np.minimum(1, np.exp(values.double() - log_maximum.double()))
        up = functional.interpolate(probability[:, None], size, mode="bilinear", align_corners=True)[:, 0].numpy()
        if sigma:
            blur = {"sigma": (0, sigma, sigma), "mode": "constant", "truncate": 20}
            up = gaussian_filter(up, **blur) / gaussian_filter(np.ones_like(up), **blur)
        expected += 1 - up
    anomaly_map, _ = scoring(test, size)
    np.testing.assert_allclose(anomaly_map[:, 0].numpy(), expected, atol=1e-5)


def test_map_lies_between_zero_and_the_number_of_scales(scoring):
    extreme = [torch.full((2, *size), fill) for size, fill in zip(SIZES, (1e4, -1e4), strict=True)]
    anomaly_map, _ = scoring(extreme, (32, 32))
    torch.testing.assert_close(anomaly_map, torch.ones(2, 1, 32, 32))


def test_score_is_the_mean_of_the_highest_values():
    anomaly_map = torch.rand(2, 40, 40)
    values = anomaly_map[:, ::4, ::4].flatten(1).sort(descending=True).values
    torch.testing.assert_close(AnomalyScoring(1, top_fraction=0.1)._image_score(anomaly_map), values[:, :10].mean(1))
    torch.testing.assert_close(AnomalyScoring(1, top_fraction=0)._image_score(anomaly_map), anomaly_map.amax((1, 2)))


def test_a_less_likely_cell_raises_map_and_score(scoring):
    test = likelihoods(1)
    before, score = scoring(test, (64, 48))
    test[0][0, 4:8, 4:8] -= 5
    after, higher = scoring(test, (64, 48))
    assert higher > score
    assert (after - before)[0, 0].argmax() in torch.arange(64 * 48).view(64, 48)[12:36, 12:36]


def test_impossible_settings_are_refused():
    with pytest.raises(ValueError, match="sigma"):
        AnomalyScoring(1, sigma=-1)
    with pytest.raises(ValueError, match="top_fraction"):
        AnomalyScoring(1, top_fraction=2)
