import pytest
import torch
from safetensors.torch import save_file
from timm import create_model

from cflow_plugin.errors import CflowError
from cflow_plugin.model.backbones import BACKBONES
from cflow_plugin.model.encoder import Encoder
from cflow_plugin.model.weights import load_file

from .conftest import SHARED, run_command

NAMES = [*BACKBONES, "gabor"]


@pytest.fixture(scope="module")
def resnet():
    """An untrained ResNet-18 and its weights."""
    torch.manual_seed(0)
    return create_model("resnet18").eval()


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.long] * (name == "wide_resnet50_2")) for name in BACKBONES]
)
def test_the_paper_s_layers(name):
    backbone, encoder = BACKBONES[name], Encoder(name)
    assert encoder.channels == list(backbone.channels)
    pyramid = encoder(torch.zeros(2, 3, 128, 64))
    expected = [(2, d, 128 // s, 64 // s) for d, s in zip(backbone.channels, backbone.strides, strict=True)]
    assert [tuple(features.shape) for features in pyramid] == expected


def test_features_are_those_of_the_whole_network(resnet):
    encoder = Encoder("resnet18", ["layer1", "layer3"])
    encoder.load_weights(resnet.state_dict(), source="test")
    images = torch.randn(2, 3, 64, 64)
    hidden = resnet.layer1(resnet.maxpool(resnet.act1(resnet.bn1(resnet.conv1(images)))))
    expected = [hidden, resnet.layer3(resnet.layer2(hidden))]
    for ours, theirs in zip(encoder(images), expected, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_the_last_projection_of_mobilenet():
    torch.manual_seed(0)
    network = create_model("mobilenetv3_large_100").eval()
    encoder = Encoder("mobilenetv3_large_100")
    encoder.load_weights(network.state_dict(), source="test")
    seen = []
    # The original code hooks the projection convolution's batch norm in the last block of the stage.
    network.blocks[5].register_forward_hook(lambda *arguments: seen.append(arguments[-1]))
    images = torch.randn(1, 3, 64, 64)
    network(images)
    torch.testing.assert_close(encoder(images)[-1], seen[0])


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.long] * (name == "wide_resnet50_2")) for name in NAMES]
)
def test_frozen_and_always_in_eval_mode(name):
    encoder = Encoder(name).train()
    assert not any(module.training for module in encoder.modules())
    assert not any(parameter.requires_grad for parameter in encoder.parameters())
    before = {key: value.clone() for key, value in encoder.state_dict().items()}
    encoder(torch.randn(4, 3, 64, 64) * 100)
    assert all(torch.equal(value, before[key]) for key, value in encoder.state_dict().items())


def test_layers_above_the_last_are_not_kept():
    names = Encoder("resnet18", ["layer2"]).state_dict()
    assert any("layer2" in name for name in names)
    assert not any("layer3" in name or "fc" in name for name in names)


def test_any_other_backbone():
    assert Encoder("efficientnet_b0", ["blocks.2", "blocks.4"]).channels == [40, 112]


def test_gabor_filters_answer_to_their_own_orientation_and_not_to_brightness():
    encoder = Encoder("gabor", ["scale1"])
    x = torch.arange(64.0)
    stripes = torch.sin(2 * torch.pi * 0.25 * x).expand(3, 64, 64)[None]
    inner = (slice(None), slice(2, -2), slice(2, -2))
    across = encoder(stripes)[0][0][inner].mean((1, 2))
    along = encoder(stripes.mT)[0][0][inner].mean((1, 2))
    brighter = encoder(stripes + 1)[0][0][inner].mean((1, 2))
    energies = slice(0, 16)  # of luminance: two frequencies of eight orientations
    assert across[energies].argmax() == 0
    assert along[energies].argmax() == 4
    torch.testing.assert_close(brighter[:48], across[:48], rtol=0, atol=0.02)


@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
def test_a_file_may_lack_what_is_not_needed(resnet, suffix, tmp_path):
    weights = {name: value for name, value in resnet.state_dict().items() if not name.startswith(("layer4", "fc"))}
    file = tmp_path / f"weights{suffix}"
    save_file(weights, file) if suffix == ".safetensors" else torch.save({"state_dict": weights}, file)
    encoder = Encoder("resnet18", ["layer2", "layer3"])
    load_file(encoder, file)
    assert torch.equal(encoder.network.state_dict()["layer3.1.conv2.weight"], weights["layer3.1.conv2.weight"])
    with pytest.raises(CflowError, match=r"lacks layer4\.0\.conv1\.weight.*more.*needs for layer2, layer4"):
        load_file(Encoder("resnet18", ["layer2", "layer4"]), file)


def test_weights_that_do_not_fit_are_refused(resnet, tmp_path):
    file = tmp_path / "weights.safetensors"
    encoder = Encoder("resnet18", ["layer2"])
    before = {name: value.clone() for name, value in encoder.state_dict().items()}

    save_file({**resnet.state_dict(), "conv1.weight": torch.zeros(64, 1, 7, 7)}, file)
    with pytest.raises(CflowError, match=r"conv1\.weight \(64, 1, 7, 7\) instead of \(64, 3, 7, 7\)"):
        load_file(encoder, file)

    save_file({**resnet.state_dict(), "bn1.bias": torch.full((64,), float("nan"))}, file)
    with pytest.raises(CflowError, match=r"NaN or infinite values in bn1\.bias"):
        load_file(encoder, file)

    file.write_bytes(file.read_bytes()[:1000])
    with pytest.raises(CflowError, match="could not be read as weights"):
        load_file(encoder, file)

    with pytest.raises(CflowError, match="no weights file"):
        load_file(encoder, tmp_path / "absent.pth")

    torch.save(resnet, tmp_path / "pickled.pth")  # a whole module could run any code when it is loaded
    with pytest.raises(CflowError, match="nothing but a state dict"):
        load_file(encoder, tmp_path / "pickled.pth")

    assert all(torch.equal(value, before[name]) for name, value in encoder.state_dict().items())


def test_unknown_names_are_refused_with_the_ones_there_are():
    with pytest.raises(CflowError, match=r"no backbone named 'resnet1'.*resnet18"):
        Encoder("resnet1")
    with pytest.raises(CflowError, match=r"no layer 'layer9'; choose from .*layer3"):
        Encoder("resnet18", ["layer2", "layer9"])
    with pytest.raises(CflowError, match="no layer 'layer1'; choose from scale1"):
        Encoder("gabor", ["layer1"])
    with pytest.raises(CflowError, match=r"names no layers for 'resnet34'.*layer2"):
        Encoder("resnet34")
    with pytest.raises(CflowError, match="choose from"):
        Encoder("resnet18", [])
    with pytest.raises(CflowError, match="not a feature map"):
        Encoder("resnet18", ["fc"])


@pytest.mark.long
def test_without_the_hub_one_sentence_names_the_remedies(tmp_path):
    code = (
        "from cflow_plugin.model.encoder import Encoder; from cflow_plugin.model.weights import load_pretrained; "
        "load_pretrained(Encoder('resnet18', ['layer2']))"
    )
    # Nothing listens at the discard port.
    out = run_command(
        "python", "-c", code, cwd=tmp_path, expect=1, HF_HOME=str(tmp_path), HF_ENDPOINT="http://127.0.0.1:9"
    )
    last = out.strip().splitlines()[-1]
    assert "CflowError" in last
    assert all(remedy in last for remedy in ("internet", "--model.weights", "--model.pre_trained false"))


@pytest.mark.shared
def test_real_weights_tell_images_apart():
    file = SHARED / "weights" / "resnet18.tv_in1k-layer1-3.safetensors"
    encoder = Encoder("resnet18", ["layer2", "layer3"])
    load_file(encoder, file)
    assert all(torch.isfinite(features).all() for features in encoder(torch.randn(2, 3, 64, 64)))
    with pytest.raises(CflowError, match="layer4"):
        load_file(Encoder("resnet18"), file)


def test_features_are_averaged_over_the_neighbourhood():
    images = torch.randn(1, 3, 64, 64)
    raw, averaged = Encoder("gabor")(images)[0], Encoder("gabor", neighbourhood=3)(images)[0]
    torch.testing.assert_close(averaged[..., 3, 4], raw[..., 2:5, 3:6].mean((-2, -1)))
    torch.testing.assert_close(averaged[..., 0, 0], raw[..., :2, :2].mean((-2, -1)))


def test_each_layer_may_have_a_neighbourhood_of_its_own():
    images = torch.randn(1, 3, 64, 64)
    raw, all_averaged = Encoder("gabor")(images), Encoder("gabor", neighbourhood=3)(images)
    for asked in (None, [1, 3, 3]):
        torch.testing.assert_close(
            Encoder("gabor", neighbourhood=asked)(images), [raw[0], *all_averaged[1:]], rtol=0, atol=0
        )


@pytest.mark.parametrize("neighbourhood", [2, 0, [1, 3], [1, 3, 2]])
def test_an_impossible_neighbourhood_is_refused(neighbourhood):
    with pytest.raises(CflowError, match=r"odd number .* each of the 3 layers"):
        Encoder("gabor", neighbourhood=neighbourhood)


@pytest.mark.parametrize(("name", "size"), [("gabor", (31, 64)), ("gabor", (4, 4))])
def test_images_that_are_too_small_are_refused(name, size):
    encoder = Encoder(name)
    encoder.check_size((32, 33))
    with pytest.raises(CflowError, match=rf"{size[0]}×{size[1]} pixels are too small for scale1, scale2, scale3"):
        encoder.check_size(size)


def test_a_size_that_strides_do_not_divide():
    sizes = [tuple(features.shape[1:]) for features in Encoder("gabor")(torch.rand(1, 3, 47, 62))]
    assert sizes == [(51, 5, 7), (51, 2, 3), (51, 1, 1)]
