import csv
import json
import logging
from fractions import Fraction

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from anomalib.data import ImageBatch, InferenceBatch
from anomalib.data.utils import ValSplitMode
from anomalib.deploy import OpenVINOInferencer, TorchInferencer
from anomalib.post_processing import PostProcessor
from lightning import seed_everything
from lightning.pytorch.callbacks import Callback
from PIL import Image
from scipy.stats import beta, betabinom, kstest
from sklearn.metrics import f1_score

from cflow_plugin import CflowError, CflowPlugin
from cflow_plugin.commands.monitor import monitor
from cflow_plugin.commands.watch.watch import watch
from cflow_plugin.decisions.conformal import images_needed, odd_one, p_values, threshold_rank
from cflow_plugin.decisions.post_processing import ConformalPostProcessor
from cflow_plugin.decisions.reference_images import choose_reference
from cflow_plugin.decisions.reference_scores import read_reference_scores
from cflow_plugin.training.vector_loader import fill_bank

from .conftest import QUICK, make_engine, make_textures, run_command
from .test_training import StopAfter

RATE = 0.2
DATA = {"train_good": 16}
F32 = {"INFERENCE_PRECISION_HINT": "f32"}


def quick_model(seed=0, **settings):
    seed_everything(seed)
    return CflowPlugin(**{**QUICK, "epochs": 2, "steps_per_epoch": 3, "target_false_alarm_rate": RATE, **settings})


def buffers_of(model):
    return {name: value.clone() for name, value in model.post_processor.state_dict().items()}


def assert_same(first, second):
    assert first.keys() == second.keys()
    for name in first:
        torch.testing.assert_close(first[name], second[name], rtol=0, atol=0, equal_nan=True, msg=name)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    datamodule = make_textures(tmp_path_factory.mktemp("data"), **DATA)
    datamodule.prepare_data()
    datamodule.setup()
    return datamodule


@pytest.fixture(scope="module")
def calibrated(data, tmp_path_factory):
    """A model that keeps a false-alarm rate, and the checkpoint that training wrote."""
    folder = tmp_path_factory.mktemp("calibrated")
    model = quick_model()
    make_engine(folder).fit(model, datamodule=data)
    return model.eval(), next(folder.rglob("model.ckpt"))


@pytest.fixture(scope="module")
def calibrated_export(calibrated, tmp_path_factory):
    """Its OpenVINO file."""
    return calibrated[0].to_openvino(tmp_path_factory.mktemp("calibrated export"), input_size=(64, 64))


def post_processor_for(scores, maxima, rate):
    post_processor = ConformalPostProcessor(rate)
    post_processor.calibrate(torch.as_tensor(scores), torch.as_tensor(maxima))
    return post_processor


def decide(post_processor, scores, maps):
    batch = InferenceBatch(pred_score=torch.as_tensor(scores).float(), anomaly_map=torch.as_tensor(maps).float())
    return post_processor(batch)


# The rank and what it guarantees


@pytest.mark.parametrize("rate", [0.01, 0.05, 0.07, 0.1, 0.29, 0.3, 0.5])
def test_the_rank_is_the_least_that_keeps_the_rate(rate):
    """A new score is equally likely to take each of the n + 1 ranks; it is above the k-th in n + 1 - k of them."""
    exact = Fraction(str(rate))
    for images in range(1, 250):
        allowed = [rank for rank in range(1, images + 1) if Fraction(images + 1 - rank, images + 1) <= exact]
        if allowed:
            assert images >= images_needed(rate)
            assert threshold_rank(images, rate) == min(allowed)
        else:
            assert images < images_needed(rate)
            with pytest.raises(
                CflowError, match=f"needs at least {images_needed(rate)} good images.*there are {images}"
            ):
                threshold_rank(images, rate)


@pytest.mark.parametrize("rate", [0.0, 1.0, -0.1, 5.0, float("nan")])
def test_what_is_no_rate_is_refused(rate):
    with pytest.raises(CflowError, match="between 0 and 1"):
        ConformalPostProcessor(rate)


@pytest.mark.parametrize(
    ("images", "rate"),
    [(19, 0.05), *(pytest.param(*one, marks=pytest.mark.long) for one in [(40, 0.05), (99, 0.01), (30, 0.1)])],
)
def test_the_realised_rate_is_the_asked_one(images, rate):
    """Over many draws of held-out and new images the rate is the asked one, and scatters as the theory says."""
    generator = np.random.default_rng(images)
    draws, new = 600, 50
    held_out = torch.from_numpy(generator.beta(3, 5, (draws, images)))
    scores = torch.from_numpy(generator.beta(3, 5, (draws, new)))
    alarms = []
    for draw in range(draws):
        result = decide(post_processor_for(held_out[draw], held_out[draw], rate), scores[draw], scores[draw][:, None])
        assert torch.equal(result.pred_label, result.pred_mask[:, 0])
        alarms.append(int(result.pred_label.sum()))
    extreme = images + 1 - threshold_rank(images, rate)
    # Alarms among new images that share their held-out images follow a beta-binomial distribution.
    theory = betabinom(new, extreme, images + 1 - extreme)
    low, high = theory.mean() + np.array([-4, 4]) * theory.std() / draws**0.5
    assert low < np.mean(alarms) < high
    assert theory.mean() / new <= rate
    assert (
        abs(np.mean(np.array(alarms) == 0) - theory.pmf(0)) < 4 * (theory.pmf(0) * (1 - theory.pmf(0)) / draws) ** 0.5
    )


def test_one_draw_s_rate_follows_a_beta_distribution():
    generator = np.random.default_rng(1)
    images, rate = 60, 0.1
    held_out = np.sort(generator.random((3000, images)), axis=1)
    true_rates = 1 - held_out[:, threshold_rank(images, rate) - 1]  # scores are uniform
    assert kstest(true_rates, beta(6, images + 1 - 6).cdf).pvalue > 1e-3


@pytest.mark.long
def test_pixels_are_tested_together():
    """Normal maps of dependent pixels: the share that shows any anomalous pixel at all is the asked one."""
    generator = torch.Generator().manual_seed(0)

    def maps(count):
        coarse = torch.rand(count, 1, 6, 6, generator=generator)
        return torch.nn.functional.interpolate(coarse, (24, 24), mode="bilinear") ** 2

    shown, draws = 0, 300
    for _ in range(draws):
        held_out, new = maps(39), maps(40)
        post_processor = post_processor_for(held_out.flatten(1).mean(1), held_out.flatten(1).amax(1), 0.05)
        result = decide(post_processor, new.flatten(1).mean(1), new)
        low = post_processor.pixel_p_values(result.anomaly_map) <= 0.05
        assert torch.equal(low & result.pred_label.reshape(-1, 1, 1, 1), result.pred_mask)
        shown += int(low.flatten(1).any(1).sum())
    theory = betabinom(40, 2, 38)
    assert abs(shown / draws - theory.mean()) < 4 * theory.std() / draws**0.5


def test_p_values_equal_brute_force_and_are_super_uniform():
    generator = np.random.default_rng(2)
    held_out = np.sort(np.round(generator.random(37), 1))  # with ties
    scores = np.round(generator.random((4, 5)), 1)
    found = p_values(scores, held_out)
    for index in np.ndindex(scores.shape):
        assert found[index] == pytest.approx((1 + sum(held_out >= scores[index])) / 38)
    # With every one of n + 1 exchangeable scores as the new one in turn, P(p <= a) <= a exactly.
    together = np.round(generator.random(25), 1)
    values = [p_values(together[i], np.sort(np.delete(together, i))) for i in range(25)]
    for level in np.linspace(0.04, 1, 97):
        assert np.mean(np.array(values) <= level) <= level + 1e-12


def test_a_decision_is_a_p_value_of_at_most_the_rate():
    generator = np.random.default_rng(3)
    for rate in (0.05, 0.1, 0.25):
        held_out = np.round(generator.random(50), 2)
        post_processor = post_processor_for(held_out, held_out, rate)
        scores = np.concatenate([held_out, np.round(generator.random(200), 2)])
        result = decide(post_processor, scores, scores[:, None, None, None])
        expected = np.array([(1 + (held_out.astype(np.float32) >= s).sum()) / 51 <= rate for s in scores.astype("f4")])
        assert np.array_equal(result.pred_label.numpy(), expected)
        assert torch.equal(post_processor.image_p_values(result.pred_score) <= rate, result.pred_label)
        assert torch.equal(post_processor.pixel_p_values(result.anomaly_map) <= rate, result.pred_mask)


@pytest.mark.parametrize("level", [0.02, 0.4, 0.97])
def test_normalisation_cuts_nothing_off(level):
    """anomalib's normalisation clamps; the order of scores beyond the held-out ones must survive it."""
    post_processor = post_processor_for(torch.full((9,), level), torch.full((9,), level), 0.1)
    scores = torch.linspace(0, 1, 101)
    result = decide(post_processor, scores, scores[:, None, None, None])
    assert (result.pred_score.diff() > 0).all()
    assert result.pred_score.min() >= 0
    assert result.pred_score.max() <= 1
    assert torch.equal(result.pred_label, scores > torch.tensor(level))


# Held-out images


@pytest.mark.parametrize(
    ("images", "rate", "share", "expected"), [(200, 0.05, 0.2, 40), (200, 0.01, 0.2, 99), (38, 0.05, 0.2, 19)]
)
def test_how_many_are_held_out(images, rate, share, expected):
    chosen = choose_reference(images, rate, share, seed=3)
    assert len(set(chosen)) == len(chosen) == expected
    assert set(chosen) <= set(range(images))
    assert chosen == choose_reference(images, rate, share, seed=3)
    assert chosen != choose_reference(images, rate, share, seed=4)


def test_every_image_is_as_likely_to_be_held_out():
    counts = np.bincount(np.concatenate([choose_reference(20, 0.2, 0.25, seed) for seed in range(800)]), minlength=20)
    assert counts.sum() == 800 * 5
    assert (abs(counts - 200) < 5 * (800 * 0.25 * 0.75) ** 0.5).all()


def test_too_few_images_are_refused_with_the_number_needed(tmp_path, data):
    with pytest.raises(CflowError, match=r"0\.05 needs 19 good images.*38 in all; there are 16.*0\.111 or more"):
        make_engine(tmp_path).fit(quick_model(target_false_alarm_rate=0.05), datamodule=data)
    assert not list(tmp_path.rglob("*.ckpt"))
    folder = data.root / data.category / "test" / "good"  # four images
    model = quick_model(target_false_alarm_rate=0.05, held_out_images=str(folder))
    with pytest.raises(CflowError, match=r"needs at least 19 good images.*there are 4"):
        make_engine(tmp_path).fit(model, datamodule=data)
    with pytest.raises(CflowError, match="no image in"):
        make_engine(tmp_path).fit(quick_model(held_out_images=str(tmp_path / "absent")), datamodule=data)
    linked = tmp_path / "linked"
    linked.symlink_to(data.root / data.category / "train/good", target_is_directory=True)
    with pytest.raises(CflowError, match=r"16 images of .*linked are trained on, too"):
        make_engine(tmp_path).fit(quick_model(held_out_images=str(linked)), datamodule=data)


@pytest.mark.parametrize(("images", "rate"), [(19, 0.05), (40, 0.05), (200, 0.01)])
def test_an_image_is_hardly_ever_called_odd_without_reason(images, rate):
    generator = np.random.default_rng(0)
    draws = (1 - np.exp(-generator.exponential(0.3, images)) for _ in range(1000))
    assert sum(odd_one(scores, rate) is not None for scores in draws) < 80
    scores = 1 - np.exp(-generator.exponential(0.3, images))
    scores[7] = 0.999
    assert odd_one(scores, 1 / (images + 1)) == 7
    assert odd_one(scores, 0.3) is None
    assert odd_one(np.full(images, 0.4), rate) is None


def test_training_names_a_held_out_image_that_is_unlike_the_others(tmp_path, data, caplog):
    good = sorted((data.root / data.category / "train/good").glob("*.png"))
    (tmp_path / "held out").mkdir()
    for path in good[:10]:
        (tmp_path / "held out" / path.name).write_bytes(path.read_bytes())
    odd = tmp_path / "held out/odd.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)).save(odd)
    model = quick_model(target_false_alarm_rate=0.09, held_out_images=str(odd.parent))
    with caplog.at_level(logging.WARNING):
        make_engine(tmp_path / "run").fit(model, datamodule=data)
    assert [str(odd) in record.getMessage() for record in caplog.records if "rests on" in record.getMessage()] == [True]


def test_held_out_images_are_scored_as_new_ones_and_not_trained_on(calibrated, data):
    model, _ = calibrated
    held_out = model.reference.chosen["indices"]
    assert len(held_out) == 4
    images = torch.stack([data.train_data[index].image for index in held_out])
    with torch.no_grad():
        result = model.model(model.pre_processor(images))
    torch.testing.assert_close(model.post_processor.reference_scores, result.pred_score.sort().values)
    torch.testing.assert_close(model.post_processor.reference_maxima, result.anomaly_map.amax((1, 2, 3)).sort().values)


@pytest.mark.long
def test_another_held_out_image_changes_no_weight(tmp_path, data):
    """The weights and scoring constants may not depend on what a held-out image shows."""
    models = []
    for index in range(2):
        model = quick_model()
        copy = make_textures(tmp_path / f"data{index}", **DATA)
        copy.prepare_data()
        if index:
            for image in models[0].reference.chosen["indices"]:
                path = copy.root / copy.category / "train" / "good" / f"{image:03}.png"
                Image.fromarray(255 - np.asarray(Image.open(path))).save(path)
        make_engine(tmp_path / f"run{index}").fit(model, datamodule=copy)
        models.append(model)
    assert_same(*({name: v.clone() for name, v in model.model.state_dict().items()} for model in models))
    assert not torch.equal(*(model.post_processor.reference_scores for model in models))


@pytest.mark.long
def test_thresholds_depend_on_no_test_or_validation_image(tmp_path, calibrated):
    for index, settings in enumerate(
        ({"test_good": 2, "val_defect": 2}, {"val_split_mode": ValSplitMode.SAME_AS_TEST})
    ):
        model = quick_model()
        data = make_textures(tmp_path / f"data{index}", **DATA, **settings)
        make_engine(tmp_path / str(index)).train(model, datamodule=data)
        assert_same(buffers_of(calibrated[0]), buffers_of(model))


def test_given_images_leave_all_others_to_training(tmp_path, data):
    folder = data.root / data.category / "test" / "good"
    model, plain = quick_model(held_out_images=str(folder)), quick_model(target_false_alarm_rate=None)
    make_engine(tmp_path / "given").fit(model, datamodule=data)
    make_engine(tmp_path / "plain").fit(plain, datamodule=data)
    assert_same(*({name: v.clone() for name, v in m.model.state_dict().items()} for m in (model, plain)))
    images = torch.stack([item.image for item in data.test_data if "good" in item.image_path])
    with torch.no_grad():
        expected = model.eval().model(model.pre_processor(images)).pred_score
    torch.testing.assert_close(model.post_processor.reference_scores, expected.sort().values)


# F1-adaptive thresholds stay


def test_without_a_rate_thresholds_lie_just_below_anomalib_s(tmp_path, data):
    models = [quick_model(target_false_alarm_rate=None), quick_model(target_false_alarm_rate=None)]
    models[1].post_processor = PostProcessor()
    seen = {}

    class Watch(Callback):
        def on_validation_start(self, trainer, module):
            seen.update(image=[], pixel=[])  # the last one counts

        def on_validation_batch_end(self, trainer, module, outputs, *_):
            seen["image"].append(outputs.pred_score)
            seen["pixel"].append(outputs.anomaly_map.flatten())

    for index, model in enumerate(models):
        make_engine(tmp_path / str(index), callbacks=[Watch()] * index).fit(model, datamodule=data)
    found, expected = map(buffers_of, models)
    for kind, parts in seen.items():
        threshold, values = expected[f"_{kind}_threshold"], torch.cat(parts)
        below = values[values < threshold].max()
        assert below < found[f"_{kind}_threshold"] < threshold
        torch.testing.assert_close(found[f"_{kind}_threshold"], (below + threshold) / 2)


@pytest.mark.parametrize("anomalous", [[1.0], [0.4999, 1.0], [0.01, 0.2], [0.3, 0.30000003]])
def test_what_maximises_f1_is_what_is_decided(anomalous):
    """Also where an anomalous score is the highest that there can be."""
    scores = torch.tensor([0.02, 0.15, 0.18, *anomalous])
    labels = torch.tensor([0, 0, 0, *[1] * len(anomalous)]).bool()
    post_processor = ConformalPostProcessor()
    maps = scores.view(-1, 1, 1)
    batch = {"image": torch.zeros(len(scores), 3, 1, 1), "gt_label": labels, "gt_mask": labels.view(-1, 1, 1)}
    post_processor.on_validation_batch_end(None, None, ImageBatch(pred_score=scores, anomaly_map=maps, **batch))
    post_processor.on_validation_epoch_end(None, None)
    found = post_processor(InferenceBatch(pred_score=scores, anomaly_map=maps[:, None]))
    best = max(f1_score(labels, scores >= score) for score in scores)
    assert f1_score(labels, found.pred_label) == f1_score(labels, found.pred_mask.flatten()) == best
    without_masks = ConformalPostProcessor()
    del batch["gt_mask"]
    without_masks.on_validation_batch_end(None, None, ImageBatch(pred_score=scores, anomaly_map=maps, **batch))
    without_masks.on_validation_epoch_end(None, None)
    assert without_masks.pixel_threshold == without_masks.image_threshold == post_processor.image_threshold


@pytest.mark.parametrize("threshold", [0.05, 0.5, 0.9])
def test_normalisation_keeps_every_order_and_decision(threshold):
    """Also where anomalib's own would make one value of all that lie far from the threshold."""
    scores = torch.linspace(0, 1, 101)
    post_processor = ConformalPostProcessor()
    # The lowest of the anomalous scores is the threshold that maximises F1.
    few = torch.tensor([threshold / 2, threshold - 0.01, threshold, threshold + 0.05])
    validated = ImageBatch(
        image=torch.zeros(4, 3, 1, 1),
        pred_score=few,
        anomaly_map=few.view(4, 1, 1),
        gt_label=few >= threshold,
        gt_mask=(few >= threshold).view(4, 1, 1),
    )
    post_processor.on_validation_batch_end(None, None, validated)
    post_processor.on_validation_epoch_end(None, None)
    assert few[1] < post_processor.image_threshold < threshold
    found = post_processor(InferenceBatch(pred_score=scores, anomaly_map=scores.view(1, 1, 1, -1)))
    for values, decided in (
        (found.pred_score, found.pred_label),
        (found.anomaly_map[0, 0, 0], found.pred_mask[0, 0, 0]),
    ):
        assert (values.diff() > 0).all()
        assert values.min() >= 0
        assert values.max() <= 1
        assert torch.equal(decided.bool(), scores > post_processor.image_threshold)


# What happens without a word of the rate


GOOD_ONLY = {"val_split_mode": ValSplitMode.FROM_TRAIN}


@pytest.mark.parametrize(
    ("settings", "held_out", "trained_on"),
    [
        ({"train_good": 40, "val_split_mode": ValSplitMode.SAME_AS_TEST}, 19, 21),
        pytest.param({"train_good": 40, "val_split_mode": ValSplitMode.NONE}, 19, 21, marks=pytest.mark.long),
        pytest.param({"train_good": 40, "val_split_mode": ValSplitMode.FROM_DIR}, 0, 40, marks=pytest.mark.long),
        # Validation images, all good: enough of them, and too few.
        pytest.param({"train_good": 40, **GOOD_ONLY, "val_split_ratio": 0.5}, 20, 20, marks=pytest.mark.long),
        pytest.param({"train_good": 45, **GOOD_ONLY, "val_split_ratio": 0.1}, 19, 22, marks=pytest.mark.long),
    ],
    ids=["validation is the test", "no validation", "defects to validate on", "good ones", "few good ones"],
)
def test_no_threshold_is_fitted_to_test_images_by_itself(tmp_path, monkeypatch, settings, held_out, trained_on):
    model = quick_model(target_false_alarm_rate="auto")
    same = make_textures(tmp_path / "data", **settings)
    seen = []

    def count(images, *args):
        seen.append(len(images.dataset))
        return fill_bank(images, *args)

    with monkeypatch.context() as patch:
        patch.setattr("cflow_plugin.training.vector_loader.fill_bank", count)
        make_engine(tmp_path / "run").fit(model, datamodule=same)
    assert (len(model.post_processor.reference_scores), seen) == (held_out, [trained_on])
    assert model.post_processor.target_false_alarm_rate == (0.05 if held_out else None)
    loaded = CflowPlugin.load_from_checkpoint(next((tmp_path / "run").rglob("model.ckpt")))
    assert loaded.post_processor.target_false_alarm_rate == (0.05 if held_out else None)
    # A run that was cut off finds the images it held out, and ends as this one did.
    begun, continued = (quick_model(target_false_alarm_rate="auto") for _ in range(2))
    make_engine(tmp_path / "begun", callbacks=[StopAfter(1)]).fit(begun, datamodule=same)
    checkpoint = next((tmp_path / "begun").rglob("last.ckpt"))
    make_engine(tmp_path / "continued").fit(continued, datamodule=same, ckpt_path=checkpoint)
    assert_same(buffers_of(model), buffers_of(continued))


def test_good_validation_images_are_scored_as_new_ones(tmp_path):
    data = make_textures(tmp_path / "data", train_good=16, val_split_mode=ValSplitMode.FROM_TRAIN, val_split_ratio=0.4)
    model = quick_model()
    make_engine(tmp_path / "run").fit(model, datamodule=data)
    images = torch.stack([item.image for item in data.val_data])
    with torch.no_grad():
        expected = model.eval().model(model.pre_processor(images)).pred_score
    torch.testing.assert_close(model.post_processor.reference_scores, expected.sort().values)


def test_given_images_are_reason_enough_for_a_rate(tmp_path, data):
    folder = tmp_path / "good"
    folder.mkdir()
    for number in range(20):
        Image.fromarray(np.random.default_rng(number).integers(0, 255, (64, 64, 3), np.uint8)).save(
            folder / f"{number}.png"
        )
    model = quick_model(epochs=1, target_false_alarm_rate="auto", held_out_images=str(folder))
    make_engine(tmp_path / "run").fit(model, datamodule=data)
    assert len(model.post_processor.reference_scores) == 20


@pytest.mark.parametrize(
    ("mode", "settings", "warned"),
    [
        (ValSplitMode.SAME_AS_TEST, {"target_false_alarm_rate": None}, "are the test images"),
        (ValSplitMode.SAME_AS_TEST, {"target_false_alarm_rate": "auto"}, "are the test images"),  # too few to hold out
        (ValSplitMode.SAME_AS_TEST, {}, None),
        *(
            pytest.param(*one, marks=pytest.mark.long)
            for one in [
                (
                    ValSplitMode.SAME_AS_TEST,
                    {"target_false_alarm_rate": "auto", "post_processor": PostProcessor()},
                    "are the",
                ),
                (ValSplitMode.FROM_TRAIN, {"target_false_alarm_rate": "auto"}, "shows a defect"),
                (ValSplitMode.FROM_DIR, {"target_false_alarm_rate": "auto"}, None),
            ]
        ),
    ],
)
def test_thresholds_that_cannot_be_trusted_are_warned_of(tmp_path, data, caplog, mode, settings, warned):
    same = make_textures(data.root, **DATA, val_split_mode=mode)
    with caplog.at_level(logging.WARNING):
        make_engine(tmp_path).fit(quick_model(epochs=1, **settings), datamodule=same)
    found = [record.getMessage() for record in caplog.records if "cannot be trusted" in record.getMessage()]
    assert all(warned and warned in message for message in found)
    assert len(found) == (warned is not None)


# Thresholds travel


def test_through_a_checkpoint(calibrated, data, tmp_path):
    model, checkpoint = calibrated
    assert_same(buffers_of(model), buffers_of(CflowPlugin.load_from_checkpoint(checkpoint, weights_only=False)))
    # As the command line does it, without a word of the rate.
    predictions = make_engine(tmp_path).predict(
        CflowPlugin(**QUICK), dataloaders=data.test_dataloader(), ckpt_path=checkpoint
    )
    for batch in predictions:
        with torch.no_grad():
            expected = model(torch.stack([data.test_data[i].image for i in range(len(data.test_data))
                                          if data.test_data[i].image_path in batch.image_path]))  # fmt: skip
        assert torch.equal(batch.pred_label, expected.pred_label)
        assert torch.equal(batch.pred_mask, expected.pred_mask.squeeze(1))
        torch.testing.assert_close(batch.pred_score, expected.pred_score)


def test_another_rate_of_the_same_checkpoint(calibrated):
    model, checkpoint = calibrated
    # Four held-out images allow 1/5, 2/5, ...
    other = CflowPlugin.load_from_checkpoint(checkpoint, target_false_alarm_rate=0.4, weights_only=False)
    scores = model.post_processor.reference_scores
    assert other.post_processor.image_threshold == scores[2]
    assert model.post_processor.image_threshold == scores[3]
    with pytest.raises(CflowError, match="needs at least 9 good images"):
        CflowPlugin.load_from_checkpoint(checkpoint, target_false_alarm_rate=0.1, weights_only=False)


@pytest.mark.long
def test_exports_decide_alike(calibrated, calibrated_export, data, tmp_path, monkeypatch):
    model, checkpoint = calibrated
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TRUST_REMOTE_CODE", "1")
    files = {
        "openvino": calibrated_export,
        "onnx": model.to_onnx(tmp_path, input_size=(64, 64)),
        "torch": model.to_torch(tmp_path),
    }
    inferencers = [
        OpenVINOInferencer(files["openvino"], "CPU", F32),
        OpenVINOInferencer(files["onnx"], "CPU", F32),
        TorchInferencer(files["torch"], "cpu"),
    ]
    decisions = set()
    for item in [*data.test_data, *data.train_data]:
        with torch.no_grad():
            expected = model(item.image[None])
        decisions.add(expected.pred_label.item())
        # A held-out image lies at the threshold itself, where either decision is right.
        near = abs(expected.pred_score.item() - 0.5) < 1e-5
        for inferencer in inferencers:
            found = inferencer.predict(item.image_path)
            assert np.allclose(np.asarray(found.pred_score), expected.pred_score.numpy(), atol=1e-4)
            assert near or np.asarray(found.pred_label).item() == expected.pred_label.item()
    assert decisions == {True, False}
    reference = model.post_processor.normalized_reference_scores.numpy()
    assert len(reference) == 4
    for path in (files["openvino"], files["onnx"], checkpoint):
        assert np.allclose(read_reference_scores(path), reference, atol=1e-6)
    onnx.checker.check_model(str(files["onnx"]))
    session = onnxruntime.InferenceSession(files["onnx"], providers=["CPUExecutionProvider"])
    assert {"pred_score", "pred_label"} <= {output.name for output in session.get_outputs()}


@pytest.mark.long
def test_an_exported_model_watches_and_monitors(calibrated, calibrated_export, data, tmp_path):
    (model, _), path = calibrated, calibrated_export
    good = data.root / data.category / "test" / "good"
    watch(path, str(good), tmp_path / "watched", overlays=False)
    with (tmp_path / "watched/scores.csv").open() as file:
        rows = list(csv.DictReader(file))
    found = torch.tensor([float(row["p_value"]) for row in rows], dtype=torch.float64)
    scores = torch.tensor([float(row["score"]) for row in rows])
    torch.testing.assert_close(found, model.post_processor.image_p_values(scores), rtol=0, atol=1e-5)
    assert [int(row["anomalous"]) for row in rows] == (found <= RATE).int().tolist()
    verdicts = []
    for recent in (good, tmp_path / "watched/scores.csv"):
        monitor(recent, path, output=tmp_path / "monitored")
        verdicts.append(json.loads((tmp_path / "monitored/monitor.json").read_text()))
    assert verdicts[0] == verdicts[1]
    assert verdicts[0]["reference_images"] == 4


@pytest.mark.long
def test_a_model_without_a_rate_exports_no_scores(export):
    assert read_reference_scores(export((64, 64))) is None
    assert read_reference_scores(export(None, "onnx")) is None


# Resuming


@pytest.mark.long
def test_a_resumed_run_holds_out_the_same_images(tmp_path, data):
    whole = quick_model(epochs=4)
    make_engine(tmp_path / "whole").fit(whole, datamodule=data)
    make_engine(tmp_path / "cut", callbacks=[StopAfter(2)]).fit(quick_model(epochs=4), datamodule=data)
    checkpoint = next((tmp_path / "cut").rglob("last.ckpt"))
    resumed = quick_model(seed=5, epochs=4, held_out_share=0.5)
    make_engine(tmp_path / "resumed").fit(resumed, datamodule=data, ckpt_path=checkpoint)
    assert resumed.reference.chosen == whole.reference.chosen
    assert_same(buffers_of(whole), buffers_of(resumed))


def test_a_run_that_was_cut_off_has_no_thresholds(tmp_path, data):
    class Killed(StopAfter):
        def on_train_epoch_start(self, trainer, pl_module):
            if trainer.current_epoch == self.epochs:
                raise KeyError("killed")

        def on_train_epoch_end(self, trainer, pl_module):
            pass

    with pytest.raises(KeyError, match="killed"):
        make_engine(tmp_path, callbacks=[Killed(1)]).fit(quick_model(), datamodule=data)
    cut = CflowPlugin.load_from_checkpoint(next(tmp_path.rglob("last.ckpt")), weights_only=False).eval()
    with pytest.raises(CflowError, match=r"goes on with --ckpt_path last\.ckpt"):
        cut(torch.rand(1, 3, 64, 64))
    with pytest.raises(CflowError, match="no scores of reference images"):
        cut.to_openvino(tmp_path, input_size=(64, 64))


def test_images_that_were_trained_on_are_never_held_out(tmp_path, data):
    make_engine(tmp_path / "plain", callbacks=[StopAfter(1)]).fit(
        quick_model(target_false_alarm_rate=None), datamodule=data
    )
    plain = next((tmp_path / "plain").rglob("last.ckpt"))
    with pytest.raises(CflowError, match="trained on all training images"):
        make_engine(tmp_path / "later").fit(quick_model(), datamodule=data, ckpt_path=plain)
    make_engine(tmp_path / "rate", callbacks=[StopAfter(1)]).fit(quick_model(), datamodule=data)
    checkpoint = next((tmp_path / "rate").rglob("last.ckpt"))
    more = make_textures(tmp_path / "more", train_good=18)
    with pytest.raises(CflowError, match="out of 16 training images, and now there are 18"):
        make_engine(tmp_path / "more").fit(quick_model(), datamodule=more, ckpt_path=checkpoint)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"held_out_share": 0.0}, "held_out_share"),
        ({"held_out_share": 0.6}, "held_out_share"),
        ({"post_processor": PostProcessor()}, "not both"),
        ({"post_processor": False}, "not both"),
        (
            {
                "target_false_alarm_rate": None,
                "post_processor": PostProcessor(),
                "smallest_region": 3,
                "mm_per_pixel": 1.0,
            },
            "Give smallest_region and mm_per_pixel or a post_processor, not both",
        ),
    ],
    ids=str,
)
def test_impossible_settings_are_refused(settings, words):
    with pytest.raises(CflowError, match=words):
        quick_model(**settings)
    with pytest.raises(CflowError, match="sensitivities"):
        ConformalPostProcessor(0.1, image_sensitivity=0.7)
    assert CflowPlugin(**QUICK, post_processor=ConformalPostProcessor(0.1)).post_processor.is_conformal


@pytest.mark.long
def test_the_command_line(tmp_path):
    model = ["--model", "CflowPlugin", "--model.backbone", "gabor", "--model.image_size", "[64, 64]"]
    model += ["--model.coupling_blocks", "2", "--trainer.accelerator", "cpu"]
    data = ["--data", "Textures", "--data.resolution", "64", "--data.train_good", "12", "--data.val_good", "2"]
    data += ["--data.test_good", "2", "--data.test_defect", "1"]
    train = [*model, "--model.epochs", "1", "--model.steps_per_epoch", "2", "--model.target_false_alarm_rate"]
    out = run_command("anomalib", "train", *train, "0.05", *data, cwd=tmp_path, expect=1)
    assert "error: A false-alarm rate of 0.05 needs 19 good images" in out
    run_command("anomalib", "train", *train, "0.2", *data, cwd=tmp_path)
    [checkpoint] = {path.resolve() for path in tmp_path.rglob("model.ckpt")}
    images = tmp_path / "datasets/Textures/weave/train/good"
    run_command("anomalib", "predict", *model, "--data", images, "--ckpt_path", checkpoint, cwd=tmp_path)
    assert len(read_reference_scores(checkpoint)) == 4
