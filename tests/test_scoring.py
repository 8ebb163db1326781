import numpy as np
import pytest
import torch
from scipy.ndimage import gaussian_filter
from torch.nn import functional

from cflow_plugin.errors import CflowError
from cflow_plugin.model.scoring import AnomalyScoring

SIZES = [(16, 12), (8, 6)]


def likelihoods(images, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(images, *size, generator=generator) for size in SIZES]


@pytest.fixture
def scoring():
    scoring = AnomalyScoring(scales=2)
    scoring.calibrate(likelihoods(20, seed=1))
    return scoring


def test_constants_of_probabilities_are_high_quantiles():
    scoring, training = AnomalyScoring(scales=2, position_correction=0, aggregation="probability"), likelihoods(20)
    assert not scoring.is_calibrated
    scoring.calibrate(training)
    assert scoring.is_calibrated
    expected = [np.quantile(values.numpy(), 0.999, method="nearest") for values in training]
    np.testing.assert_allclose(scoring.log_maximum.numpy(), expected, rtol=0, atol=0.05)
    np.testing.assert_array_equal(scoring.temperature.numpy(), 1)


@pytest.mark.parametrize("spread", [0.2, 1.0])
def test_constants_of_surprise_are_those_of_an_exponential_tail(spread):
    """Where rarity falls exponentially with the log-likelihood, a value is 1 - exp(-decades / 5)."""
    generator = np.random.default_rng(0)
    tails = [-generator.exponential(spread, (2000, *size)).astype(np.float32) for size in SIZES]
    training = [torch.from_numpy(tail) for tail in tails]
    scoring = AnomalyScoring(scales=2, sigma=0, position_correction=0)
    scoring.calibrate([torch.zeros(1, *size) for size in SIZES], training)
    decade = spread * np.log(10)
    np.testing.assert_allclose(scoring.temperature.numpy(), 5 * decade, rtol=0.1)
    np.testing.assert_allclose(scoring.log_maximum.numpy(), 0, atol=0.1 * spread)
    decades = 3.0
    rare = [torch.full((1, *size), -decades * decade) for size in SIZES]
    anomaly_map, _ = scoring(rare, (32, 24))
    np.testing.assert_allclose(anomaly_map.numpy(), (1 - np.exp(-decades / 5) - 0.05) / 0.95, rtol=0.1)


@pytest.mark.parametrize("images", [0, 3, 3000])
def test_the_scale_whose_good_cells_differ_less_counts_more(images):
    """As far as images that were not trained on say so; without any, what is usual: 3 to 1."""
    torch.manual_seed(0)
    size = (64, 48) if images == 3 else (16, 12)  # cells enough for the rarest in a thousand
    calm, wild = (
        torch.randn(max(images, 30), *size) * 0.1,
        torch.randn(max(images, 30), size[0] // 2, size[1] // 2) * 0.3,
    )
    scoring = AnomalyScoring(scales=2, position_correction=0)
    scoring.calibrate([calm, wild], [calm[:images], wild[:images]] if images else None)
    seen = [part[: images or None].numpy() for part in (wild, calm)]
    lengths = [np.subtract(*np.quantile(part, [0.1, 0.001], method="closest_observation")) for part in seen]
    found = (lengths[0] / lengths[1]) ** 2
    assert scoring.weights.sum() == pytest.approx(1)
    assert (scoring.weights[0] / scoring.weights[1]).item() == pytest.approx(
        found ** (images / (images + 3)) * 3 ** (3 / (images + 3)), rel=0.02
    )


@pytest.mark.parametrize("constant", [True, False])
def test_images_not_trained_on_set_the_units(constant):
    training, unseen = likelihoods(20), likelihoods(20, seed=1)
    if constant:  # as in images of one colour
        training = [torch.full_like(values, 0.5) for values in training]
        unseen = training
    scoring = AnomalyScoring(scales=2, position_correction=0)
    scoring.calibrate([values + 3 for values in training], unseen)
    alone = AnomalyScoring(scales=2, position_correction=0)
    alone.calibrate(unseen)
    torch.testing.assert_close(scoring.log_maximum, alone.log_maximum)
    anomaly_map, score = scoring(unseen, (64, 48))
    assert torch.isfinite(anomaly_map).all()
    assert torch.isfinite(score).all()
    assert anomaly_map.mean() <= 0.1, "good parts are dark"


def test_one_extreme_training_vector_does_not_set_the_scale(scoring):
    training = likelihoods(20, seed=1)
    training[0][0, 0, 0] = -1e6
    other = AnomalyScoring(scales=2)
    other.calibrate(training)
    torch.testing.assert_close(other.temperature, scoring.temperature, rtol=0.15, atol=0)


@pytest.mark.parametrize("aggregation", ["surprise", "probability"])
@pytest.mark.parametrize("sigma", [0.0, 2.0])
def test_map_against_the_formula(sigma, aggregation):
    scoring = AnomalyScoring(scales=2, sigma=sigma, aggregation=aggregation)
    scoring.calibrate(likelihoods(20, seed=1))
    test, size = likelihoods(3), (64, 48)
    evidence = []
    for scale, values in enumerate(test):
        normalizer = scoring.log_maximum[scale].double() + getattr(scoring, f"correction_{scale}").double()
        probability = ((values.double() - normalizer) / scoring.temperature[scale].double()).exp().clamp(max=1)
        up = functional.interpolate(1 - probability[:, None], size, mode="bilinear", align_corners=True)[:, 0].numpy()
        if sigma:
            blur = {"sigma": (0, sigma, sigma), "mode": "constant", "truncate": 20}
            up = gaussian_filter(up, **blur) / gaussian_filter(np.ones_like(up), **blur)
        evidence.append(up)
    if aggregation == "probability":
        expected = np.mean(evidence, axis=0)
    else:
        weights = [3 / 4, 1 / 4]  # no images that were not trained on
        product = np.prod([np.maximum(up, 0.05) ** w for up, w in zip(evidence, weights, strict=True)], axis=0)
        expected = (product - 0.05) / 0.95
    anomaly_map, _ = scoring(test, size)
    np.testing.assert_allclose(anomaly_map[:, 0].numpy(), expected, atol=2e-5)


def test_map_lies_between_zero_and_one():
    extreme = [torch.full((2, *size), fill) for size, fill in zip(SIZES, (1e4, -1e4), strict=True)]
    for aggregation, least, greatest in (("probability", 0.5, 0.5), ("surprise", 0, 1)):
        scoring = AnomalyScoring(scales=2, aggregation=aggregation)
        scoring.calibrate(likelihoods(20, seed=1))
        anomaly_map, _ = scoring(extreme, (32, 32))
        assert anomaly_map.min() >= least - 1e-6
        assert anomaly_map.max() <= greatest + 1e-6
        anomaly_map, _ = scoring([-values.abs() for values in extreme], (32, 32))
        torch.testing.assert_close(anomaly_map, torch.ones(2, 1, 32, 32))


def test_score_is_the_mean_of_the_highest_values():
    anomaly_map = torch.rand(2, 40, 40)
    values = anomaly_map[:, ::4, ::4].flatten(1).sort(descending=True).values
    for fraction, expected in ((0.1, values[:, :10].mean(1)), (0, anomaly_map.amax((1, 2)))):
        scoring = AnomalyScoring(1, top_fraction=fraction)
        scoring.calibrate([torch.randn(4, 10, 10)])
        folded = scoring.folded([(10, 10)], (40, 40))
        torch.testing.assert_close(folded._image_score(anomaly_map), expected)


def test_a_less_likely_cell_raises_map_and_score(scoring):
    test = likelihoods(1)
    before, score = scoring(test, (64, 48))
    test[0][0, 4:8, 4:8] -= 5
    after, higher = scoring(test, (64, 48))
    assert higher > score
    assert (after - before)[0, 0].argmax() in torch.arange(64 * 48).view(64, 48)[12:36, 12:36]


def test_correction_against_the_formula():
    training = likelihoods(20)
    training[0][:, 0] -= 3  # a border that is always unlikely
    training[0][:, 5, 7] -= 2  # and a place inside that often is
    scoring = AnomalyScoring(scales=2, position_correction=0.25, aggregation="probability")
    scoring.calibrate(training)
    for scale, values in enumerate(training):
        mean = values.double().mean(0).numpy()
        border = np.pad(np.zeros(np.subtract(mean.shape, 2)), 1, constant_values=1).astype(bool)
        offset = np.where(border, min(0, mean[border].mean() - mean[~border].mean()), 0)
        correction = offset + 0.25 * (mean - offset)
        np.testing.assert_allclose(getattr(scoring, f"correction_{scale}").numpy(), correction, atol=1e-5)
        corrected = values.numpy() - correction
        expected = np.quantile(corrected, 0.999, method="nearest")
        assert scoring.log_maximum[scale].item() == pytest.approx(expected, abs=0.05)


def test_the_border_of_good_parts_is_not_anomalous():
    training, test = ([values / 5 for values in likelihoods(20, seed)] for seed in (0, 1))
    for values in (training[0], test[0]):
        values[:, [0, -1]] -= 3
        values[:, :, [0, -1]] -= 3
    excess = []
    for share in (0, 0.25):
        scoring = AnomalyScoring(scales=2, sigma=0, position_correction=share, aggregation="probability")
        scoring.calibrate(training)
        anomaly_map, _ = scoring(test, SIZES[0])
        inside = anomaly_map[..., 1:-1, 1:-1].mean()
        excess.append((anomaly_map.sum() - anomaly_map[..., 1:-1, 1:-1].sum()) / (20 * 52) - inside)
    assert excess[0] > 0.1
    assert abs(excess[1]) < 0.025


def test_positions_not_looked_at_take_their_neighbour_s_correction():
    training = likelihoods(20)
    whole = AnomalyScoring(scales=2, position_correction=1)
    whole.calibrate(training)
    training[0][:, 3, 3] = float("nan")
    part = AnomalyScoring(scales=2, position_correction=1)
    part.calibrate(training)
    assert part.is_calibrated
    near = whole.correction_0[2:5, 2:5].flatten()
    assert (part.correction_0[3, 3] - near[[1, 3, 5, 7]]).abs().min() < 1e-6


def test_constants_survive_saving_and_serve_other_sizes(scoring):
    other = AnomalyScoring(scales=2)
    other.load_state_dict(scoring.state_dict())
    torch.testing.assert_close(other(likelihoods(2), (64, 48)), scoring(likelihoods(2), (64, 48)), rtol=0, atol=0)
    larger = scoring.log_normalizer(0, (31, 23))
    torch.testing.assert_close(larger[::2, ::2], scoring.log_normalizer(0, SIZES[0]))


@pytest.mark.parametrize(
    "setting", [{"sigma": -1}, {"top_fraction": 2}, {"position_correction": float("nan")}, {"aggregation": "sum"}]
)
def test_impossible_settings_are_refused(setting):
    with pytest.raises(CflowError, match=next(iter(setting))):
        AnomalyScoring(1, **setting)


def test_the_map_s_mean_counts_in_units_of_how_good_images_differ():
    """Against the formula in float64; without good images, or without weight, the highest values are the score."""
    generator = torch.Generator().manual_seed(0)
    good = [0.1 * torch.randn(40, side, side, generator=generator) for side in (16, 8)]
    for images, weight in ((40, 0.0), (7, 0.15), (40, 0.15)):
        scoring = AnomalyScoring(2, map_mean=weight)
        scoring.calibrate([part[:images] for part in good])
        plain = scoring.folded([(16, 16), (8, 8)], (64, 64))
        tops, means = plain.statistics(plain([part[:images] for part in good])[0][:, 0])
        scoring.calibrate_mean(tops, means)
        new = [part[:5] - 0.3 for part in good]
        maps, scores = scoring(new, (64, 64))
        strided = maps[:, 0, ::4, ::4].double().flatten(1).numpy()
        top = np.sort(strided, axis=1)[:, -max(1, round(0.0025 * 256)) :].mean(1)
        expected = top
        if weight and images >= 8:
            spreads = [np.log1p(-values.double().numpy()).std(ddof=1) for values in (tops, means)]
            power = weight * spreads[0] / spreads[1]
            assert power < 2
            expected = 1 - (1 - top) * (1 - strided.mean(1)) ** power
        np.testing.assert_allclose(scores.numpy(), expected, atol=1e-5)
    # Where nothing is likely anywhere, rounding has been seen to give 1.0000002, which has no power.
    folded = scoring.folded([(16, 16), (8, 8)], (64, 64))
    assert folded.mean_power > 0
    assert folded._image_score(torch.full((1, 64, 64), 1.0000002)).item() == 1
    with pytest.raises(CflowError, match="map_mean"):
        AnomalyScoring(2, map_mean=-1)
