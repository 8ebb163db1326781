import numpy as np
import onnxruntime
import openvino as ov
import pytest
import torch
from anomalib.deploy import CompressionType, OpenVINOInferencer, TorchInferencer
from PIL import Image

from cflow_plugin import CflowError, CflowPlugin
from cflow_plugin.anomalib_patches.thresholds import set_thresholds
from cflow_plugin.deploy import export as export_module
from cflow_plugin.deploy.graph import InferenceGraph, convert_to_openvino
from cflow_plugin.deploy.quantization import TrainingImages, quantize
from cflow_plugin.deploy.runtime import encoder_of, read_exported

from .conftest import QUICK, make_engine, run_command

F32 = {"INFERENCE_PRECISION_HINT": "f32"}


def images_of(size, count=3):
    generator = torch.Generator().manual_seed(size[0] + size[1])
    coarse = torch.rand(count, 3, 8, 8, generator=generator)
    return torch.nn.functional.interpolate(coarse, size, mode="bicubic").clamp(0, 1)


@torch.no_grad()
def assert_agrees(results, model, images, tolerance=1e-4):
    expected = model(images)
    for name in ("anomaly_map", "pred_score"):
        found = torch.as_tensor(np.asarray(results[name]))
        torch.testing.assert_close(found, getattr(expected, name), rtol=0, atol=tolerance)
    assert np.array_equal(results["pred_label"], expected.pred_label.numpy())
    differing = np.asarray(results["pred_mask"]) != expected.pred_mask.numpy()
    # Where a value lies at the threshold to the last digits, either side is right.
    near = (expected.anomaly_map - model.post_processor.normalized_pixel_threshold).abs().numpy() < tolerance
    assert not differing[~near].any()


def run_openvino(path, images):
    compiled = path if isinstance(path, ov.CompiledModel) else ov.Core().compile_model(path, "CPU", F32)
    results = compiled(images.numpy())
    return {name: results[name] for name in ("anomaly_map", "pred_score", "pred_label", "pred_mask")}


@pytest.mark.long
@pytest.mark.parametrize("input_size", [(96, 160), None], ids=str)
def test_openvino(trained, export, input_size):
    compiled = ov.Core().compile_model(export(input_size), "CPU", F32)
    for size in [input_size] if input_size else [(64, 64), (200, 75), (33, 310)]:
        assert_agrees(run_openvino(compiled, images_of(size, 1)), trained, images_of(size, 1))


def check_in_onnxruntime(path, model, sizes):
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]
    for size in sizes:
        images = images_of(size, 1)
        results = dict(zip(names, session.run(None, {"input": images.numpy()}), strict=True))
        assert_agrees(results, model, images)


@pytest.mark.long
def test_onnx(trained, export):
    check_in_onnxruntime(export(None, "onnx"), trained, [(64, 64), (200, 75), (33, 310)])


@pytest.mark.long
def test_anomalib_s_inferencers(trained, export, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # the inferencer's cache goes into the working directory
    monkeypatch.setenv("TRUST_REMOTE_CODE", "1")
    picture = (images_of((150, 120), 1)[0].permute(1, 2, 0).numpy() * 255).astype(np.uint8)
    Image.fromarray(picture).save(tmp_path / "picture.png")
    image = torch.from_numpy(picture).permute(2, 0, 1)[None] / 255
    inferencers = [
        OpenVINOInferencer(export(None), "CPU", F32),
        OpenVINOInferencer(export(None, "onnx"), "CPU", F32),
        TorchInferencer(trained.to_torch(tmp_path), "cpu"),
    ]
    for inferencer in inferencers:
        prediction = inferencer.predict(tmp_path / "picture.png")
        names = ("anomaly_map", "pred_score", "pred_label", "pred_mask")
        found = {name: np.asarray(getattr(prediction, name)) for name in names}
        with torch.no_grad():
            expected = trained(image)
        for name in names:
            assert np.allclose(found[name].squeeze(), getattr(expected, name).numpy().squeeze(), atol=1e-4), name


def random_model(size, **settings):
    """With constants and thresholds as training would leave them, and one coupling block: that is exported fast."""
    torch.manual_seed(0)
    model = CflowPlugin(**settings, pre_trained=False, image_size=size, coupling_blocks=1).eval()
    with torch.no_grad():
        model.model.calibrate(model.model.log_likelihoods(torch.randn(2, 3, *size)))
    set_thresholds(model.post_processor, 0.5, 0.5)
    return model


@pytest.mark.long
@pytest.mark.parametrize(
    ("backbone", "layers", "size"),
    [
        ("resnet18", ["layer2", "layer3"], (300, 200)),
        ("mobilenetv3_large_100", ["blocks.2"], (64, 300)),
        ("gabor", ["scale2"], (64, 512)),
        ("test_mambaout", [1], (64, 96)),  # channels last
        ("test_coatnet", [2], (96, 96)),  # convolutions, then attention
    ],
    ids=str,
)
def test_any_size(tmp_path, backbone, layers, size):
    model = random_model(size, backbone=backbone, layers=layers)
    path = model.to_openvino(tmp_path, input_size=size)
    assert_agrees(run_openvino(path, images_of(size, 1)), model, images_of(size, 1))


@pytest.mark.long
def test_a_transformer_in_every_form(tmp_path):
    """With registers, position embeddings, and longer vectors than the flow takes."""
    size = (56, 56)
    model = random_model(size, backbone="vit_small_patch14_reg4_dinov2", layers=[0])
    assert model.model.decoders[0].whitening.kept == 256
    images = images_of(size, 2)
    with torch.no_grad():
        model.model.fit_whitening([torch.randn(500, 384) @ torch.randn(384, 384)])
        likelihoods = model.model.eval().log_likelihoods(model.pre_processor(images))
        # Constants with which the map takes all values: one that is constant would agree with anything.
        model.model.scoring.correction_0.zero_()
        model.model.scoring.log_maximum.copy_(likelihoods[0].max())
        model.model.scoring.temperature.copy_(2 * likelihoods[0].std())
        model.model.drop_folded()
        expected = model.model(model.pre_processor(images)).anomaly_map.numpy()
    assert np.ptp(expected) > 0.3
    any_number = {"batch": None}
    assert_agrees(
        run_openvino(model.to_openvino(tmp_path, input_size=size, ov_kwargs=any_number), images), model, images
    )
    check_in_onnxruntime(model.to_onnx(tmp_path, input_size=size), model, [size])
    quantized = quantize(convert_to_openvino(model, size), [image[None].numpy() for image in images])
    found = ov.compile_model(quantized, "CPU", F32)(images.numpy())["anomaly_map"]
    assert np.abs(found - expected).mean() < 0.05
    quantizers = [node.get_friendly_name() for node in quantized.get_ops() if node.get_type_name() == "FakeQuantize"]
    assert quantizers
    assert not [name for name in quantizers if name.startswith("encoder.")]
    in_bytes = [
        list(node.shape)
        for node in quantized.get_ops()
        if node.get_type_name() == "Constant" and node.get_element_type() == ov.Type.u8
    ]
    assert [1536, 384] in in_bytes, "the later half of the encoder keeps its weights in 8 bits"


@pytest.mark.parametrize(
    "settings",
    [
        {"backbone": "gabor", "layers": ["scale2"], "tile_size": 64},  # a layer has a product in each tile
        {"backbone": "test_vit", "layers": [0, 1]},  # layers that are alike, as in any model that is not trained
    ],
    ids=str,
)
def test_what_int8_may_be(settings):
    """The decoders' blocks compute in INT8, all of them, and the whitening never does."""
    size = (64, 96)
    model = random_model(size, **settings)
    quantized = quantize(convert_to_openvino(model, size), [image[None].numpy() for image in images_of(size, 2)])
    products = [node for node in quantized.get_ops() if node.get_type_name() == "MatMul"]
    decoders = [node for node in products if node.get_friendly_name().startswith("flows.")]
    assert len({node.get_friendly_name() for node in decoders}) == len(decoders) > 6
    for node in decoders:
        is_quantized = node.input_value(0).get_node().get_type_name() == "FakeQuantize"
        assert is_quantized == (".blocks." in node.get_friendly_name()), node.get_friendly_name()


@pytest.mark.long
def test_the_log_determinant_survives(trained):
    """A converter that drops an option of softplus shifts every likelihood; the map alone would hide it."""
    inference = InferenceGraph(trained, (64, 64)).model

    class LogLikelihoods(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.model = inference

        def forward(self, images):
            return tuple(self.model.log_likelihoods(images))

    images = torch.randn(2, 3, 64, 64)
    converted = ov.convert_model(torch.export.export(LogLikelihoods(), (images,), strict=False))
    results = ov.compile_model(converted, "CPU", F32)(images.numpy())
    with torch.no_grad():
        expected = trained.model.train().log_likelihoods(images)
    trained.eval()
    for index, values in enumerate(expected):
        np.testing.assert_allclose(results[index], values.numpy(), rtol=1e-4, atol=1e-4)


@pytest.fixture
def converted_once(converted, monkeypatch):
    """Compression begins with a conversion, which takes most of the time."""
    monkeypatch.setattr(export_module, "convert_to_openvino", lambda *_: ov.Core().read_model(converted))


@pytest.mark.long
@pytest.mark.usefixtures("converted_once")
def test_files_are_small(trained, textures, export, tmp_path):
    sizes = {None: export((64, 64)).with_suffix(".bin").stat().st_size}
    for kind in (CompressionType.FP16, CompressionType.INT8):
        path = trained.to_openvino(
            tmp_path / str(kind), input_size=(64, 64), compression_type=kind, datamodule=textures
        )
        sizes[kind] = path.with_suffix(".bin").stat().st_size
    # The condition's weights are not needed, nor is a constant for each position.
    weights = sum(parameter.numel() for parameter in trained.model.decoders.parameters())
    others = sum(buffer.numel() for buffer in trained.model.decoders.buffers())
    encoder = sum(tensor.numel() for tensor in trained.model.encoder.state_dict().values())
    assert sizes[None] < 4 * (weights + others + encoder)
    assert sizes[CompressionType.FP16] < 0.55 * sizes[None]
    assert sizes[CompressionType.INT8] < 0.5 * sizes[None]


@pytest.mark.long
def test_no_constant_is_kept_for_each_position(trained, export):
    path = export((64, 64))
    blocks = [block for flow in InferenceGraph(trained, (64, 64)).model.flows for block in flow.blocks]
    dense = {tuple(block.position.shape) for block in blocks}
    parts = {tuple(block.rows.shape) for block in blocks} | {tuple(block.columns.shape) for block in blocks}
    constants = [node for node in ov.Core().read_model(path).get_ops() if node.get_type_name() == "Constant"]
    shapes = [tuple(size for size in node.shape if size != 1) for node in constants]
    assert not dense & set(shapes)
    assert {tuple(size for size in shape if size != 1) for shape in parts} <= set(shapes)


@pytest.mark.long
@pytest.mark.usefixtures("converted_once")
@pytest.mark.parametrize("kind", [CompressionType.INT8_PTQ, CompressionType.INT8_ACQ])
def test_int8(trained, textures, tmp_path, kind):
    any_number = {"batch": None}
    path = trained.to_openvino(
        tmp_path, input_size=(64, 64), compression_type=kind, datamodule=textures, ov_kwargs=any_number
    )
    model = ov.Core().read_model(path)
    assert any(node.get_type_name() == "FakeQuantize" for node in model.get_ops())
    # Weights fill seven bits, so that a processor that adds products up in 16 computes what others do.
    for node in model.get_ops():
        if node.get_type_name() == "Constant" and node.get_element_type() == ov.Type.i8:
            assert np.abs(node.data.astype(int)).max() <= 64
    images = torch.stack([item.image for item in textures.test_data])
    found = run_openvino(path, images)["anomaly_map"]
    in_float = ov.Core().compile_model(model, "CPU", {**F32, "LP_TRANSFORMS_MODE": "NO"})(images.numpy())["anomaly_map"]
    assert np.abs(found - in_float).max() < 0.01
    with torch.no_grad():
        expected = trained(images).anomaly_map.numpy()
    assert np.corrcoef(found.ravel(), expected.ravel())[0, 1] > 0.98


def test_int8_is_calibrated_on_training_images_alone(textures):
    images = TrainingImages(textures, (64, 96), limit=4)
    assert len(images) == 4
    found = [image for _ in range(2) for image in images]  # and can be gone through again
    assert {image.shape for image in found} == {(1, 3, 64, 96)}
    assert np.array_equal(found[0], found[4])
    paths = {str(textures.train_data.samples.image_path[index]) for index in images.indices}
    assert all("/train/good/" in path for path in paths)
    unlimited = TrainingImages(textures)
    assert len(unlimited) == len(textures.train_data)


def test_what_cannot_be_exported_is_refused(trained, tmp_path):
    with pytest.raises(CflowError, match="trained model"):
        CflowPlugin(**QUICK).to_openvino(tmp_path)
    with pytest.raises(CflowError, match="trained model"):
        CflowPlugin(**QUICK).to_onnx(tmp_path)
    for kind in CompressionType:
        with pytest.raises(CflowError, match="--data"):
            trained.to_openvino(tmp_path, compression_type=kind)
    assert not list(tmp_path.iterdir())


@pytest.mark.long
def test_a_model_without_thresholds(textures, tmp_path, monkeypatch):
    model = CflowPlugin(**QUICK, epochs=1, steps_per_epoch=1)
    make_engine(tmp_path, limit_val_batches=0).fit(model, datamodule=textures)
    assert torch.isnan(model.eval().post_processor.image_min)
    images = images_of((64, 64), 1)
    with torch.no_grad():
        expected = model(images)
    assert expected.pred_label is None
    assert expected.pred_mask is None
    path = model.to_openvino(tmp_path, input_size=(64, 64))
    monkeypatch.setattr(export_module, "convert_to_openvino", lambda *_: ov.Core().read_model(path))
    fp16 = model.to_openvino(tmp_path / "fp16", input_size=(64, 64), compression_type=CompressionType.FP16)
    monkeypatch.chdir(tmp_path)  # the inferencer's cache goes into the working directory
    for file, tolerance in ((path, 1e-4), (fp16, 2e-3)):
        read = ov.Core().read_model(file)
        assert {name for output in read.outputs for name in output.names} == {"pred_score", "anomaly_map"}
        assert "decides nothing" in read.get_rt_info(["cflow_plugin_decisions"]).astype(str)
        found = ov.Core().compile_model(read, "CPU", F32)(images.numpy())
        for name in ("pred_score", "anomaly_map"):
            np.testing.assert_allclose(found[name], getattr(expected, name).numpy(), atol=tolerance)
        with pytest.raises(CflowError, match=r"no decision; .* --model\.target_false_alarm_rate"):
            read_exported(file)
        picture = (images[0].permute(1, 2, 0).numpy() * 255).astype(np.uint8)
        assert OpenVINOInferencer(file, "CPU", F32).predict(picture).pred_label is None


@pytest.mark.long
def test_exporting_leaves_the_model_alone(tmp_path):
    model = random_model((64, 64), backbone="gabor", layers=["scale1"]).train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    path = model.to_openvino(tmp_path, input_size=(64, 64), ov_kwargs={"input": [1, 3, 64, 64]})
    onnx = model.to_onnx(tmp_path, input_size=(96, 160))
    assert model.training
    for name, value in model.eval().state_dict().items():
        torch.testing.assert_close(value, before[name], rtol=0, atol=0, equal_nan=True)
    # With a fixed batch, as was asked for.
    assert ov.Core().read_model(path).input(0).partial_shape.is_static
    assert_agrees(run_openvino(path, images_of((64, 64), 1)), model, images_of((64, 64), 1))
    check_in_onnxruntime(onnx, model, [(96, 160)])


def test_one_export(trained, export):
    """For the short run of the tests."""
    assert_agrees(run_openvino(export(None), images_of((70, 64), 1)), trained, images_of((70, 64), 1))


@pytest.mark.long
def test_the_command_writes_nothing_else(checkpoint, tmp_path):
    folder = tmp_path / "working"
    folder.mkdir()
    run_command(
        "anomalib", "export", "--model", "CflowPlugin", "--model.backbone", "gabor", "--export_type", "openvino",
        "--ckpt_path", checkpoint, "--export_root", "exported", "--input_size", "[64, 64]",
        cwd=folder,
    )  # fmt: skip
    written = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
    assert written == {"exported/weights/openvino/model.xml", "exported/weights/openvino/model.bin"}


@pytest.mark.parametrize("kind", ["openvino", "onnx"])
def test_a_file_says_what_its_encoder_takes(export, trained, kind):
    found = encoder_of(ov.Core().read_model(export((64, 64), kind)))
    assert (found["backbone"], found["layers"]) == ("gabor", ["scale1", "scale2"])
    assert (found["image_size"], found["interpolation"]) == ([64, 64], "bilinear")
    assert (found["mean"], found["std"]) == ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225])
    assert found["weights"] == trained.model.encoder.source


@pytest.mark.long
def test_bicubic_resizing_is_exported(tmp_path):
    torch.manual_seed(0)
    model = CflowPlugin("test_efficientnet", [2], image_size=(64, 64), coupling_blocks=1, target_false_alarm_rate=None)
    assert model.pre_processor.transform.transforms[0].interpolation.value == "bicubic"
    model.eval()
    good = 0.1 * torch.randn(4, 3, 64, 64)
    model.model.calibrate(model.model.log_likelihoods(good))
    images = images_of((96, 160), 1)
    expected = model(images).anomaly_map
    assert expected.std() > 0.01
    found = run_openvino_map(model.to_openvino(tmp_path, input_size=(96, 160)), images)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-3)
    session = onnxruntime.InferenceSession(model.to_onnx(tmp_path, input_size=(96, 160)))
    names = [output.name for output in session.get_outputs()]
    [found] = session.run(["anomaly_map"], {session.get_inputs()[0].name: images.numpy()})
    assert "anomaly_map" in names
    torch.testing.assert_close(torch.as_tensor(found), expected, rtol=0, atol=1e-3)


def run_openvino_map(path, images):
    return torch.as_tensor(ov.Core().compile_model(path, "CPU", F32)(images.numpy())["anomaly_map"])


def test_sizes_that_are_none_and_that_show_less_than_training(trained, tmp_path, caplog):
    for settings in ({"input_size": (0, 64)}, {"input_size": (64, 64), "ov_kwargs": {"batch": 0}}):
        with pytest.raises(CflowError, match="must be at least 1"):
            trained.to_openvino(tmp_path, **settings)
    assert not list(tmp_path.rglob("*.xml"))
    trained._check_input((80, 64), 1)
    assert "show less" not in caplog.text
    trained._check_input((20, 64), 1)
    assert "takes images of 20×64 pixels" in caplog.text
