"""The reference is the original's model, put together here out of torchvision and FrEIA as its code does."""

import os
import pickle
import shutil
import zipfile
from pathlib import Path

import numpy as np
import openvino as ov
import pytest
import torch
import torchvision
from anomalib.data import PredictDataset
from FrEIA.framework import SequenceINN
from FrEIA.modules import AllInOneBlock
from PIL import Image
from torch import nn
from torch.utils.data import DataLoader

from cflow_plugin import CflowError, CflowPlugin
from cflow_plugin.commands.import_checkpoint import import_checkpoint
from cflow_plugin.deploy.graph import InferenceGraph

from .conftest import call_in_a_copy, make_engine, run_command

SIZE = (64, 96)
NAME = "mvtec_{}_freia-cflow_pl3_cb2_inp64_run0_screw_2022-01-01-00:00:00.pt"


def subnet(inputs, outputs):
    return nn.Sequential(nn.Linear(inputs, 2 * inputs), nn.ReLU(), nn.Linear(2 * inputs, outputs))


def positions(channels, height, width):
    """The original's encoding, written out: first the column's harmonics, then the row's."""
    half = channels // 2
    table = np.zeros((channels, height, width))
    for harmonic in range(half // 2):
        frequency = 10_000 ** (-2 * harmonic / half)
        for place, first in ((np.arange(width)[None], 0), (np.arange(height)[:, None], half)):
            table[first + 2 * harmonic] = np.sin(place * frequency)
            table[first + 2 * harmonic + 1] = np.cos(place * frequency)
    return torch.from_numpy(table)


class Original(nn.Module):
    """Encoder and decoders with random weights, and the log-likelihoods as the original's test loop computes them."""

    def __init__(self, name, scales=3, blocks=2, condition_dims=128, soft=True):
        super().__init__()
        torch.manual_seed(0)
        np.random.seed(0)
        network = getattr(torchvision.models, name)(weights=None)
        if name.startswith("mobilenet"):
            self.encoder = network.features
            hooked = [self.encoder[index].block[-1][0] for index in (6, 12, 15)]
            channels = [40, 112, 160]
        else:
            self.encoder = network
            del network.fc
            network.avgpool, network.fc = nn.Identity(), nn.Identity()
            for module in network.modules():
                if isinstance(module, nn.Conv2d) and module.kernel_size != (1, 1):
                    module.padding_mode = "reflect"
            hooked = [network.layer2, network.layer3, network.layer4]
            channels = [128, 256, 512] if name == "resnet18" else [512, 1024, 2048]
        self.features = {}
        for index, layer in enumerate(hooked[-scales:]):
            layer.register_forward_hook(lambda *call, index=index: self.features.update({index: call[-1]}))
        for module in self.encoder.modules():
            if isinstance(module, nn.BatchNorm2d):
                # Small variances tell epsilons apart; residual networks would blow up with them.
                nn.init.uniform_(module.running_var, 0.01 if name.startswith("mobilenet") else 1, 2)
                nn.init.normal_(module.running_mean, std=0.2)
        self.condition_dims = condition_dims
        self.decoders = nn.ModuleList()
        condition = {"cond": 0, "cond_shape": (condition_dims,)} if condition_dims else {}
        for dimensions in channels[-scales:]:
            decoder = SequenceINN(dimensions)
            for _ in range(blocks):
                decoder.append(
                    AllInOneBlock,
                    subnet_constructor=subnet,
                    affine_clamping=1.9,
                    global_affine_type="SOFTPLUS",
                    permute_soft=soft,
                    **condition,
                )
            self.decoders.append(decoder)
        with torch.no_grad():
            for weight_name, parameter in self.decoders.named_parameters():
                if "w_perm" not in weight_name:
                    parameter += 0.05 * torch.randn_like(parameter)
        self.eval()

    @torch.no_grad()
    def log_likelihoods(self, images):
        self.features.clear()
        self.encoder(images)
        result = []
        for index, decoder in enumerate(self.decoders):
            features = self.features[index]
            batch, dimensions, height, width = features.shape
            vectors = features.permute(0, 2, 3, 1).reshape(-1, dimensions)
            condition = []
            if self.condition_dims:
                table = positions(self.condition_dims, height, width).to(vectors)
                condition = [table.repeat(batch, 1, 1, 1).permute(0, 2, 3, 1).reshape(len(vectors), -1)]
            z, log_det = decoder(vectors, condition)
            normal = torch.distributions.Normal(torch.zeros((), dtype=z.dtype), 1.0)
            result.append(((normal.log_prob(z).sum(1) + log_det) / dimensions).reshape(batch, height, width))
        return result

    def content(self):
        return {
            "encoder_state_dict": self.encoder.state_dict(),
            "decoder_state_dict": [decoder.state_dict() for decoder in self.decoders],
        }


def imported(content, folder, encoder, name=None, **settings):
    path = folder / (name or NAME.format(encoder))
    torch.save(content, path)
    import_checkpoint(path, encoder, folder / "model.ckpt", **{"image_size": SIZE, **settings})
    return CflowPlugin.load_from_checkpoint(folder / "model.ckpt", map_location="cpu").eval()


def assert_equal(found, expected, tolerance):
    assert len(found) == len(expected)
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(torch.as_tensor(ours), theirs, rtol=0, atol=tolerance)


def in_openvino(model, images):
    class LogLikelihoods(nn.Module):
        def __init__(self):
            super().__init__()
            self.model = InferenceGraph(model, SIZE).model

        def forward(self, images):
            return tuple(self.model.log_likelihoods(images))

    converted = ov.convert_model(torch.export.export(LogLikelihoods(), (images,), strict=False))
    results = ov.compile_model(converted, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})(images.numpy())
    return [results[index] for index in range(len(results))]


def compare_log_likelihoods(folder, name, settings, exported):
    original = Original(name, **settings)
    model = imported(original.content(), Path(folder), name)
    images = torch.randn(2, 3, *SIZE)
    expected = original.log_likelihoods(images)
    assert all(values.std() > 1e-5 for values in expected)
    with torch.no_grad():
        assert_equal(model.model.train().log_likelihoods(images), expected, 1e-4)
        assert_equal(model.model.eval().log_likelihoods(images), expected, 1e-4)
    if exported:
        model.model.calibrate(expected)
        assert_equal(in_openvino(model, images), expected, 1e-4)
    # No constant hides behind the tolerance of float32.
    expected = original.double().log_likelihoods(images.double())
    with torch.no_grad():
        assert_equal(model.model.double().log_likelihoods(images.double()), expected, 2e-6)


@pytest.mark.parametrize(
    ("name", "settings", "exported"),
    [
        pytest.param("mobilenet_v3_large", {}, False, marks=pytest.mark.long),
        pytest.param("mobilenet_v3_large", {"soft": False, "scales": 1, "blocks": 3}, True, marks=pytest.mark.long),
        pytest.param(
            "mobilenet_v3_large", {"condition_dims": 0, "scales": 2, "blocks": 1}, False, marks=pytest.mark.long
        ),
        ("resnet18", {"soft": False, "scales": 1, "blocks": 1}, False),
    ],
)
def test_log_likelihoods(tmp_path, name, settings, exported):
    compare_log_likelihoods(tmp_path, name, settings, exported)


@pytest.mark.long
@pytest.mark.parametrize(
    ("name", "settings", "exported"),
    [
        ("resnet18", {"blocks": 1}, True),
        ("wide_resnet50_2", {"soft": False, "scales": 1, "blocks": 1}, False),
    ],
)
def test_log_likelihoods_of_the_largest(tmp_path, name, settings, exported):
    """In a process of its own: what it takes, gigabytes, would stay with this one."""
    call_in_a_copy(compare_log_likelihoods, str(tmp_path), name, settings, exported)


@pytest.fixture(scope="module")
def small():
    """A small checkpoint: one scale of MobileNetV3."""
    return Original("mobilenet_v3_large", scales=1, blocks=2)


@pytest.fixture
def good(tmp_path):
    """A folder of good images, of several sizes."""
    folder = tmp_path / "good images"
    (folder / "more").mkdir(parents=True)
    generator = np.random.default_rng(0)
    for index in range(5):
        pixels = generator.integers(0, 256, (60 + 10 * index, 80, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / ("more" if index > 2 else "") / f"{index}.png")
    return folder


@pytest.mark.long
def test_scores_after_calibration(small, tmp_path, good):
    model = imported(small.content(), tmp_path, "mobilenet_v3_large", images=good)
    images = [image.image for image in PredictDataset(good)]
    pixels = [model.pre_processor(image[None]) for image in images]
    likelihoods = torch.cat([small.log_likelihoods(image)[0] for image in pixels])
    # The original's probabilities, with the training images' upper quantile in place of the test set's maximum.
    probability = torch.exp(likelihoods - torch.quantile(likelihoods.flatten(), 0.999)).clamp(max=1)
    maps = 1 - nn.functional.interpolate(probability[:, None], SIZE, mode="bilinear", align_corners=True)
    with torch.no_grad():
        raw = [model.model(image) for image in pixels]
        found = [model(image[None]) for image in images]
    torch.testing.assert_close(torch.cat([result.anomaly_map for result in raw]), maps, rtol=0, atol=1e-4)
    scores = torch.cat([result.pred_score for result in raw])
    torch.testing.assert_close(scores, maps.amax((1, 2, 3)), rtol=0, atol=1e-4)
    # Images that it was trained on set no threshold.
    assert all(result.pred_label is None and result.pred_mask is None for result in found)


@pytest.mark.long
def test_thresholds_come_from_images_that_were_not_trained_on(small, tmp_path, good):
    other = tmp_path / "held out"
    shutil.copytree(good / "more", other)
    given = imported(
        small.content(), tmp_path, "mobilenet_v3_large", images=good, held_out_images=other, target_false_alarm_rate=0.4
    )
    part = imported(small.content(), tmp_path, "mobilenet_v3_large", images=good, target_false_alarm_rate=0.34)
    for model, rank in ((given, 2), (part, 2)):
        assert len(model.reference.files) == 2
        images = [PredictDataset(file)[0].image[None] for file in model.reference.files]
        with torch.no_grad():
            scores = torch.cat([model.model(model.pre_processor(image)).pred_score for image in images])
        torch.testing.assert_close(model.post_processor.reference_scores, scores.sort().values)
        assert model.post_processor.image_threshold == model.post_processor.reference_scores[rank - 1]
    assert {Path(file).parent for file in given.reference.files} == {other}
    for settings, words in (
        ({"images": good, "held_out_images": other}, r"0\.05 needs at least 19 good images.*there are 2"),
        ({"images": good, "target_false_alarm_rate": 0.05}, "needs 19 good images held out"),
        ({"images": None, "held_out_images": other}, "--images: name a folder"),
    ):
        with pytest.raises(CflowError, match=words):
            imported(small.content(), tmp_path, "mobilenet_v3_large", **settings)


def test_without_images_it_does_not_score(small, tmp_path):
    model = imported(small.content(), tmp_path, "mobilenet_v3_large")
    with pytest.raises(CflowError, match="import-checkpoint --images"):
        model(torch.rand(1, 3, *SIZE))


@pytest.mark.parametrize(
    ("name", "size", "mean"),
    [
        pytest.param(
            NAME.format("mobilenet_v3_large").replace("inp64", "inp96"), (96, 96), 0.485, marks=pytest.mark.long
        ),
        pytest.param(
            "stc_mobilenet_v3_large_freia-cflow_pl1_cb2_inp64_run0_01.pt", (64, 64), 0.5, marks=pytest.mark.long
        ),
        pytest.param("renamed.pt", (256, 256), 0.485, marks=pytest.mark.long),
    ],
)
def test_what_the_file_s_name_says(small, tmp_path, name, size, mean):
    model = imported(small.content(), tmp_path, "mobilenet_v3_large", name, image_size=None)
    assert model.input_size == size
    resized, normalised = model.pre_processor.transform.transforms
    assert tuple(resized.size) == size
    assert normalised.mean[0] == mean


@pytest.mark.long
def test_a_default_model_becomes_the_imported_one(small, tmp_path, good, textures):
    """Nothing of the checkpoint's settings has to be repeated to use it."""
    expected = imported(small.content(), tmp_path, "mobilenet_v3_large", images=good, target_false_alarm_rate=0.4)
    loader = DataLoader(PredictDataset(good), batch_size=1, collate_fn=PredictDataset(good).collate_fn)
    engine = make_engine(tmp_path)
    found = engine.predict(CflowPlugin(pre_trained=False), dataloaders=loader, ckpt_path=tmp_path / "model.ckpt")
    for batch, image in zip(found, PredictDataset(good), strict=True):
        with torch.no_grad():
            alone = expected(image.image[None])
        torch.testing.assert_close(batch.anomaly_map, alone.anomaly_map[:, 0])
        assert torch.equal(batch.pred_label, alone.pred_label)

    model = CflowPlugin(pre_trained=False)
    [metrics] = make_engine(tmp_path).test(model, datamodule=textures, ckpt_path=tmp_path / "model.ckpt", verbose=False)
    assert "image_AUROC" in metrics
    assert model.hparams["backbone"] == "mobilenetv3_large_100"
    assert model.hparams["padding"] == "zeros"
    # The data module, too, resizes images to the size of the checkpoint's model.
    assert textures.test_data[0].image.shape[-2:] == SIZE


class Hostile:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def spoil(content, how):
    encoder, decoders = {"0.0.weight": torch.zeros(16, 3, 3, 3)}, [dict(part) for part in content["decoder_state_dict"]]
    block = "module_list.1."
    if how == "other decoders":
        decoders = decoders * 4
    elif how == "no decoders":
        decoders = []
    elif how == "a missing weight":
        del decoders[0][block + "subnet.2.bias"]
    elif how == "a strange weight":
        decoders[0]["mean"] = torch.zeros(3)
    elif how == "a strange part of a block":
        decoders[0][block + "vk_householder"] = torch.zeros(3)
    elif how == "a missing block":
        decoders[0] = {name.replace("list.1", "list.2"): tensor for name, tensor in decoders[0].items()}
    elif how == "NaN":
        decoders[0][block + "subnet.0.bias"] = torch.full((416,), float("nan"))
    elif how == "no rotation":
        decoders[0][block + "w_perm"] = 1.1 * decoders[0][block + "w_perm"]
    elif how == "numbers":
        decoders[0] = {"module_list.0.global_scale": 3}
    return {"encoder_state_dict": encoder, "decoder_state_dict": decoders}


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("other decoders", "holds 4 decoders"),
        ("no decoders", "holds 0 decoders"),
        ("a missing weight", "Coupling block 1 of decoder 1 .* differs in subnet.2.bias"),
        ("a strange weight", "a weight mean"),
        ("a strange part of a block", "differs in vk_householder"),
        ("a missing block", "differs in its number"),
        ("NaN", "NaN or infinite values in module_list.1.subnet.0.bias"),
        ("no rotation", "not an orthogonal matrix"),
        ("numbers", "not a checkpoint of the original"),
        ("nothing", "The encoder of .* lacks"),
    ],
)
def test_damaged_contents(small, tmp_path, how, message):
    with pytest.raises(CflowError, match=message):
        imported(spoil(small.content(), how), tmp_path, "mobilenet_v3_large")
    assert not (tmp_path / "model.ckpt").exists()


def test_weights_that_do_not_fit_together(small, tmp_path):
    content = small.content()
    content["decoder_state_dict"][0] |= {"module_list.1.subnet.2.bias": torch.zeros(3)}
    with pytest.raises(CflowError, match=r"block 1 of decoder 1 .* do not fit together"):
        imported(content, tmp_path, "mobilenet_v3_large")


@pytest.mark.parametrize("encoder", ["resnet18", "wide_resnet50_2"])
def test_another_encoder(small, tmp_path, encoder):
    with pytest.raises(CflowError, match=r"features of 160 channels.*Pass --encoder mobilenet_v3_large"):
        imported(small.content(), tmp_path, encoder)


def test_the_weights_of_another_encoder(small, tmp_path):
    content = small.content() | {"encoder_state_dict": torchvision.models.resnet18().state_dict()}
    with pytest.raises(CflowError, match=r"lacks conv_stem\.weight"):
        imported(content, tmp_path, "mobilenet_v3_large")


def test_files_that_are_no_checkpoints(small, tmp_path):
    whole = tmp_path / "whole.pt"
    torch.save(small.content(), whole)
    (tmp_path / "cut off.pt").write_bytes(whole.read_bytes()[:-1000])
    (tmp_path / "random.pt").write_bytes(os.urandom(1000))
    torch.save({"state_dict": {"weight": torch.zeros(3)}}, tmp_path / "something else.pt")
    torch.save(torch.zeros(3), tmp_path / "a tensor.pt")
    with zipfile.ZipFile(tmp_path / "an archive.pt", "w") as archive:
        archive.writestr("a/text", "text")
    mark = tmp_path / "it was run"
    torch.save(small.content() | {"more": Hostile(mark)}, tmp_path / "hostile.pt")
    (tmp_path / "hostile pickle.pt").write_bytes(pickle.dumps(Hostile(mark)))
    for name, message in {
        "absent.pt": "There is no checkpoint",
        "cut off.pt": "is no checkpoint, or is cut off",
        "random.pt": "is no checkpoint",
        "an archive.pt": "could not be read as a checkpoint",
        "something else.pt": "it holds state_dict in place of",
        "a tensor.pt": "it is a Tensor in place of",
        "hostile.pt": "other than tensors",
        "hostile pickle.pt": "is no checkpoint",
    }.items():
        with pytest.raises(CflowError, match=message) as caught:
            import_checkpoint(tmp_path / name, "mobilenet_v3_large", tmp_path / "model.ckpt")
        assert str(tmp_path / name) in str(caught.value)
    assert not mark.exists()
    assert not (tmp_path / "model.ckpt").exists()


@pytest.mark.long
def test_images_and_output_that_cannot_be_used(small, tmp_path, good):
    content, kept = small.content(), tmp_path / "model.ckpt"
    kept.write_bytes(b"an older one")
    (tmp_path / "empty").mkdir()
    (tmp_path / "damaged").mkdir()
    (tmp_path / "damaged/0.png").write_bytes(b"no image")
    wrong = {"absent": "no folder", "empty": "no image in", "damaged": r"0\.png cannot be used as an image"}
    for folder, message in wrong.items():
        with pytest.raises(CflowError, match=message):
            imported(content, tmp_path, "mobilenet_v3_large", images=tmp_path / folder)
    path = tmp_path / NAME.format("mobilenet_v3_large")
    for output in (tmp_path / "absent/model.ckpt", tmp_path / "empty"):
        with pytest.raises(CflowError, match="choose another --output"):
            import_checkpoint(path, "mobilenet_v3_large", output)
    assert kept.read_bytes() == b"an older one"
    imported(content, tmp_path, "mobilenet_v3_large", images=good)
    assert {file.name for file in tmp_path.iterdir() if file.is_file()} == {path.name, kept.name}


@pytest.mark.long
def test_the_command(small, tmp_path, good):
    torch.save(small.content(), tmp_path / "original.pt")
    command = ["cflow-plugin", "import-checkpoint"]
    rest = ["--encoder", "mobilenet_v3_large", "--images", good, "--image_size", "[64, 96]"]
    run_command(*command, "original.pt", *rest, "--output", "first.ckpt", cwd=tmp_path)
    out = run_command(*command, *rest, "--checkpoint", "original.pt", cwd=tmp_path)
    assert "model.ckpt: mobilenet_v3_large of 1 scales" in out
    first, second = (torch.load(tmp_path / name, weights_only=True) for name in ("first.ckpt", "model.ckpt"))
    for key, value in first["state_dict"].items():
        torch.testing.assert_close(second["state_dict"][key], value, rtol=0, atol=0, equal_nan=True)

    use = ["--model", "CflowPlugin", "--model.pre_trained", "false", "--ckpt_path", "model.ckpt"]
    out = run_command("anomalib", "predict", *use, "--data", good, "--trainer.accelerator", "cpu", cwd=tmp_path)
    assert "The checkpoint was made with" in out
    assert len(list((tmp_path / "results").rglob("*.png"))) == 5
    run_command(
        "anomalib", "export", *use, "--export_type", "openvino", "--export_root", "exported", cwd=tmp_path,
    )  # fmt: skip
    compiled = ov.Core().compile_model(
        tmp_path / "exported/weights/openvino/model.xml", "CPU", {"INFERENCE_PRECISION_HINT": "f32"}
    )
    model = CflowPlugin.load_from_checkpoint(tmp_path / "model.ckpt", map_location="cpu").eval()
    for item in PredictDataset(good):
        results = compiled(item.image[None].numpy())
        with torch.no_grad():
            expected = model(item.image[None])
        np.testing.assert_allclose(results["anomaly_map"], expected.anomaly_map.numpy(), atol=1e-4)

    out = run_command(*command, "absent.pt", "--encoder", "resnet18", cwd=tmp_path, expect=1)
    assert out.strip().splitlines()[-1] == "error: There is no checkpoint at absent.pt."
