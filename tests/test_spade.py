import json
import logging

import numpy as np
import pytest
import torch
import yaml
from anomalib.data import MVTecAD
from anomalib.deploy import TorchInferencer
from anomalib.metrics import AUROC, Evaluator
from lightning import seed_everything
from lightning.pytorch.callbacks import Callback
from PIL import Image
from scipy.ndimage import gaussian_filter
from sklearn.metrics import roc_auc_score
from torch.nn import functional
from torch.utils.data import DataLoader

from cflow_plugin import CflowError, Spade
from cflow_plugin.baselines.spade import gallery as gallery_module
from cflow_plugin.baselines.spade.gallery import Gallery
from cflow_plugin.baselines.spade.torch_model import SpadeModel

from .conftest import SHARED, make_engine, make_textures, run_command

SMALL = {"backbone": "gabor", "layers": ["scale1", "scale2"], "image_layer": "scale3", "image_size": (64, 64)}
UNTRAINED = {"backbone": "resnet18", "layers": ["layer1", "layer2", "layer3"], "image_layer": "layer3"}
CHANNELS = (3, 5, 4)


def pyramid(images, sizes, seed, channels=CHANNELS):
    generator = torch.Generator().manual_seed(seed)
    return [
        torch.randn(images, depth, *size, generator=generator) for depth, size in zip(channels, sizes, strict=False)
    ]


def filled(parts, half_precision=False):
    gallery = Gallery(len(parts), half_precision)
    pooled = parts[-1].mean((2, 3))
    for half in (slice(0, 4), slice(4, None)):
        gallery.add(pooled[half], [part[half] for part in parts])
    gallery.finish()
    return gallery


def concatenated(parts, image):
    """An image's vectors at the finest resolution, in float64, made the slow way."""
    result = None
    for part in reversed([np.asarray(part[image], dtype=np.float64) for part in parts]):
        if result is not None:
            rows, columns = (
                [int(np.floor(index * few / many + 1e-9)) for index in range(many)]
                for many, few in zip(part.shape[1:], result.shape[1:], strict=True)
            )
            part = np.concatenate([part, result[:, rows][:, :, columns]])
        result = part
    return result.reshape(len(result), -1).T


def brute_force(queries, others, neighbours, count):
    """Mean distance of each position to the nearest among all positions of the neighbours."""
    among = np.concatenate([concatenated(others, image) for image in neighbours])
    distances = np.stack([np.sqrt(((among - vector) ** 2).sum(1)) for vector in queries])
    return np.sort(distances, axis=1)[:, :count]


def found_by(gallery, parts, image, neighbours, count):
    vectors = [part[image].flatten(1).T for part in parts]
    return gallery.nearest_positions(vectors, [part.shape[-2:] for part in parts], neighbours, count)


@pytest.fixture(scope="module")
def spade(textures, tmp_path_factory):
    """A trained model; not to be changed."""
    model = Spade(**SMALL, k=3)
    make_engine(tmp_path_factory.mktemp("spade")).fit(model, datamodule=textures)
    return model.eval()


def features_of(model, dataset):
    loader = DataLoader(dataset, batch_size=5, collate_fn=dataset.collate_fn)
    with torch.no_grad():
        batches = [model.model.features(model.pre_processor(batch.image)) for batch in loader]
    pooled, parts = zip(*batches, strict=True)
    return torch.cat(pooled), [torch.cat(part) for part in zip(*parts, strict=True)]


def expected_of(model, textures, kappa=1):
    """Image distances, smoothed maps of distances and neighbours of the test images, by brute force in float64."""
    train, train_parts = features_of(model, textures.train_data)
    test, test_parts = features_of(model, textures.test_data)
    pairs = np.sqrt(((test.double().numpy()[:, None] - train.double().numpy()) ** 2).sum(2))
    neighbours = np.argsort(pairs, axis=1)[:, : model.model.k]
    cells = [
        brute_force(concatenated(test_parts, index), train_parts, neighbours[index], kappa).mean(1)
        for index in range(len(test))
    ]
    size = test_parts[0].shape[-2:]
    cells = torch.from_numpy(np.stack(cells)).unflatten(1, size)
    maps = functional.interpolate(cells[:, None], (64, 64), mode="bilinear")[:, 0].numpy()
    smooth = np.stack([gaussian_filter(values, 4, mode="mirror", truncate=4) for values in maps])
    return np.sort(pairs, axis=1)[:, : model.model.k].mean(1), smooth, cells.numpy()


def images_of(textures):
    return torch.stack([item.image for item in textures.test_data])


# The gallery, on random features


@pytest.mark.parametrize("count", [1, 4])
@pytest.mark.parametrize(
    "sizes",
    [[(8, 8), (4, 4), (2, 2)], [(9, 7), (4, 3), (3, 2)], [(8, 6), (8, 6), (3, 3)], [(6, 5), (3, 5)], [(5, 4)]],
    ids=str,
)
def test_nearest_positions_against_brute_force(sizes, count):
    others, queries = pyramid(7, sizes, seed=0), pyramid(2, sizes, seed=1)
    gallery = filled(others)
    for image, neighbours in ((0, [3, 0, 6]), (1, [5])):
        expected = brute_force(concatenated(queries, image), others, neighbours, count)
        found = found_by(gallery, queries, image, neighbours, count)
        np.testing.assert_allclose(found.numpy(), expected, rtol=1e-5, atol=1e-5)


def test_an_image_of_another_size_than_the_gallery_s():
    others, queries = pyramid(5, [(8, 8), (4, 4)], seed=0), pyramid(1, [(10, 6), (5, 3)], seed=1)
    expected = brute_force(concatenated(queries, 0), others, [4, 2], 2)
    np.testing.assert_allclose(found_by(filled(others), queries, 0, [4, 2], 2).numpy(), expected, rtol=1e-5)


def test_nearest_images_against_brute_force():
    others, queries = torch.randn(30, 40) + 100, torch.randn(4, 40) + 100
    gallery = filled([others[:, :, None, None]])
    distances, indices = gallery.nearest_images(queries, 6)
    pairs = np.sqrt(((queries.double().numpy()[:, None] - others.double().numpy()) ** 2).sum(2))
    assert np.array_equal(indices.numpy(), np.argsort(pairs, axis=1)[:, :6])
    np.testing.assert_allclose(distances.numpy(), np.sort(pairs, axis=1)[:, :6], rtol=1e-5)


def test_an_image_of_the_gallery_is_at_no_distance():
    others = [part + 50 for part in pyramid(5, [(8, 8), (4, 4)], seed=0)]
    found = found_by(filled(others), others, 2, [0, 2], 1)
    norm = np.linalg.norm(concatenated(others, 2), axis=1).max()
    # A distance is the root of what rounding leaves of the norms' squares.
    assert (found >= 0).all()
    assert found.max() < norm * np.sqrt(8 * np.finfo(np.float32).eps)


def test_more_neighbours_than_there_are():
    others, queries = pyramid(2, [(2, 2)], seed=0), pyramid(1, [(2, 2)], seed=1)
    gallery = filled(others)
    found = found_by(gallery, queries, 0, [0, 1], 100)
    np.testing.assert_allclose(found, brute_force(concatenated(queries, 0), others, [0, 1], 100), rtol=1e-5)
    assert found.shape == (4, 8)
    assert gallery.nearest_images(torch.randn(3, CHANNELS[0]), 50)[0].shape == (3, 2)


@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize("values", [1, 700, 10**9])
def test_chunks_change_nothing(monkeypatch, values, count):
    sizes = [(9, 7), (4, 3), (3, 2)]
    others, queries = pyramid(6, sizes, seed=0), pyramid(1, sizes, seed=1)
    expected = found_by(filled(others), queries, 0, [1, 2, 5], count)
    monkeypatch.setattr(gallery_module, "_CHUNK_VALUES", values)
    torch.testing.assert_close(found_by(filled(others), queries, 0, [1, 2, 5], count), expected, rtol=1e-5, atol=1e-6)


def test_half_precision_s_error_is_bounded():
    sizes = [(8, 8), (4, 4), (2, 2)]
    others, queries = pyramid(6, sizes, seed=0), pyramid(1, sizes, seed=1)
    full, half = filled(others), filled(others, half_precision=True)
    # Rounding moves a vector by at most 2^-11 of its length, and a distance by no more than the vector.
    bound = 2**-11 * max(np.linalg.norm(concatenated(others, image), axis=1).max() for image in range(6))
    difference = (found_by(full, queries, 0, range(6), 1) - found_by(half, queries, 0, range(6), 1)).abs().max()
    assert 0 < difference < bound
    assert half.scale_0.dtype == torch.float16
    assert half.megabytes < 0.55 * full.megabytes
    torch.testing.assert_close(half.pooled, full.pooled, rtol=0, atol=0)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e6])
def test_features_that_cannot_be_kept_are_refused(value):
    parts = pyramid(4, [(2, 2)], seed=0)
    parts[0][1, 0, 0, 0] = value
    with pytest.raises(CflowError, match="half_precision" if np.isfinite(value) else "NaN or infinite"):
        filled(parts, half_precision=True)


# The model


@pytest.mark.parametrize(
    ("settings", "kappa"),
    [(SMALL, 1), (SMALL, 5), pytest.param(UNTRAINED, 5, marks=pytest.mark.long)],
    ids=["gabor-1", "gabor-5", "untrained CNN-5"],
)
def test_the_whole_model_against_brute_force(textures, tmp_path, settings, kappa):
    seed_everything(0)
    model = Spade(**{**settings, "image_size": (64, 64)}, k=3, kappa=kappa, pre_trained=False)
    make_engine(tmp_path, limit_val_batches=0).fit(model, datamodule=textures)
    model.eval()
    scores, maps, cells = expected_of(model, textures, kappa)
    images = model.pre_processor(images_of(textures))
    found_scores, found_cells = model.model.distances(images)
    np.testing.assert_allclose(found_scores.numpy(), scores, rtol=1e-4)
    np.testing.assert_allclose(found_cells.numpy(), cells, rtol=1e-3, atol=1e-3)
    result = model.model(images)
    scale = model.model.pixel_scale.item()
    np.testing.assert_allclose(result.anomaly_map[:, 0].numpy(), maps / (maps + scale), atol=1e-3)
    scale = model.model.image_scale.item()
    np.testing.assert_allclose(result.pred_score.numpy(), scores / (scores + scale), atol=1e-4)


def test_scores_do_not_depend_on_the_batch(spade, textures):
    images = images_of(textures)[:6]
    together = spade(images)
    for index in range(6):
        alone = spade(images[index : index + 1])
        torch.testing.assert_close(alone.pred_score, together.pred_score[index : index + 1], rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(alone.anomaly_map, together.anomaly_map[index : index + 1], rtol=1e-5, atol=1e-5)


def test_scales_are_medians_of_training_images_distances(spade, textures):
    pooled, _ = features_of(spade, textures.train_data)
    pairs = np.sqrt(((pooled.double().numpy()[:, None] - pooled.double().numpy()) ** 2).sum(2))
    expected = np.median(np.sort(pairs, axis=1)[:, 1:4].mean(1))
    assert spade.model.image_scale.item() == pytest.approx(expected, rel=0.1)
    _, cells = spade.model.distances(spade.pre_processor(images_of(textures)))
    assert 0.1 < spade.model.pixel_scale / cells.median() < 10


# Validation has anomalib clamp scores to the range it saw, which makes ties of what lies far beyond.
@pytest.mark.parametrize(("validation", "contrast"), [(True, 100), pytest.param(False, 3000, marks=pytest.mark.long)])
def test_metrics_equal_scikit_learn_s_on_raw_distances(textures, tmp_path, validation, contrast):
    """torchmetrics would take distances above one for logits, and saturate them where validation has not run."""
    theirs = [
        AUROC(fields=["pred_score", "gt_label"], prefix="image_"),
        AUROC(fields=["anomaly_map", "gt_mask"], prefix="pixel_"),
    ]
    model = Spade(**SMALL, k=3, evaluator=validation or Evaluator(test_metrics=theirs))
    model.model.encoder.network.colours.mul_(contrast)
    engine = make_engine(tmp_path, **({} if validation else {"limit_val_batches": 0}))
    [metrics] = engine.train(model, datamodule=textures)
    scores, maps, _ = expected_of(model, textures)
    # A sigmoid of them would be one, to the last digit of float32.
    assert validation or min(scores.min(), maps.min()) > 20
    labels = [bool(item.gt_label) for item in textures.test_data]
    masks = np.stack([np.asarray(item.gt_mask) for item in textures.test_data]).ravel()
    assert metrics["image_AUROC"] == pytest.approx(roc_auc_score(labels, scores), abs=1e-6)
    assert metrics["pixel_AUROC"] == pytest.approx(roc_auc_score(masks, maps.ravel()), abs=1e-4)
    written = json.loads(next(tmp_path.rglob("metrics.json")).read_text())
    assert written["pixel_AUROC"] == pytest.approx(metrics["pixel_AUROC"], abs=1e-6)


@pytest.mark.long
@pytest.mark.parametrize("half_precision", [False, True])
def test_a_checkpoint_brings_the_gallery_with_it(textures, tmp_path, half_precision):
    model = Spade(**{**UNTRAINED, "image_size": (64, 64)}, pre_trained=False, half_precision=half_precision, k=2)
    engine = make_engine(tmp_path)
    engine.fit(model, datamodule=textures)
    engine.trainer.save_checkpoint(tmp_path / "model.ckpt")
    restored = Spade.load_from_checkpoint(tmp_path / "model.ckpt", map_location="cpu", weights_only=True).eval()
    for name, value in model.state_dict().items():
        torch.testing.assert_close(restored.state_dict()[name], value, rtol=0, atol=0)
    assert restored.model.gallery.scale_0.dtype == (torch.float16 if half_precision else torch.float32)
    images = images_of(textures)
    torch.testing.assert_close(restored(images), model.eval()(images), rtol=0, atol=0)


def test_training_again_replaces_the_gallery(textures, tmp_path):
    model = Spade(**SMALL, k=3)
    for folder in ("first", "second"):
        make_engine(tmp_path / folder, limit_val_batches=0).fit(model, datamodule=textures)
        assert len(model.model.gallery) == len(textures.train_data)


def test_fewer_images_than_k_are_all_used(textures, tmp_path, caplog):
    model = Spade(**SMALL)
    with caplog.at_level(logging.WARNING):
        make_engine(tmp_path).fit(model, datamodule=textures)
    assert "There are 12 training images, fewer than k = 50: all are used." in caplog.messages
    pooled, _ = features_of(model, textures.train_data)
    test, _ = features_of(model, textures.test_data)
    pairs = np.sqrt(((test.double().numpy()[:, None] - pooled.double().numpy()) ** 2).sum(2))
    found, _ = model.model.distances(model.pre_processor(images_of(textures)))
    np.testing.assert_allclose(found.numpy(), pairs.mean(1), rtol=1e-4)


def test_one_training_image(textures, tmp_path):
    model = Spade(**SMALL)
    data = make_textures(textures.root, train_batch_size=1)
    make_engine(tmp_path, limit_train_batches=1).fit(model, datamodule=data)
    result = model.eval()(images_of(textures))
    assert len(model.model.gallery) == 1
    assert ((result.anomaly_map >= 0) & (result.anomaly_map <= 1)).all()
    assert len(result.pred_score.unique()) > 1


@pytest.mark.long
def test_mixed_precision_is_kept_out_of_distances(textures, tmp_path):
    maps = []
    for precision in ("32", "bf16-mixed"):
        model = Spade(**SMALL, k=3)
        engine = make_engine(tmp_path / precision, precision=precision, limit_val_batches=0)
        engine.fit(model, datamodule=textures)
        assert model.model.gallery.scale_0.dtype == torch.float32
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=precision != "32"):
            maps.append(model.eval().model.distances(model.pre_processor(images_of(textures)))[1])
    # The encoder's own rounding remains.
    assert np.corrcoef(maps[0].flatten(), maps[1].flatten())[0, 1] > 0.98


def test_torch_export(spade, textures, tmp_path, monkeypatch):
    monkeypatch.setenv("TRUST_REMOTE_CODE", "1")
    generator = torch.Generator().manual_seed(0)
    picture = (torch.rand(90, 70, 3, generator=generator).numpy() * 255).astype(np.uint8)
    Image.fromarray(picture).save(tmp_path / "picture.png")
    inferencer = TorchInferencer(spade.to_torch(tmp_path), "cpu")
    prediction = inferencer.predict(tmp_path / "picture.png")
    expected = spade(torch.from_numpy(picture).permute(2, 0, 1)[None] / 255)
    for name in ("anomaly_map", "pred_score", "pred_label", "pred_mask"):
        found = torch.as_tensor(getattr(prediction, name)).squeeze()
        torch.testing.assert_close(found, getattr(expected, name).squeeze(), rtol=0, atol=1e-6, msg=name)


@pytest.mark.parametrize("kind", ["onnx", "openvino"])
def test_graphs_are_refused(spade, tmp_path, kind):
    with pytest.raises(CflowError, match=r"gallery of training features.*--export_type torch"):
        getattr(spade, f"to_{kind}")(tmp_path, input_size=(64, 64))
    assert not list(tmp_path.iterdir())


def test_an_untrained_model_says_so():
    with pytest.raises(CflowError, match="not been trained"):
        Spade(**SMALL).eval()(torch.rand(1, 3, 64, 64))


@pytest.mark.parametrize("setting", [{"k": 0}, {"kappa": 0}, {"sigma": -1.0}, {"layers": []}], ids=str)
def test_impossible_settings_are_refused(setting):
    with pytest.raises(CflowError, match=next(iter(setting))):
        SpadeModel(**{**{"backbone": "gabor", "layers": ["scale1"], "image_layer": "scale2"}, **setting})


# As a user meets it


@pytest.mark.long
def test_the_command_line(tmp_path):
    model = ["--model", "Spade", "--model.backbone", "gabor", "--model.layers", "[scale1, scale2]"]
    model += ["--model.image_layer", "scale3", "--model.image_size", "[64, 64]", "--model.half_precision", "true"]
    data = ["--data", "Textures", "--data.resolution", "64", "--data.train_good", "6", "--data.test_good", "2"]
    data += ["--data.test_defect", "1", "--data.val_good", "2", "--data.val_defect", "1"]
    cpu = ["--trainer.accelerator", "cpu"]
    out = run_command("anomalib", "train", *model, *data, *cpu, cwd=tmp_path)
    assert "fewer than k = 50" in out
    results = tmp_path / "results/Spade/Textures/weave/latest"
    assert "pixel_AUPRO" in json.loads((results / "metrics.json").read_text())
    checkpoint = ["--ckpt_path", results / "weights/lightning/model.ckpt"]
    images = tmp_path / "datasets/Textures/weave/train/good"
    before = set((tmp_path / "results").rglob("*.png"))
    run_command("anomalib", "predict", *model, *cpu, "--data", images, *checkpoint, cwd=tmp_path)
    assert len(set((tmp_path / "results").rglob("*.png")) - before) == 6
    export = ["anomalib", "export", *model, *checkpoint, "--export_root", "exported", "--export_type"]
    run_command(*export, "torch", cwd=tmp_path)
    assert (tmp_path / "exported/weights/torch/model.pt").is_file()
    out = run_command(*export, "openvino", "--input_size", "[64, 64]", cwd=tmp_path, expect=1)
    assert out.strip().splitlines()[-1].startswith("error: Spade is not exported to OpenVINO")


@pytest.mark.long
def test_anomalib_s_benchmark(tmp_path):
    data = {"class_path": "Textures", "init_args": {"resolution": 64, "train_good": 6, "test_good": 4}}
    model = {"class_path": "Spade", "init_args": {**SMALL, "image_size": [64, 64]}}
    config = {"accelerator": ["cpu"], "benchmark": {"seed": 0, "model": model, "data": data}}
    (tmp_path / "benchmark.yaml").write_text(yaml.safe_dump(config))
    run_command("anomalib", "benchmark", "--config", "benchmark.yaml", cwd=tmp_path)
    [table] = tmp_path.rglob("*.csv")
    assert "Spade" in table.read_text()


@pytest.mark.long
@pytest.mark.shared
def test_real_images_with_real_weights(tmp_path):
    weights = str(SHARED / "weights" / "resnet18.tv_in1k-layer1-3.safetensors")
    model = Spade(backbone="resnet18", image_layer="layer3", weights=weights, image_size=(128, 128))
    data = MVTecAD(root=SHARED / "data", category="cookies", num_workers=0)
    labels, scores, masks, maps = [], [], [], []

    class Collect(Callback):
        def on_test_batch_end(self, trainer, pl_module, outputs, *_):
            labels.append(outputs.gt_label)
            scores.append(outputs.pred_score)
            masks.append(outputs.gt_mask.flatten())
            maps.append(outputs.anomaly_map.flatten())

    [metrics] = make_engine(tmp_path, limit_val_batches=0, callbacks=[Collect()]).train(model, datamodule=data)
    image = roc_auc_score(torch.cat(labels), torch.cat(scores))
    pixel = roc_auc_score(torch.cat(masks), torch.cat(maps))
    assert metrics["image_AUROC"] == pytest.approx(image, abs=1e-6)
    assert metrics["pixel_AUROC"] == pytest.approx(pixel, abs=1e-4)
    assert image > 0.8
    assert pixel > 0.8
