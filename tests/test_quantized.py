"""An encoder of 8-bit numbers, against whole-number arithmetic, other runtimes, and what it is made of."""

from copy import deepcopy

import numpy as np
import onnxruntime
import openvino as ov
import pytest
import torch
from lightning import seed_everything
from timm.layers.conv2d_same import Conv2dSame
from torch import nn
from torch.nn import functional

from cflow_plugin import CflowPlugin
from cflow_plugin.commands.check import check
from cflow_plugin.errors import CflowError
from cflow_plugin.model.encoder import Encoder
from cflow_plugin.model.folded import FoldedModel
from cflow_plugin.model.quantized import QuantizedConvolution, in_floating_point, measure_ranges
from cflow_plugin.model.torch_model import CflowModel

from .conftest import QUICK, make_engine, make_textures


def convolutions():
    torch.manual_seed(0)
    yield nn.Conv2d(4, 6, 3, padding=1)
    yield nn.Conv2d(4, 6, 3, stride=2, padding=1, bias=False, padding_mode="reflect")
    yield nn.Conv2d(4, 4, 3, padding="same", groups=4, dilation=2)
    yield Conv2dSame(4, 6, 3, stride=2)


def measured(convolution: nn.Conv2d, values: torch.Tensor) -> QuantizedConvolution:
    quantized = QuantizedConvolution(convolution)
    with measure_ranges(quantized):
        quantized(values)
    return quantized


@pytest.mark.parametrize("fixed", [False, True])
@pytest.mark.parametrize("convolution", convolutions(), ids=lambda layer: type(layer).__name__ + layer.padding_mode)
def test_it_computes_with_whole_numbers(convolution, fixed):
    values = 3 * torch.randn(2, 4, 9, 9) + 1
    quantized = measured(convolution, values)
    if fixed:
        quantized.fix()
    new = torch.cat([values, 2 * values])  # beyond the range, too
    step = (values.max() - values.min()).double() / 255
    zero = (-values.min().double() / step).round()
    whole = ((new.double() / step).round() + zero).clamp(0, 255) - zero
    largest = convolution.weight.detach().double().flatten(1).abs().amax(1)[:, None, None, None]
    weights = (64 * convolution.weight.detach().double() / largest).round()
    assert set(weights.unique().tolist()) <= set(range(-64, 65))
    exact = deepcopy(convolution).double()
    exact.weight.data, bias = weights, exact.bias
    exact.bias = None
    expected = exact(whole) * step * largest[:, 0] / 64 + (0 if bias is None else bias[:, None, None])
    torch.testing.assert_close(quantized(new).double(), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("convolution", convolutions(), ids=lambda layer: type(layer).__name__ + layer.padding_mode)
def test_in_floating_point_it_is_what_it_was(convolution):
    values = torch.randn(2, 4, 9, 9)
    expected = convolution(values)
    quantized = measured(deepcopy(convolution), values)
    assert not torch.equal(quantized(values), expected)
    with in_floating_point(quantized):
        torch.testing.assert_close(quantized(values), expected)
    assert quantized.state_dict().keys() == {*convolution.state_dict(), "input_scale", "input_zero"}


def test_half_precision_rounds_as_single_precision_does():
    values = torch.randn(2, 4, 9, 9)
    quantized = measured(nn.Conv2d(4, 6, 3), values)
    expected = quantized(values)
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(quantized(values).float(), expected, rtol=2e-2, atol=2e-2)
    halved = deepcopy(quantized).bfloat16()
    assert halved.input_scale == quantized.input_scale
    assert halved(values.bfloat16()).dtype == torch.bfloat16


def untrained(images: torch.Tensor, **settings) -> CflowModel:
    """A model whose encoder has seen images, and whose scoring knows what is usual."""
    torch.manual_seed(0)
    model = CflowModel("resnet18", ["layer1", "layer2"], coupling_blocks=2, image_size=(64, 64), **settings)
    for module in model.encoder.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.1)
            module.weight.data.uniform_(0.5, 1.5)
    with measure_ranges(model.encoder):
        features = model.encoder(images)
    model.train()
    model.calibrate(model._log_likelihoods(features))
    return model.eval()


def test_folding_batch_norms_changes_no_whole_number():
    images = torch.randn(4, 3, 64, 64)
    model = untrained(images, encoder_precision="int8")
    folded = model.folded((64, 64)).encoder
    assert not any(isinstance(module, nn.BatchNorm2d) for module in folded.modules())
    pairs = zip(model.encoder.modules(), folded.modules(), strict=False)
    pairs = [pair for pair in pairs if isinstance(pair[0], QuantizedConvolution)]
    assert len(pairs) == 9
    for plain, fused in pairs:
        numbers = [
            (64 * module.weight / module.weight.flatten(1).abs().amax(1)[:, None, None, None]).abs().round()
            for module in (plain, fused)
        ]
        assert (numbers[0] != numbers[1]).double().mean() < 1e-3  # where a weight lies in the middle of two
    for plain, fused in zip(model.encoder(images), folded(images), strict=True):
        assert (plain - fused).norm() < 0.02 * plain.norm()


@pytest.mark.long
def test_runtimes_compute_in_int8_what_training_saw(tmp_path):
    images = torch.randn(4, 3, 64, 64)
    model = CflowPlugin(
        **{**QUICK, "backbone": "resnet18", "layers": ["layer1", "layer2"], "image_size": (64, 64)},
        encoder_precision="int8",
        target_false_alarm_rate=None,
    )
    model.model = untrained(images, encoder_precision="int8")
    model.model.encoder.source = "random"
    given = torch.rand(4, 3, 64, 64)
    with torch.no_grad():
        expected = model.model(model.pre_processor.transform(given))
    path = model.to_openvino(tmp_path, input_size=(64, 64), ov_kwargs={"batch": 4})
    compiled = ov.Core().compile_model(path, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    layers = [node.get_rt_info() for node in compiled.get_runtime_model().get_ops()]
    executed = [str(info["runtimePrecision"].value) for info in layers if info["layerType"].value == "Convolution"]
    assert sorted(executed) == ["f32"] + ["u8"] * 9
    in_float = ov.Core().compile_model(path, "CPU", {"INFERENCE_PRECISION_HINT": "f32", "LP_TRANSFORMS_MODE": "NO"})
    onnx = model.to_onnx(tmp_path, input_size=(64, 64))
    session = onnxruntime.InferenceSession(onnx)
    results = [
        compiled(given.numpy())["anomaly_map"],
        in_float(given.numpy())["anomaly_map"],
        np.concatenate([session.run(["anomaly_map"], {"input": image[None]})[0] for image in given.numpy()]),
    ]
    with torch.no_grad(), in_floating_point(model.model.folded((64, 64))):
        otherwise = model.model(model.pre_processor.transform(given)).anomaly_map
    rounding = (otherwise - expected.anomaly_map).abs().mean().item()
    assert rounding > 1e-3
    for found in results:
        assert np.abs(found - expected.anomaly_map.numpy()).mean() < rounding / 4


@pytest.mark.long
def test_trained_restored_and_exported(tmp_path):
    seed_everything(0)
    settings = {**QUICK, "backbone": "test_resnet", "layers": [0, 1], "encoder_precision": "int8"}
    data = make_textures(tmp_path / "data", train_good=16)
    model = CflowPlugin(**settings, pre_trained=False, target_false_alarm_rate=0.2)
    engine = make_engine(tmp_path)
    engine.fit(model, datamodule=data)
    scales = [module.input_scale for module in model.modules() if isinstance(module, QuantizedConvolution)]
    assert len({float(scale) for scale in scales}) > 1  # they were measured
    checkpoint = tmp_path / "model.ckpt"
    engine.trainer.save_checkpoint(checkpoint)
    restored = CflowPlugin.load_from_checkpoint(checkpoint, weights_only=False).eval()
    images = functional.interpolate(torch.stack([item.image for item in data.test_data])[:4], (64, 64))
    with torch.no_grad():
        expected, found = model.eval()(images), restored(images)
    torch.testing.assert_close(found.pred_score, expected.pred_score)
    for path in (restored.to_openvino(tmp_path / "plain"), restored.to_onnx(tmp_path / "plain")):
        check(path, checkpoint, output=tmp_path / "check.json", precisions=("f32",))  # it would end with an exit code
    path = restored.to_openvino(tmp_path, input_size=(64, 64), compression_type="int8_ptq", datamodule=data)
    kinds = [node.get_type_name() for node in ov.Core().read_model(path).get_ops()]
    assert kinds.count("FakeQuantize") > len(scales)  # the decoders' are added


def test_ranges_are_those_of_the_weights_that_are_loaded(tmp_path):
    torch.manual_seed(1)
    other = Encoder("test_resnet", ["0", "1"], image_size=(64, 64)).network
    for parameter in other.parameters():
        parameter.data *= 2
    torch.save(other.state_dict(), tmp_path / "weights.pth")
    settings = {"backbone": "test_resnet", "layers": [0, 1], "weights": str(tmp_path / "weights.pth")}
    model = CflowPlugin(**{**QUICK, **settings}, encoder_precision="int8", epochs=1)
    data = make_textures(tmp_path, train_good=4)
    make_engine(tmp_path).fit(model, datamodule=data)
    found = {}

    def note(layer, inputs):
        found.setdefault(layer, []).append(inputs[0].detach())

    encoder = model.model.encoder
    layers = [layer for layer in encoder.modules() if isinstance(layer, QuantizedConvolution)]
    for layer in layers:
        layer.register_forward_pre_hook(note)
    with torch.no_grad(), in_floating_point(encoder):
        for batch in data.train_dataloader():
            encoder(model.prepared(batch.image))
    for layer in layers:
        values = torch.cat(found[layer])
        length = values.max().clamp(min=0) - values.min().clamp(max=0)
        torch.testing.assert_close(255 * layer.input_scale, length, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("backbone", ["vit_tiny_patch16_224", "gabor"])
def test_what_has_few_convolutions_is_refused(backbone):
    with pytest.raises(CflowError, match=r"int8 .* convolution"):
        Encoder(backbone, precision="int8")


def test_the_folded_model_has_its_scales_as_constants():
    model = untrained(torch.randn(4, 3, 64, 64), encoder_precision="int8")
    folded = FoldedModel(model.encoder, model.decoders, model.scoring, model.whole, (64, 64))
    with torch.no_grad():
        program = torch.export.export(folded.encoder, (torch.zeros(1, 3, 64, 64),), strict=False)
    called = [str(node.target) for node in program.graph.nodes if node.op == "call_function"]
    assert sum("round_to_bytes" in name for name in called) == 9
    assert not any("amax" in name for name in called)
