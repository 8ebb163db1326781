import json
import logging
import math
import re
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from anomalib.data import Folder, MVTecAD
from lightning import seed_everything
from lightning.pytorch.callbacks import Callback, Timer
from sklearn.metrics import roc_auc_score
from torch.optim.lr_scheduler import CosineAnnealingLR, LinearLR, OneCycleLR, SequentialLR
from torchvision.transforms.v2 import Compose, Normalize, RandomRotation, Resize

from cflow_plugin import CflowError, CflowPlugin
from cflow_plugin.training.calibration import log_likelihoods_of
from cflow_plugin.training.feature_bank import FeatureBank
from cflow_plugin.training.optimization import Pace, learning_rate_schedule
from cflow_plugin.training.settings import recipe_epochs
from cflow_plugin.training.vector_loader import is_random

from .conftest import QUICK, SHARED, make_engine, make_textures


def quick_model(seed=0, **settings):
    seed_everything(seed)
    return CflowPlugin(**{**QUICK, "epochs": 2, "steps_per_epoch": 3, **settings})


def weights_of(model):
    return {name: value.clone() for name, value in model.model.state_dict().items()}


def assert_same(first, second):
    assert first.keys() == second.keys()
    for name in first:
        torch.testing.assert_close(first[name], second[name], rtol=0, atol=0, equal_nan=True, msg=name)


class StopAfter(Callback):
    def __init__(self, epochs):
        self.epochs = epochs

    def on_train_epoch_end(self, trainer, pl_module):
        if trainer.current_epoch + 1 == self.epochs:
            trainer.should_stop = True


@pytest.mark.parametrize("schedule", ["one_cycle", "cosine"])
def test_a_finished_run_cannot_go_on_for_longer(tmp_path, textures, schedule):
    make_engine(tmp_path / "run").fit(quick_model(schedule=schedule, epochs=2), datamodule=textures)
    last = next((tmp_path / "run").rglob("last.ckpt"))
    with pytest.raises(CflowError, match=r"planned for 2 epochs.* cannot go on for 3"):
        make_engine(tmp_path / "more").fit(
            quick_model(schedule=schedule, epochs=3), datamodule=textures, ckpt_path=last
        )


def test_a_run_cannot_go_on_to_where_it_has_been(tmp_path, textures):
    make_engine(tmp_path / "run").fit(quick_model(epochs=3), datamodule=textures)
    last = next((tmp_path / "run").rglob("last.ckpt"))
    with pytest.raises(CflowError, match=r"of epoch 2, and this run ends with epoch 1: set --model\.epochs"):
        make_engine(tmp_path / "less").fit(quick_model(epochs=1), datamodule=textures, ckpt_path=last)


def test_only_decoders_and_constants_change(tmp_path, textures):
    model = quick_model(backbone="resnet18", layers=["layer1"], pre_trained=False)
    before, modes = weights_of(model), []

    class Watch(Callback):
        def on_train_batch_end(self, trainer, pl_module, *_):
            modes.append((pl_module.model.encoder.training, pl_module.model.decoders.training))

    make_engine(tmp_path, callbacks=[Watch()]).fit(model, datamodule=textures)
    after = weights_of(model)
    assert set(modes) == {(False, True)}
    changed = {name.split(".")[0] for name in after if not torch.equal(before[name], after[name])}
    assert changed == {"decoders", "scoring", "whole"}
    parameters = {name for name, parameter in model.model.decoders.named_parameters() if parameter.requires_grad}
    assert all(not torch.equal(before[f"decoders.{name}"], after[f"decoders.{name}"]) for name in parameters)


@pytest.mark.parametrize(("asked", "planned"), [(None, 3), (1, 1), (1000, 1000)])
def test_a_run_ends_where_its_recipe_does(tmp_path, textures, asked, planned):
    """Or where the user says, be it Lightning's own default."""
    model = quick_model(epochs=3)
    settings = {} if asked is None else {"max_epochs": asked}
    engine = make_engine(tmp_path, callbacks=[StopAfter(4)], **settings)
    engine.fit(model, datamodule=textures)
    assert engine.trainer.max_epochs == planned
    assert engine.trainer.current_epoch == min(planned, 4)
    assert engine.trainer.global_step == engine.trainer.current_epoch * 3


def test_the_recipe_s_length_comes_from_the_number_of_images(tmp_path, textures):
    assert recipe_epochs(len(textures.train_data)) == recipe_epochs(1) == 8
    assert recipe_epochs(32 * 16) == 4 * recipe_epochs(1)
    engine = make_engine(tmp_path)
    engine.fit(quick_model(epochs=None, steps_per_epoch=1), datamodule=textures)
    assert engine.trainer.current_epoch == 8


def test_the_same_seed_gives_the_same_model(tmp_path, textures):
    models = [quick_model(), quick_model(), quick_model(seed=1)]
    for index, model in enumerate(models):
        seed_everything(0 if index < 2 else 1)
        make_engine(tmp_path / str(index)).fit(model, datamodule=textures)
    assert_same(weights_of(models[0]), weights_of(models[1]))
    assert not torch.equal(models[0].model.scoring.log_maximum, models[2].model.scoring.log_maximum)


@pytest.mark.long
def test_constants_depend_on_training_images_alone(tmp_path, textures):
    constants = []
    # The data sets differ in all that is not for training.
    for index, data in enumerate((textures, make_textures(tmp_path / "data", test_good=2, val_good=5, val_defect=2))):
        model = quick_model()
        make_engine(tmp_path / str(index)).train(model, datamodule=data)
        constants.append(weights_of(model))
    assert_same(*constants)


def test_constants_between_epochs_look_at_a_part_of_large_images():
    seed_everything(0)
    model = quick_model().model
    sizes = [(6, 5), (2, 3)]
    kept = [torch.tensor([0, *range(3, 30)]), torch.arange(6)]
    bank = SimpleNamespace(positions=kept, sizes=sizes)
    features = [
        torch.randn(3, len(places), decoder.whitening.mean.numel())
        for places, decoder in zip(kept, model.decoders, strict=True)
    ]
    every, part = (log_likelihoods_of(bank, features, model, 2, 0, most) for most in (None, 10))
    for full, drawn, places, expected in zip(every, part, kept, (10, 6), strict=True):
        known = ~drawn.isnan()
        assert known.flatten(1).sum(1).tolist() == [expected, expected]
        assert (known[0] == known[1]).all()
        assert (~full.isnan()).flatten(1).sum(1).tolist() == [len(places)] * 2
        torch.testing.assert_close(drawn[known], full[known])


def test_constants_are_of_the_images_that_were_not_trained_on(tmp_path, textures):
    seen = []

    class Watch(Callback):
        def on_train_end(self, trainer, pl_module):
            seen.append(pl_module.calibration.vectors.bank)

    model = quick_model(unseen_share=0.25)
    make_engine(tmp_path, callbacks=[Watch()]).fit(model, datamodule=textures)
    [bank] = seen
    images = len(textures.train_data)
    assert len(bank.unseen_features[0]) == round(images / 4)
    assert len(bank.features[0]) == images - round(images / 4)
    scoring = model.eval().model.scoring
    for scale, (decoder, features, size) in enumerate(
        zip(model.model.decoders, bank.unseen_features, bank.sizes, strict=True)
    ):
        with torch.no_grad():
            values = decoder.log_likelihood(features, model.model.condition(*size, features)).unflatten(1, size)
        cells = np.sort((values - getattr(scoring, f"correction_{scale}")).numpy(), axis=None)
        often, rarely = (cells[max(1, round(share * len(cells))) - 1] for share in (0.1, 0.001))
        assert scoring.temperature[scale].item() == pytest.approx(2.5 * (often - rarely), rel=0.02)
        assert scoring.log_maximum[scale].item() == pytest.approx(often + (often - rarely) / 2, rel=0.02, abs=0.01)


def test_features_beyond_the_memory_s_limit(tmp_path, textures, monkeypatch):
    """A part of the positions is kept, in each epoch another, until all have had their turn."""
    monkeypatch.setattr("cflow_plugin.training.feature_bank._MAXIMUM_BYTES", 100_000)
    kept = []

    class Watch(Callback):
        def on_train_epoch_end(self, trainer, pl_module):
            bank = pl_module.calibration.vectors.bank
            kept.append(bank.positions[0])

    model = quick_model(epochs=6, vectors_per_step=4096)  # each epoch takes all that are there
    make_engine(tmp_path, callbacks=[Watch()]).fit(model, datamodule=textures)
    correction = model.model.scoring.correction_0
    count = len(kept[0])
    assert 0 < count < correction.numel()
    turns = -(-correction.numel() // count)
    assert turns <= 6, "the test must see a whole round"
    assert len(torch.cat(kept[:turns]).unique()) == correction.numel()
    assert len(torch.cat(kept[: turns - 1]).unique()) == (turns - 1) * count
    assert torch.isfinite(correction).all()
    assert correction.unique().numel() <= 2 * count
    assert torch.isfinite(model.eval()(torch.rand(1, 3, 64, 64)).anomaly_map).all()


def test_the_same_images_are_not_trained_on_in_each_turn():
    generator = torch.Generator()
    images = torch.arange(12.0)[:, None, None, None].expand(12, 1, 2, 2)
    left_out = []
    for turn in range(2):
        bank = FeatureBank([(2, 2)], 12, 3, generator.manual_seed(5), lambda _, turn=turn: turn)
        for part in images.split(5):
            bank.add([part])
        assert {*bank.features[0].flatten().tolist(), *bank.unseen_features[0].flatten().tolist()} == set(range(12))
        left_out.append(bank.unseen_features[0][:, 0, 0].tolist())
    assert left_out[0] == left_out[1]
    assert len(set(left_out[0])) == 3


@pytest.mark.long
def test_a_checkpoint_brings_everything_with_it(trained, textures, tmp_path):
    path = tmp_path / "model.ckpt"
    engine = make_engine(tmp_path)
    model = quick_model(backbone="resnet18", layers=["layer1"], pre_trained=False)
    engine.fit(model, datamodule=textures)
    engine.trainer.save_checkpoint(path)
    restored = CflowPlugin.load_from_checkpoint(path, map_location="cpu", weights_only=False).eval()
    assert_same(weights_of(model), weights_of(restored))
    images = torch.rand(2, 3, 64, 64)
    torch.testing.assert_close(restored(images).anomaly_map, model.eval()(images).anomaly_map, rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("schedule", "augmented"),
    [
        ("one_cycle", False),
        pytest.param("cosine", False, marks=pytest.mark.long),
        pytest.param("one_cycle", True, marks=pytest.mark.long),
    ],
)
def test_a_resumed_run_ends_with_the_same_weights(tmp_path, textures, schedule, augmented):
    if augmented:
        textures = make_textures(textures.root, train_augmentations=RandomRotation((-5, 5)))
    settings = {"epochs": 4, "schedule": schedule, "warmup_epochs": 1}
    whole = quick_model(**settings)
    make_engine(tmp_path / "whole").fit(whole, datamodule=textures)

    class Killed(Callback):
        def on_train_epoch_start(self, trainer, pl_module):
            if trainer.current_epoch == 2:
                raise RuntimeError

    with pytest.raises(RuntimeError):
        make_engine(tmp_path / "cut", callbacks=[Killed()]).fit(quick_model(**settings), datamodule=textures)
    checkpoint = next((tmp_path / "cut").rglob("last.ckpt"))
    resumed = quick_model(seed=5, **settings)
    engine = make_engine(tmp_path / "resumed")
    engine.fit(resumed, datamodule=textures, ckpt_path=checkpoint)
    assert engine.trainer.current_epoch == 4
    assert_same(weights_of(whole), weights_of(resumed))


@pytest.mark.long
def test_a_resumed_run_remembers_decoders_that_were_better(tmp_path, textures):
    class Spoil(Callback):
        """Makes all that comes after the second epoch worse."""

        def on_train_epoch_start(self, trainer, pl_module):
            if trainer.current_epoch == 2:
                with torch.no_grad():
                    for parameter in pl_module.model.decoders.parameters():
                        parameter.mul_(3)
            if self.ends and trainer.current_epoch == 3:
                raise RuntimeError

        def __init__(self, ends):
            self.ends = ends

    settings = {"epochs": 4, "learning_rate": 1e-4}
    whole = quick_model(**settings)
    make_engine(tmp_path / "whole", callbacks=[Spoil(ends=False)]).fit(whole, datamodule=textures)
    with pytest.raises(RuntimeError):
        make_engine(tmp_path / "cut", callbacks=[Spoil(ends=True)]).fit(quick_model(**settings), datamodule=textures)
    checkpoint = next((tmp_path / "cut").rglob("last.ckpt"))
    assert torch.load(checkpoint, weights_only=True)["callbacks"]["KeepBest"]["epochs"] == [1, 1]
    resumed = quick_model(seed=5, **settings)
    make_engine(tmp_path / "resumed").fit(resumed, datamodule=textures, ckpt_path=checkpoint)
    assert_same(weights_of(whole), weights_of(resumed))


def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_the_last_epoch(tmp_path, textures):
    model = quick_model(epochs=3)

    class Spoil(Callback):
        def on_train_epoch_start(self, trainer, pl_module):
            if trainer.current_epoch == 1:
                torch.nn.init.constant_(pl_module.model.decoders[0].module_list[1].global_scale, float("inf"))

    with pytest.raises(CflowError, match=r"loss is (nan|inf|-inf) in epoch 1.*last\.ckpt.*learning_rate"):
        make_engine(tmp_path, callbacks=[Spoil()]).fit(model, datamodule=textures)
    kept = CflowPlugin.load_from_checkpoint(next(tmp_path.rglob("last.ckpt")), weights_only=False).eval()
    assert torch.isfinite(kept(torch.rand(1, 3, 64, 64)).anomaly_map).all()


@pytest.mark.parametrize(
    "settings",
    [
        {"gradient_clip_val": 0.1},
        pytest.param({"precision": "bf16-mixed"}, marks=pytest.mark.long),
        pytest.param({"accumulate_grad_batches": 2}, marks=pytest.mark.long),
    ],
    ids=str,
)
def test_lightning_s_options(tmp_path, textures, settings):
    model = quick_model(steps_per_epoch=4)
    make_engine(tmp_path, **settings).fit(model, datamodule=textures)
    assert torch.isfinite(model.eval()(torch.rand(1, 3, 64, 64)).anomaly_map).all()


def test_what_is_logged(tmp_path, textures):
    engine = make_engine(tmp_path)
    engine.fit(quick_model(), datamodule=textures)
    logged = engine.trainer.callback_metrics
    assert {"train_loss", "train_nll_scale1", "train_nll_scale2", "learning_rate"} <= set(logged)
    # Features whitened to unit variance are about as likely as a normal distribution's: 1.4 nats per dimension, less
    # the whitening's determinant. A sum over dimensions or vectors would be far away from it.
    assert abs(logged["train_nll_scale1"]) < 10


@pytest.mark.long
def test_schedules(tmp_path, textures):
    rates = []

    class Watch(Callback):
        def on_train_batch_end(self, trainer, *_):
            rates.append(trainer.optimizers[0].param_groups[0]["lr"])

    model = quick_model(epochs=10, schedule="cosine", warmup_epochs=2, learning_rate=0.01)
    make_engine(tmp_path / "cosine", callbacks=[Watch()]).fit(model, datamodule=textures)
    assert max(rates) == pytest.approx(0.01, rel=0.01)
    assert 4 <= max(range(30), key=rates.__getitem__) <= 6
    assert rates[-1] < 1e-4
    rates.clear()
    engine = make_engine(tmp_path / "one_cycle", callbacks=[Watch()])
    engine.fit(quick_model(epochs=4, learning_rate=0.01), datamodule=textures)
    optimizer = torch.optim.Adam([torch.zeros(1, requires_grad=True)])
    scheduler = OneCycleLR(optimizer, 0.01, total_steps=12, pct_start=0.2)
    expected = [scheduler.get_last_lr()[0]]
    for _ in range(11):
        optimizer.step()
        scheduler.step()
        expected += scheduler.get_last_lr()
    assert max(rates) == pytest.approx(max(expected))


def test_steps_of_a_whole_pass(tmp_path, textures):
    engine = make_engine(tmp_path)
    # 11 images that are trained on, of 8×8 cells, 128 vectors a step
    engine.fit(quick_model(steps_per_epoch=None, vectors_per_step=128, epochs=1), datamodule=textures)
    assert engine.trainer.global_step == 5


def rates_of(kind, steps, pace=None, warmup=0.0):
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.1)
    scheduler = learning_rate_schedule(optimizer, kind, pace or (lambda step: step / steps), warmup)
    rates = []
    for _ in range(steps):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return np.array(rates)


def test_schedules_are_torch_s():
    steps = 4000
    optimizer = torch.optim.Adam([torch.nn.Parameter(torch.zeros(1))])
    one_cycle = OneCycleLR(optimizer, 0.1, total_steps=steps, pct_start=0.2)
    other = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.1)
    rise, fall = LinearLR(other, start_factor=0.01, total_iters=400), CosineAnnealingLR(other, T_max=3600)
    cosine = SequentialLR(other, [rise, fall], milestones=[400])
    expected = {"one_cycle": [], "cosine": []}
    for _ in range(steps):
        expected["one_cycle"].append(one_cycle.get_last_lr()[0])
        expected["cosine"].append(cosine.get_last_lr()[0])
        for part in (optimizer, one_cycle, other, cosine):
            part.step()
    for kind, warmup in (("one_cycle", 0.0), ("cosine", 0.1)):
        np.testing.assert_allclose(rates_of(kind, steps, warmup=warmup), expected[kind], rtol=0, atol=2e-4)


@pytest.mark.parametrize("kind", ["one_cycle", "cosine"])
@pytest.mark.parametrize("steps", [*range(2, 12), 100])
def test_runs_of_any_length_have_a_schedule(kind, steps):
    rates = rates_of(kind, steps)
    assert 0.05 <= max(rates) <= 0.1 + 1e-9
    assert rates[-1] < max(rates) or steps == 2
    assert np.isfinite(rates).all()


def test_a_run_that_hastens_ends_in_the_steps_that_are_left():
    pace = Pace()
    pace.restore({"share": 0.0, "steps": 1000, "since": [0, 0.0]})
    shares = [pace(step) for step in range(401)]
    pace.hasten(400, 50)
    shares += [pace(step) for step in range(401, 451)]
    assert shares[400] == pytest.approx(0.4)
    assert shares[425] == pytest.approx(0.7)
    assert shares[-1] == pytest.approx(1)
    again = Pace()
    again.restore(pace.state())
    assert again(440) == 1.0


@pytest.mark.long
def test_a_run_that_is_bounded_in_time_has_its_whole_schedule(tmp_path, textures):
    # However long its steps are: each rate is torch's at the share of the time that is over when it is set.
    limit, shares, rates = 6.0, 1000, []
    one_cycle = OneCycleLR(
        torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))]), 0.01, total_steps=shares + 1, pct_start=0.2
    )
    expected = [one_cycle.get_last_lr()[0]]
    for _ in range(shares):
        one_cycle.optimizer.step()
        one_cycle.step()
        expected.append(one_cycle.get_last_lr()[0])

    class Watch(Callback):
        def on_before_optimizer_step(self, trainer, *_):
            self.before = elapsed(trainer)

        def on_train_batch_end(self, trainer, *_):
            rates.append((self.before, elapsed(trainer), trainer.optimizers[0].param_groups[0]["lr"]))

    def elapsed(trainer):
        return next(one for one in trainer.callbacks if isinstance(one, Timer)).time_elapsed("train")

    engine = make_engine(tmp_path, callbacks=[Watch()], max_time={"seconds": limit}, max_epochs=-1)
    model = quick_model(learning_rate=0.01, unseen_share=0)
    engine.fit(model, datamodule=textures)
    assert len(rates) > 5
    (begun, counted, _), *rest = rates
    for before, after, rate in rest:
        first = math.floor(shares * (before - counted) / (limit - counted))
        last = math.ceil(shares * (after - begun) / (limit - begun))
        possible = expected[max(0, min(shares, first)) : min(shares, last) + 1]
        assert min(possible) - 1e-4 <= rate <= max(possible) + 1e-4
    assert after >= limit
    assert model.model.scoring.is_calibrated


def likelihood_of_unseen(model, features, positions, sizes):
    with torch.no_grad():
        return [
            float(decoder.log_likelihood(vectors, model.model.condition(*size, vectors)[where]).mean())
            for decoder, vectors, where, size in zip(model.model.decoders, features, positions, sizes, strict=True)
        ]


def fitted_until_nothing_is_gained(folder, datamodule, **bounds):
    # Without noise and with twelve images a flow soon knows them by heart.
    curve, bank = [], {}

    class Watch(Callback):
        def on_train_batch_end(self, trainer, module, *_):
            found = module.calibration.bank
            bank.update(features=found.unseen_features, positions=found.positions, sizes=found.sizes)
            if trainer.global_step % 3 == 0:
                curve.append(likelihood_of_unseen(module, **bank))

    model = quick_model(noise=0.0, learning_rate=0.02, steps_per_epoch=3)
    make_engine(folder, callbacks=[Watch()], **bounds).fit(model, datamodule=datamodule)
    return curve, likelihood_of_unseen(model, **bank)


@pytest.mark.long
def test_training_ends_when_unseen_images_no_longer_gain(tmp_path, textures):
    curve, last = fitted_until_nothing_is_gained(tmp_path / "epochs", textures, max_epochs=200)
    assert 40 < len(curve) < 200
    for scale, best in enumerate(np.max(curve, axis=0)):
        assert last[scale] >= best - 1e-4
        assert last[scale] > curve[-1][scale] - 1e-4
    # A run that is bounded otherwise is as patient.
    by_steps, _ = fitted_until_nothing_is_gained(tmp_path / "steps", textures, max_epochs=-1, max_steps=600)
    assert len(by_steps) == len(curve)


@pytest.mark.long
def test_with_accumulated_gradients_it_ends_in_the_epochs_that_are_said(tmp_path, textures, caplog):
    caplog.set_level("INFO")
    left = []

    class Watch(Callback):
        def on_train_epoch_start(self, trainer, module):
            if said := re.search(r"ending in (\d+)", caplog.text):
                left.append(int(said[1]))

    model = quick_model(noise=0.0, learning_rate=0.02, steps_per_epoch=5)  # the third step of an epoch has one batch
    engine = make_engine(tmp_path, callbacks=[Watch()], max_epochs=200, accumulate_grad_batches=2)
    engine.fit(model, datamodule=textures)
    assert len(left) == left[0] > 2


@pytest.mark.long
def test_a_camera_s_variations_are_less_of_a_surprise(tmp_path, textures):
    good = torch.stack([item.image for item in textures.test_data if not item.gt_label])
    noisy = (good + 0.05 * torch.randn(good.shape, generator=torch.Generator().manual_seed(0))).clamp(0, 1)
    falls = []
    for variation in (0.0, 1.0, 3.0):
        model = quick_model(epochs=6, camera_variation=variation)
        make_engine(tmp_path / str(variation)).fit(model, datamodule=textures)
        with torch.no_grad():
            before, after = (model.eval().model.log_likelihoods(model.prepared(images)) for images in (good, noisy))
        falls.append([float((first - then).mean()) for first, then in zip(before, after, strict=True)])
    assert all(plain > more > most for plain, more, most in zip(*falls, strict=True))


@pytest.mark.long
def test_augmented_images_are_encoded_anew(tmp_path, textures, caplog):
    def extractions(folder, **settings):
        caplog.clear()
        with caplog.at_level(logging.INFO, logger="cflow_plugin.training.vector_loader"):
            data = make_textures(textures.root, **settings)
            make_engine(tmp_path / folder).fit(quick_model(epochs=3), datamodule=data)
        return sum("Extracting" in record.message for record in caplog.records)

    assert extractions("plain") == 1
    assert extractions("augmented", train_augmentations=RandomRotation((-5, 5))) == 3
    assert not is_random(Compose([Resize((64, 64)), Normalize([0.5] * 3, [0.5] * 3)]))


def test_the_paper_s_settings_train(tmp_path, textures):
    paper = {"permutation": "random", "neighbourhood": 1, "whiten": False, "noise": 0, "sigma": 0, "top_fraction": 0}
    paper |= {"map_mean": 0, "whole_image": 0}
    model = quick_model(**paper, condition_dims=16, schedule="cosine", learning_rate=2e-4)
    make_engine(tmp_path).fit(model, datamodule=textures)
    assert torch.equal(model.model.decoders[0].whitening.matrix, torch.eye(51))
    result = model.eval().model(torch.rand(2, 3, 64, 64))
    torch.testing.assert_close(result.pred_score, result.anomaly_map.amax((1, 2, 3)))


@pytest.mark.parametrize(
    ("setting", "value"),
    [("epochs", 0), ("steps_per_epoch", 0), ("vectors_per_step", -1), ("learning_rate", 0.0), ("noise", -0.1)],
)
def test_impossible_settings_are_refused(setting, value):
    with pytest.raises(CflowError, match=setting):
        CflowPlugin(**{**QUICK, setting: value})


@pytest.mark.long
def test_metrics_in_a_file(tmp_path, textures):
    engine = make_engine(tmp_path)
    engine.train(quick_model(), datamodule=textures)
    written = json.loads(next(tmp_path.rglob("metrics.json")).read_text())
    assert written.pop("false_regions_per_image") >= 0
    assert {name for name in written if "region" not in name} == {
        "image_AUROC", "image_F1Score", "pixel_AUROC", "pixel_AUPRO", "pixel_AUPRO_0.05", "pixel_F1Score"
    }  # fmt: skip
    assert all(0 <= value <= 1 for value in written.values())


@pytest.mark.parametrize(
    ("with_defects", "left"),
    [
        (True, {"image_AUROC", "image_F1Score"}),
        (False, set()),
    ],
    ids=["no masks", "no defects"],
)
def test_metrics_that_cannot_be_computed_are_left_out_with_a_note(tmp_path, textures, caplog, with_defects, left):
    root = textures.root / textures.category
    defects = [f"test/{path.name}" for path in (root / "test").iterdir() if path.name != "good"]
    data = Folder(
        name="mine",
        root=root,
        normal_dir="train/good",
        normal_test_dir="test/good",
        num_workers=0,
        abnormal_dir=defects if with_defects else None,
    )
    engine = make_engine(tmp_path)
    with caplog.at_level(logging.WARNING):
        [metrics] = engine.train(quick_model(), datamodule=data)
    assert set(metrics) == left
    notes = [record.getMessage() for record in caplog.records if record.getMessage().startswith("Left out, since")]
    assert sum(len(note.split(": ")[1].split(", ")) for note in notes) == 8 - len(left)
    assert len(notes) == len({note.split(": ")[0] for note in notes})
    written = json.loads(next(tmp_path.rglob("metrics.json")).read_text())
    assert set(written) == left


def test_metrics_equal_scikit_learn_s(tmp_path, trained, textures):
    [metrics] = make_engine(tmp_path).test(trained, datamodule=textures)
    scores, labels, maps, masks = [], [], [], []
    with torch.no_grad():
        for batch in textures.test_dataloader():
            result = trained(batch.image)  # anomalib normalises scores first, which may make ties
            scores.append(result.pred_score)
            labels.append(batch.gt_label)
            maps.append(result.anomaly_map.flatten())
            masks.append(batch.gt_mask.flatten())
    assert metrics["image_AUROC"] == pytest.approx(roc_auc_score(torch.cat(labels), torch.cat(scores)), abs=1e-5)
    assert metrics["pixel_AUROC"] == pytest.approx(roc_auc_score(torch.cat(masks), torch.cat(maps)), abs=1e-4)


@pytest.mark.long
def test_learning_beats_an_untrained_model_by_a_wide_margin(tmp_path):
    def measure(name, **settings):
        seed_everything(0)
        data = make_textures(
            tmp_path / "data", resolution=128, category="weave", train_good=16, test_good=12, test_defect=4
        )
        model = CflowPlugin(backbone="gabor", image_size=(128, 128), coupling_blocks=2, **settings)
        engine = make_engine(tmp_path / name)
        [metrics] = engine.train(model, datamodule=data)
        return metrics

    # Without what the whole image says: that needs no training.
    untrained = measure("untrained", whole_image=0, whiten=False, epochs=1, steps_per_epoch=1, learning_rate=1e-12)
    trained = measure("trained", whole_image=0, epochs=4)
    for name in ("image_AUROC", "pixel_AUROC", "pixel_AUPRO"):
        assert trained[name] > untrained[name] + 0.15, (name, trained, untrained)


@pytest.mark.long
@pytest.mark.shared
@pytest.mark.parametrize(
    ("category", "pixel", "overlap"),
    [
        ("cookies", 0.94, 0.83),  # large defects; Padim has 0.890 and 0.655
        ("piped_brg01", 0.98, 0.77),  # small ones; Padim has 0.974 and 0.689
    ],
)
def test_real_images_with_real_weights(tmp_path, category, pixel, overlap):
    seed_everything(0)
    model = CflowPlugin(
        layers=["layer2", "layer3"],
        weights=str(SHARED / "weights" / "resnet18.tv_in1k-layer1-3.safetensors"),
        coupling_blocks=4,
    )
    data = MVTecAD(root=SHARED / "data", category=category, num_workers=0)
    [metrics] = make_engine(tmp_path).train(model, datamodule=data)
    assert metrics["image_AUROC"] >= 0.99
    assert metrics["pixel_AUROC"] >= pixel
    assert metrics["pixel_AUPRO"] >= overlap
