"""However training ends, in whatever precision, and wherever the model then runs: one decision for one image."""

import json
import shutil
import signal
from pathlib import Path

import numpy as np
import onnxruntime
import openvino as ov
import pytest
import torch
from anomalib.data import Folder, PredictDataset
from anomalib.data.utils import ValSplitMode
from anomalib.deploy import CompressionType
from anomalib.metrics import AUROC, Evaluator
from anomalib.pre_processing import PreProcessor
from lightning import seed_everything
from lightning.pytorch.callbacks import Callback, EarlyStopping, ModelCheckpoint
from PIL import Image
from scipy.stats import betabinom
from torchvision.transforms.v2 import CenterCrop, Compose, Normalize, Resize

from cflow_plugin import CflowError, CflowPlugin
from cflow_plugin.commands.check import check
from cflow_plugin.decisions.conformal import p_values, threshold_rank
from cflow_plugin.decisions.reference_scores import read_reference_scores
from cflow_plugin.deploy import export as export_module
from cflow_plugin.deploy.graph import convert_to_openvino
from cflow_plugin.deploy.quantization import TrainingImages

from .conftest import call_in_a_copy, make_engine, make_textures
from .test_post_processing import decide, post_processor_for
from .test_training import StopAfter

RATE = 0.2
SMALL = {"backbone": "gabor", "layers": ["scale2"], "image_size": (64, 64), "coupling_blocks": 1}
F32 = {"INFERENCE_PRECISION_HINT": "f32"}


def small_model(**settings):
    seed_everything(0)
    return CflowPlugin(
        **{**SMALL, "epochs": 3, "steps_per_epoch": 3, "target_false_alarm_rate": RATE, "visualizer": False, **settings}
    )


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    root = tmp_path_factory.mktemp("ends")
    datamodule = make_textures(root, train_good=30, test_good=60)
    datamodule.prepare_data()
    datamodule.setup()
    return datamodule


class Interrupt(Callback):
    def on_train_batch_end(self, trainer, *_):
        if trainer.global_step == 5:
            raise KeyboardInterrupt


def early_stopping(monitor="train_loss", **settings):
    return EarlyStopping(monitor, **{"stopping_threshold": 1e9, "check_on_train_epoch_end": True, **settings})


def train(folder, data, end, model=None, **settings):
    """Train, and return the model and the checkpoint that is left for use."""
    model = model or small_model()
    if end == "early stop":
        settings["callbacks"] = [early_stopping()]
    elif end == "time":
        settings["max_time"] = {"milliseconds": 1}
    elif end == "steps":
        settings |= {"max_steps": 5, "max_epochs": -1}
    elif end == "interrupt":
        settings["callbacks"] = [Interrupt()]
    elif end == "resumed":
        make_engine(folder / "cut", callbacks=[StopAfter(1)], **settings).fit(small_model(), datamodule=data)
        settings["ckpt_path"] = next((folder / "cut").rglob("last.ckpt"))
    checkpoint = settings.pop("ckpt_path", None)
    engine = make_engine(folder / "run", **settings)
    if end == "interrupt":
        handler = signal.getsignal(signal.SIGINT)
        with pytest.raises(SystemExit):
            engine.fit(model, datamodule=data)
        signal.signal(signal.SIGINT, handler)
    else:
        engine.fit(model, datamodule=data, ckpt_path=checkpoint)
    return model, next((folder / "run").rglob("model.ckpt"))


def scores_by_file(predictions):
    return {
        path: score.item()
        for batch in predictions
        for path, score in zip(batch.image_path, batch.pred_score, strict=True)
    }


def assert_kept(scores, labels, reference, tolerance):
    """Held-out images score what is stored, and the rank decides."""
    np.testing.assert_allclose(np.sort(scores), reference, rtol=0, atol=tolerance)
    clear = abs(np.asarray(scores) - 0.5) > tolerance
    assert np.array_equal(np.asarray(labels)[clear], (p_values(scores, reference - tolerance) <= RATE)[clear])
    assert (np.asarray(scores) > 0.5 + tolerance).sum() <= len(reference) - threshold_rank(len(reference), RATE)


def assert_rate(scores, maxima, splits=200):
    """Over random splits of good images that were not trained on, alarms by score or by mask are those asked for."""
    generator = np.random.default_rng(0)
    new, alarms = len(scores) // 2, []
    for _ in range(splits):
        order = torch.from_numpy(generator.permutation(len(scores)))
        reference, others = order[new:], order[:new]
        post_processor = post_processor_for(scores[reference], maxima[reference], RATE)
        found = decide(post_processor, scores[others], maxima[others].reshape(-1, 1, 1, 1))
        alarms.append(int((found.pred_label | found.pred_mask.flatten()).sum()))
    extreme = len(scores) - new + 1 - threshold_rank(len(scores) - new, RATE)
    theory = betabinom(new, extreme, len(scores) - new + 1 - extreme)
    assert abs(np.mean(alarms) - theory.mean()) < 4 * theory.std() / splits**0.5


def images_of(files):
    return torch.cat([PredictDataset(Path(file))[0].image[None] for file in files])


# All ways to an end


def assert_same_state(one, other):
    for name, value in one.items():
        torch.testing.assert_close(other[name], value, rtol=0, atol=0, equal_nan=True, msg=name)


@pytest.mark.parametrize("end", ["steps", "interrupt"])  # the other ends: test_one_decision_wherever_it_is_made
def test_every_end_leaves_thresholds_of_the_last_weights(tmp_path, data, end):
    model, checkpoint = train(tmp_path, data, end)
    loaded = CflowPlugin.load_from_checkpoint(checkpoint, map_location="cpu")
    assert_same_state(model.state_dict(), loaded.state_dict())
    dataset = PredictDataset(Path(loaded.reference.files[0]).parent)
    found = scores_by_file(make_engine(tmp_path / "predict").predict(loaded, dataset=dataset))
    reference = loaded.post_processor.normalized_reference_scores.numpy()
    scores = np.array([found[file] for file in loaded.reference.files])
    assert_kept(scores, scores > 0.5, reference, 1e-6)
    last = next((tmp_path / "run").rglob("last.ckpt"))
    held = torch.load(last, weights_only=True)["state_dict"]["post_processor.reference_scores"]
    assert len(held) == (0 if end == "interrupt" else len(reference))


def test_without_a_rate_an_early_end_is_validated(tmp_path, data):
    model, checkpoint = train(tmp_path, data, "early stop", small_model(target_false_alarm_rate=None))
    assert torch.isfinite(model.post_processor.image_threshold)
    loaded = CflowPlugin.load_from_checkpoint(checkpoint, map_location="cpu")
    assert loaded.post_processor.image_threshold == model.post_processor.image_threshold


def test_a_run_that_was_killed_before_its_thresholds_has_them_when_it_is_resumed(tmp_path, data):
    class Killed(Callback):
        def on_train_end(self, trainer, pl_module):
            raise KeyError("killed")

    whole, _ = train(tmp_path / "whole", data, "planned", limit_val_batches=0)
    with pytest.raises(KeyError, match="killed"):
        train(tmp_path / "cut", data, "planned", callbacks=[Killed()], limit_val_batches=0)
    last = next((tmp_path / "cut").rglob("last.ckpt"))
    assert len(torch.load(last, weights_only=True)["state_dict"]["post_processor.reference_scores"]) == 0
    for number in range(2):  # and once more from what that leaves
        resumed, last = train(tmp_path / str(number), data, "planned", ckpt_path=last, limit_val_batches=0)
        assert_same_state(whole.state_dict(), resumed.state_dict())


@pytest.mark.parametrize(("end", "rate"), [("planned", RATE), ("early stop", None)])
def test_thresholds_are_of_the_best_decoders_that_a_run_ends_with(tmp_path, data, monkeypatch, end, rate):
    worse = iter(range(100))
    monkeypatch.setattr("cflow_plugin.training.best.unseen_likelihoods", lambda *_: [-float(next(worse))])
    first = {}

    class Watch(Callback):
        def on_train_batch_end(self, trainer, pl_module, *_):
            if trainer.global_step == 3:
                first.update({name: value.clone() for name, value in pl_module.model.decoders.state_dict().items()})

    stop = [early_stopping(stopping_threshold=-1e9, patience=1, mode="max")] if end == "early stop" else []
    settings = {"target_false_alarm_rate": rate}
    model, checkpoint = train(tmp_path, data, "planned", small_model(**settings), callbacks=[Watch(), *stop])
    for path in (checkpoint, next((tmp_path / "run").rglob("last.ckpt"))):
        state = torch.load(path, weights_only=True)["state_dict"]
        for name, value in first.items():
            torch.testing.assert_close(state[f"model.decoders.{name}"], value, rtol=0, atol=0)
        for name, value in model.post_processor.state_dict().items():
            torch.testing.assert_close(state[f"post_processor.{name}"], value, rtol=0, atol=0, equal_nan=True)
    if rate is None:
        assert model.post_processor.decides
        return
    with torch.no_grad():
        found = model.eval().model(model.pre_processor(images_of(model.reference.files))).pred_score
    torch.testing.assert_close(model.post_processor.reference_scores, found.sort().values)


class Count(Callback):
    def __init__(self):
        self.epochs = []

    def on_validation_end(self, trainer, pl_module):
        self.epochs.append(trainer.current_epoch)


def test_validation_is_as_often_as_asked(tmp_path, data):
    counts = Count()
    train(tmp_path / "each", data, "planned", callbacks=[counts])
    assert counts.epochs == [0, 1, 2]
    metric = AUROC(fields=["pred_score", "gt_label"], prefix="image_")
    watched = small_model(target_false_alarm_rate=None, evaluator=Evaluator(val_metrics=[metric]))
    best = ModelCheckpoint(tmp_path / "best", monitor="image_AUROC", mode="max", save_top_k=-1, filename="{epoch}")
    stop = early_stopping("image_AUROC", mode="max", patience=1, stopping_threshold=0.0)
    train(tmp_path / "watched", data, "planned", watched, callbacks=[stop, best])
    assert [path.name for path in (tmp_path / "best").iterdir()] == ["epoch=0.ckpt"]
    # What is kept as the best has thresholds of its own.
    saved = torch.load(tmp_path / "best" / "epoch=0.ckpt", weights_only=True)["state_dict"]
    assert torch.isfinite(saved["post_processor._image_threshold"])


# In every precision


@pytest.mark.parametrize("precision", ["16-mixed", "16-true", "bf16-true", "64-true"])  # bf16-mixed: with the files
def test_every_precision_has_thresholds_of_its_own_scores(tmp_path, data, precision):
    model, checkpoint = train(tmp_path, data, "planned", precision=precision)
    files = model.reference.files
    engine = make_engine(tmp_path / "predict", precision=precision)
    dataset = PredictDataset(Path(files[0]).parent)
    found = scores_by_file(
        engine.predict(CflowPlugin(**SMALL, visualizer=False), dataset=dataset, ckpt_path=checkpoint)
    )
    reference = model.post_processor.normalized_reference_scores.numpy()
    scores = np.array([found[file] for file in files])
    assert_kept(scores, scores > 0.5, reference, 1e-6)
    [metrics] = make_engine(tmp_path / "test", precision=precision).test(model, datamodule=data)
    assert all(0 <= value <= 1 for value in metrics.values())
    assert model.post_processor.reference_scores.dtype in (torch.float32, torch.float64)


def rounding():
    """What torch itself says of how it may round factors that are in single precision."""
    found = {}
    for name, say in {
        "products": torch.get_float32_matmul_precision,
        "convolutions": lambda: torch.backends.cudnn.allow_tf32,
        **{
            f"{backend} {kind}": lambda backend=backend, kind=kind: (
                getattr(getattr(torch.backends, backend), kind).fp32_precision
            )
            for backend, kind in (("cuda", "matmul"), ("cudnn", "conv"), ("mkldnn", "matmul"), ("mkldnn", "conv"))
            if hasattr(torch.backends, "fp32_precision")
        },
    }.items():
        try:
            found[name] = say()
        except RuntimeError:  # older and newer settings disagree
            found[name] = "unknown"
    return found


def train_where_torch_may_round(folder, way):
    if way == "older":
        torch.set_float32_matmul_precision("medium")  # as Lightning advises on GPUs
    elif way == "newer":
        torch.backends.fp32_precision = "tf32"
    asked, seen = rounding(), []
    model = small_model()
    model.model.encoder.register_forward_pre_hook(lambda *_: seen.append(rounding()))  # the folded one has it, too
    datamodule = make_textures(Path(folder), train_good=30, test_good=3)
    engine = make_engine(Path(folder) / "run")
    engine.fit(model, datamodule=datamodule)
    trained = len(seen)
    engine.test(model, datamodule=datamodule, verbose=False)
    tested = len(seen)
    model.eval()(torch.rand(1, 3, 64, 64))
    assert 0 < trained < tested < len(seen)
    full = {"products": "highest", "convolutions": False}
    assert [{**dict.fromkeys(one, "ieee"), **full} for one in seen] == seen
    assert rounding() == asked
    assert way == "default" or asked["products"] != "highest"


@pytest.mark.parametrize("way", ["older", *(pytest.param(way, marks=pytest.mark.long) for way in ("default", "newer"))])
def test_no_score_hangs_on_how_torch_may_round(tmp_path, way):
    """Not even by default: on Nvidia's GPUs convolutions in single precision have 11 bits then."""
    if way == "newer" and not hasattr(torch.backends, "fp32_precision"):
        pytest.skip("torch before 2.9 has the older settings only")
    call_in_a_copy(train_where_torch_may_round, str(tmp_path), way)


# What held-out images pass through


def good_images(folder, count, sizes):
    folder.mkdir(parents=True)
    generator = np.random.default_rng(0)
    for number in range(count):
        image = Image.fromarray(generator.normal(128, 40, (24, 24, 3)).clip(0, 255).astype(np.uint8))
        image.resize(sizes[number % len(sizes)], Image.Resampling.BICUBIC).save(folder / f"{number:02}.png")
    return folder


@pytest.mark.parametrize("given", [False, True], ids=["held out", "given"])
def test_held_out_images_pass_through_what_new_ones_do(tmp_path, given):
    """Images of several sizes, a crop of the data module's, and a pre-processor of the user's own."""
    good = good_images(tmp_path / "good", 16, [(48, 40), (90, 64), (33, 50)])
    other = good_images(tmp_path / "other", 6, [(48, 40), (90, 64)])

    def data_of(train, test):
        return Folder(
            name="x", root=tmp_path, normal_dir=train, normal_test_dir=test, augmentations=CenterCrop(30),
            test_split_mode="from_dir", val_split_mode="none", num_workers=0, train_batch_size=8, eval_batch_size=1,
        )  # fmt: skip

    own = PreProcessor(Compose([Resize((64, 64), antialias=True), Normalize([0.5] * 3, [0.5] * 3)]))
    model = small_model(pre_processor=own, held_out_images=str(other) if given else None)
    train(tmp_path, data_of("good", "other"), "planned", model)
    files = model.reference.files
    assert {str(Path(file).parent) for file in files} == {str(other if given else good)}
    kept = Keep()
    engine = make_engine(tmp_path / "test", callbacks=[kept])
    engine.test(model, datamodule=data_of("good", "other") if given else data_of("other", "good"))
    scores = np.array([kept.scores[file] for file in files])
    np.testing.assert_allclose(np.sort(scores), model.post_processor.reference_scores.numpy(), rtol=0, atol=1e-6)
    if given:
        return
    # And so they do for a compressed file's thresholds and in a check, without the data module.
    file = model.eval().to_openvino(tmp_path, compression_type=CompressionType.FP16)
    checkpoint = next((tmp_path / "run").rglob("model.ckpt"))
    check(file, checkpoint, output=tmp_path / "check.json", precisions=("f32",))
    held = next(row for row in json.loads((tmp_path / "check.json").read_text())["file"] if "scores" in row["what"])
    assert "score what is stored" in held["detail"]


class Keep(Callback):
    """Scores before post-processing, which comes behind a user's callbacks."""

    def __init__(self):
        self.scores = {}

    def on_test_batch_end(self, trainer, pl_module, outputs, *_):
        self.scores |= scores_by_file([outputs])


# No thresholds


def test_without_defects_nothing_maximises_f1(tmp_path, caplog):
    data = make_textures(tmp_path, train_good=16, val_split_mode=ValSplitMode.FROM_TRAIN, val_split_ratio=0.4)
    model = small_model(target_false_alarm_rate="auto")
    [metrics] = make_engine(tmp_path / "run").train(model, datamodule=data)
    assert set(metrics) == {"image_AUROC", "pixel_AUROC", "pixel_AUPRO", "pixel_AUPRO_0.05"}
    assert "validation has shown 6 good and 0 anomalous images" in caplog.text
    assert not model.post_processor.decides
    with torch.no_grad():
        found = model.eval()(images_of([data.test_data[0].image_path]))
        own = model.model(model.pre_processor(images_of([data.test_data[0].image_path])))
    assert found.pred_label is None
    assert found.pred_mask is None
    assert torch.equal(found.pred_score, own.pred_score)


# The rate of score and mask together


@pytest.mark.parametrize("correlation", [0.0, 0.5, 0.9])
def test_score_and_mask_together_keep_the_rate(correlation):
    generator = np.random.default_rng(1)
    images, new, draws = 39, 20, 400
    alarms, shown = [], []
    for _ in range(draws):
        normal = generator.multivariate_normal([0, 0], [[1, correlation], [correlation, 1]], images + new)
        scores, maxima = torch.from_numpy(1 / (1 + np.exp(-normal.T)))
        post_processor = post_processor_for(scores[:images], maxima[:images], RATE)
        found = decide(post_processor, scores[images:], maxima[images:].reshape(-1, 1, 1, 1))
        mask = found.pred_mask.flatten()
        alarms.append(int((found.pred_label | mask).sum()))
        shown.append(int(mask.sum()))
        assert not (mask & ~found.pred_label).any()
    theory = betabinom(new, 8, 32)
    assert abs(np.mean(alarms) - theory.mean()) < 4 * theory.std() / draws**0.5
    assert np.mean(shown) <= theory.mean() + 4 * theory.std() / draws**0.5


# Files


def test_ranges_are_not_taken_from_what_thresholds_are(data):
    files = [data.train_data.samples.image_path[index] for index in (0, 3, 29)]
    images = TrainingImages(data, leave_out=[str(Path("elsewhere", *Path(file).parts[-3:])) for file in files])
    assert images.indices == [index for index in range(30) if index not in (0, 3, 29)]
    few = TrainingImages(data, limit=5, leave_out=files)
    assert len(few) == 5
    assert not {0, 3, 29} & set(few.indices)


def test_reference_images_are_found_again(tmp_path, data):
    model, _ = train(tmp_path, data, "planned")
    reference, count = model.reference, len(model.post_processor.reference_scores)
    files = list(reference.files)
    assert [Path(item.image_path).name for item in reference.find_again(None, count)] == [Path(f).name for f in files]
    reference.files = [str(Path("/gone", *Path(file).parts[-3:])) for file in files]  # the data were moved
    found = reference.find_again(data, count)
    assert [found[index].image_path for index in range(count)] == files
    with pytest.raises(CflowError, match=r"not at hand \(the first of them is /gone/.*--data"):
        reference.find_again(None, count)
    with pytest.raises(CflowError, match=r"6 good images.*--data"):
        model.to_openvino(tmp_path / "x", input_size=(64, 64), compression_type=CompressionType.FP16)


def test_a_resumed_run_does_not_hold_out_what_it_has_seen(tmp_path, data):
    make_engine(tmp_path / "cut", callbacks=[StopAfter(1)]).fit(small_model(), datamodule=data)
    last = next((tmp_path / "cut").rglob("last.ckpt"))
    good = tmp_path / "weave" / "train" / "good"
    shutil.copytree(data.root / "weave" / "train" / "good", good)
    (good / "000.png").rename(good / "100.png")
    other = Folder(name="x", root=tmp_path / "weave", normal_dir="train/good", normal_split_ratio=0.0, num_workers=0,
                   test_split_mode="none", val_split_mode="none")  # fmt: skip
    with pytest.raises(CflowError, match="split into training and other images in another way"):
        make_engine(tmp_path / "resumed").fit(small_model(), datamodule=other, ckpt_path=last)


def run(file, images):
    if file.suffix == ".onnx":
        session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
        names = [output.name for output in session.get_outputs()]
        return dict(zip(names, session.run(None, {"input": images.numpy()}), strict=True))
    return ov.Core().compile_model(file, "CPU", F32)(images.numpy())


@pytest.mark.long
@pytest.mark.parametrize("precision", ["32", "bf16-mixed"])
@pytest.mark.parametrize("ends", [("planned", "resumed"), ("early stop",), ("time",)], ids=str)
def test_one_decision_wherever_it_is_made(tmp_path, monkeypatch, data, ends, precision):
    # Where two ends leave the same checkpoint, each file stands for both.
    states = []
    for end in ends:
        trained, checkpoint = train(tmp_path / end, data, end, precision=precision)
        states.append(torch.load(checkpoint, weights_only=True)["state_dict"])
        assert_same_state(trained.state_dict(), states[-1])
    assert_same_state(states[0], states[-1])
    model = CflowPlugin.load_from_checkpoint(checkpoint, map_location="cpu").eval()
    held_out = images_of(model.reference.files)
    new = torch.stack([item.image for item in data.test_data if "good" in item.image_path])
    raw = tmp_path / "raw.xml"
    ov.save_model(convert_to_openvino(model, (64, 64)), raw, compress_to_fp16=False)
    monkeypatch.setattr(export_module, "convert_to_openvino", lambda *_: ov.Core().read_model(raw))
    files = {"onnx": (model.to_onnx(tmp_path, input_size=(64, 64), batch=None), 1e-5)}
    # What a file's thresholds were computed with gives the same to the last digits.
    for kind, tolerance in {None: 1e-5, CompressionType.FP16: 1e-6, CompressionType.INT8_PTQ: 1e-6}.items():
        settings = {"input_size": (64, 64), "compression_type": kind, "datamodule": data, "ov_kwargs": {"batch": None}}
        files[kind] = (model.to_openvino(tmp_path / str(kind), **settings), tolerance)
    references = {}
    for kind, (file, tolerance) in files.items():
        found, others = run(file, held_out), run(file, new)
        references[kind] = read_reference_scores(file)
        assert_kept(found["pred_score"], found["pred_label"], references[kind], tolerance)
        scores, maxima = (
            torch.from_numpy(np.concatenate([change(result) for result in (found, others)]))
            for change in (lambda result: result["pred_score"], lambda result: result["anomaly_map"].max((1, 2, 3)))
        )
        assert_rate(scores, maxima)
    with torch.no_grad():
        result = model(held_out)
    reference = model.post_processor.normalized_reference_scores.numpy()
    assert_kept(result.pred_score, result.pred_label, reference, 1e-6)
    # A quantised model's scores are others, and so are its thresholds.
    assert not np.allclose(references[CompressionType.INT8_PTQ], references[None], atol=1e-4)
