"""Exported files in every runtime at hand: the same scores and decisions, whatever an image's size; and the samples."""

import os
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import openvino as ov
import pytest
import torch
from anomalib.pre_processing import PreProcessor
from PIL import Image
from torch.nn import functional
from torchvision.transforms.v2 import (
    CenterCrop,
    Compose,
    GaussianBlur,
    InterpolationMode,
    Normalize,
    RandomHorizontalFlip,
    Resize,
)

from cflow_plugin import CflowError
from cflow_plugin.data.textures import draw
from cflow_plugin.deploy.resizing import ExactResize

from .conftest import once, run_command
from .test_export import F32, assert_agrees, images_of, random_model, run_openvino

EXAMPLES = Path(__file__).parent.parent / "examples"
SIZES = [(64, 64), (32, 32), (70, 200), (301, 97), (800, 600)]


@pytest.mark.parametrize("new", [(64, 64), (33, 70), (300, 200)])
@pytest.mark.parametrize("old", [(64, 64), (100, 75), (32, 500), (2000, 31)])
@pytest.mark.parametrize("mode", ["bilinear", "bicubic"])
def test_the_resizing_is_torch_s(old, new, mode):
    images = torch.rand(1, 3, *old)
    expected = functional.interpolate(images.double(), new, mode=mode, antialias=True).float()
    torch.testing.assert_close(ExactResize(new, mode)(images), expected, rtol=0, atol=2e-5)
    if old == new and mode == "bilinear":
        assert torch.equal(ExactResize(new)(images), images)


@pytest.mark.parametrize("old", [(50, 80), (80, 50), (60, 60)])
def test_a_size_of_the_shorter_side(old):
    images = torch.rand(1, 3, *old)
    torch.testing.assert_close(ExactResize([40])(images), Resize(40, antialias=True)(images), rtol=0, atol=2e-6)


def pictures_in(folder: Path) -> list[Path]:
    """Pictures of many sizes; in the large ones is noise, which a reduction without smoothing takes for defects."""
    generator = np.random.default_rng(0)
    for number, (height, width) in enumerate(SIZES):
        kind = "hole" if number % 2 else "good"
        texture = Image.fromarray(draw("weave", kind, "test", number, size=64).image).resize((width, height))
        noise = 25 if height * width > 10_000 else 0
        noisy = np.asarray(texture) + generator.normal(0, noise, (height, width, 3))
        Image.fromarray(noisy.clip(0, 255).astype(np.uint8)).save(folder / f"{number}.png")
    return sorted(folder.glob("*.png"))


def tensor_of(path: Path) -> torch.Tensor:
    return torch.from_numpy(np.asarray(Image.open(path)).transpose(2, 0, 1)[None].copy()).float() / 255


@pytest.fixture(scope="module")
def camera_file(trained, common):
    def write(folder: Path) -> None:
        trained.to_openvino(folder, ov_kwargs={"camera_bytes": True})

    return next(once(common / "camera bytes", write).rglob("model.xml"))


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    return pictures_in(tmp_path_factory.mktemp("pictures"))


@pytest.fixture(scope="module")
def expected(trained, pictures):
    with torch.no_grad():
        found = {path: trained(tensor_of(path)) for path in pictures}
    assert len({round(float(result.anomaly_map.mean()), 5) for result in found.values()}) == len(found)
    assert len({round(float(result.pred_score), 3) for result in found.values()}) > 1
    return found


@pytest.mark.parametrize("runtime", ["openvino of .xml", "openvino of .onnx", "onnxruntime", "camera bytes"])
def test_noisy_images_of_many_sizes(runtime, trained, export, camera_file, pictures, expected):
    path = export(None, "onnx") if "onnx" in runtime else export(None)
    path = camera_file if runtime == "camera bytes" else path
    if runtime == "onnxruntime":
        session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
        names = [output.name for output in session.get_outputs()]
    else:
        compiled = ov.Core().compile_model(path, "CPU", F32)
    for picture in pictures:
        images = tensor_of(picture)
        if runtime == "onnxruntime":
            results = dict(zip(names, session.run(None, {"input": images.numpy()}), strict=True))
        elif runtime == "camera bytes":
            found = compiled(np.asarray(Image.open(picture))[None, ..., ::-1].copy())
            results = {name: found[name] for name in ("anomaly_map", "pred_score", "pred_label", "pred_mask")}
        else:
            results = run_openvino(compiled, images)
        assert_agrees(results, trained, images, tolerance=1e-4)
        assert bool(results["pred_label"].item()) == bool(expected[picture].pred_label)


def test_one_file_of_plain_operations(export):
    """It can be copied alone, and holds no operation whose meaning is a runtime's own."""
    path = export(None, "onnx")
    assert [file.name for file in path.parent.iterdir()] == ["model.onnx"]
    model = onnx.load(path)
    kinds = {node.op_type for node in model.graph.node}
    assert "Resize" not in kinds
    assert {node.domain for node in model.graph.node} <= {"", "ai.onnx"}
    assert not model.functions
    assert [(entry.domain, entry.version) for entry in model.opset_import] == [("", 18)]
    # A choice that OpenVINO could make at once would leave an output with two names.
    assert "Where" not in kinds
    compiled = ov.Core().compile_model(path, "CPU", F32)
    assert sorted(map(sorted, (output.get_names() for output in compiled.outputs))) == [
        ["anomaly_map"], ["pred_label"], ["pred_mask"], ["pred_score"],
    ]  # fmt: skip
    known = {entry.key: entry.value for entry in model.metadata_props}
    assert known["model_info scale_values"] == "255 255 255"
    assert known["cflow_plugin_bits"] == "8"


@pytest.mark.long
@pytest.mark.parametrize("kind", ["openvino", "onnx"])
def test_one_image_at_a_time_unless_asked_otherwise(kind, export, trained, tmp_path):
    shape = ov.Core().read_model(export(None, kind)).input(0).partial_shape
    assert shape[0].get_length() == 1
    model = random_model((32, 32), backbone="gabor", layers=["scale2"])
    options = {"ov_kwargs": {"batch": None}} if kind == "openvino" else {"batch": None}
    path = getattr(model, f"to_{kind}")(tmp_path, input_size=(32, 32), **options)
    compiled = ov.Core().compile_model(path, "CPU", F32)
    assert_agrees(run_openvino(compiled, images_of((32, 32), 3)), model, images_of((32, 32), 3))


# Pre-processing of the user's own


def with_pre_processing(*steps):
    transform = Compose([*steps, Normalize([0.4, 0.4, 0.4], [0.2, 0.2, 0.2])])
    settings = {"backbone": "gabor", "layers": ["scale2"], "pre_processor": PreProcessor(transform=transform)}
    return random_model((64, 64), **settings)


@pytest.mark.long
@pytest.mark.parametrize(
    ("steps", "input_size", "cropped"),
    [
        ([Resize((72, 72), antialias=True), CenterCrop((48, 48))], None, (48, 48)),
        ([CenterCrop((60, 80)), Resize((48, 64), antialias=True)], (100, 120), (48, 64)),
        ([Resize(50, antialias=True), CenterCrop((48, 48))], (100, 120), (48, 48)),
        ([CenterCrop((48, 48))], (100, 120), (48, 48)),
    ],
    ids=["crop after", "crop before", "shorter side", "crop alone"],
)
def test_crops(steps, input_size, cropped, tmp_path):
    model = with_pre_processing(*steps)
    with torch.no_grad():
        model.model.calibrate(model.model.log_likelihoods(torch.randn(2, 3, *cropped)))
    xml, file = model.to_openvino(tmp_path, input_size=input_size), model.to_onnx(tmp_path, input_size=input_size)
    images = images_of(input_size or (100, 120), 1)
    assert model(images).anomaly_map.shape[-2:] == cropped
    assert_agrees(run_openvino(xml, images), model, images)
    session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]
    assert_agrees(dict(zip(names, session.run(None, {"input": images.numpy()}), strict=True)), model, images)


@pytest.mark.parametrize(
    ("step", "words"),
    [
        (RandomHorizontalFlip(0.5), "holds RandomHorizontalFlip"),
        (GaussianBlur(3), "holds GaussianBlur"),
        (Resize((64, 64), interpolation=InterpolationMode.LANCZOS, antialias=True), "resizes by Resize"),
        (Resize((64, 64), antialias=False), "resizes by Resize"),
    ],
)
def test_pre_processing_that_a_file_cannot_do(step, words, tmp_path):
    model = with_pre_processing(Resize((64, 64), antialias=True), step)
    with torch.no_grad():
        model.model.calibrate(model.model.log_likelihoods(torch.randn(2, 3, 64, 64)))
    for export in (model.to_openvino, model.to_onnx):
        with pytest.raises(CflowError, match=words):
            export(tmp_path)
    assert not list(tmp_path.rglob("model.*"))


@pytest.mark.long
def test_benchmark_app_runs_as_it_is(export, tmp_path):
    command = ["benchmark_app", "-m", export((64, 64)), "-niter", "2", "-d", "CPU"]
    assert "Throughput" in run_command(*command, cwd=tmp_path)


@pytest.mark.long
def test_camera_bytes_from_the_command_line(checkpoint, tmp_path):
    command = ["anomalib", "export", "--model", "CflowPlugin", "--model.backbone", "gabor", "--ckpt_path", checkpoint]
    options = ["--export_root", "exported", "--onnx_kwargs.camera_bytes", "true"]
    run_command(*command, "--export_type", "openvino", *options, cwd=tmp_path)
    model = ov.Core().read_model(next(tmp_path.rglob("model.xml")))
    assert model.input(0).element_type == ov.Type.u8
    assert str(model.input(0).partial_shape) == "[1,?,?,3]"


# The samples


def check_sample(command: list, pictures, expected, **environment: str) -> None:
    run = subprocess.run(
        [*map(str, command), *map(str, pictures)], capture_output=True, text=True, env={**os.environ, **environment}
    )
    assert run.returncode == 0, run.stderr[-2000:]
    lines = [line.rsplit(" ", 2) for line in run.stdout.strip().splitlines()]
    assert [line[0] for line in lines] == [str(path) for path in pictures]
    for (_, score, decision), path in zip(lines, pictures, strict=True):
        assert float(score) == pytest.approx(float(expected[path].pred_score), abs=1e-4)
        assert decision == ("anomalous" if expected[path].pred_label.item() else "good")


def test_sample_openvino_python(camera_file, pictures, expected):
    check_sample([sys.executable, EXAMPLES / "openvino_python.py", camera_file], pictures, expected)


def test_sample_onnxruntime_python(export, pictures, expected):
    check_sample([sys.executable, EXAMPLES / "onnxruntime_python.py", export(None, "onnx")], pictures, expected)


@pytest.mark.parametrize("kind", ["openvino", "onnx"])
def test_sample_model_api_python(kind, export, pictures, expected):
    if find_spec("model_api") is None:
        pytest.skip("openvino-model-api is not installed")
    check_sample([sys.executable, EXAMPLES / "model_api_python.py", export(None, kind)], pictures, expected)


def test_model_api_takes_camera_bytes(camera_file, pictures, expected):
    adapters = pytest.importorskip("model_api.adapters")
    models = pytest.importorskip("model_api.models")
    model = models.Model.create_model(
        adapters.OpenvinoAdapter(adapters.create_core(), str(camera_file), device="CPU", plugin_config=F32)
    )
    for picture in pictures:
        result = model(np.asarray(Image.open(picture))[..., ::-1].copy())
        assert float(result.pred_score) == pytest.approx(float(expected[picture].pred_score), abs=1e-4)
        assert (result.pred_label == "True") == bool(expected[picture].pred_label)


def test_model_api_on_a_fixed_size(trained, export, tmp_path):
    """Images of the size that the file was made for; others are resized by the wrapper, without smoothing."""
    if find_spec("model_api") is None:
        pytest.skip("openvino-model-api is not installed")
    picture = tmp_path / "0.png"
    Image.fromarray(draw("weave", "hole", "test", 1, size=64).image).save(picture)
    with torch.no_grad():
        expected = {picture: trained(tensor_of(picture))}
    check_sample([sys.executable, EXAMPLES / "model_api_python.py", export((64, 64))], [picture], expected)


@pytest.mark.parametrize("runtime", ["onnxruntime-node", "onnxruntime-web"])
def test_sample_node(runtime, export, pictures, expected, monkeypatch):
    modules = os.environ.get("CFLOW_NODE_MODULES")  # the folder in which `npm install` was run
    if shutil.which("node") is None or modules is None or not (Path(modules) / "node_modules" / runtime).is_dir():
        pytest.skip("needs Node, and CFLOW_NODE_MODULES=FOLDER with onnxruntime-node, onnxruntime-web and pngjs")
    monkeypatch.chdir(modules)
    check_sample(["node", EXAMPLES / "onnxruntime_node.mjs", export(None, "onnx")], pictures, expected, RUNTIME=runtime)


@pytest.mark.long
def test_sample_cpp(camera_file, pictures, expected, tmp_path):
    if shutil.which("cmake") is None or shutil.which("c++") is None:
        pytest.skip("needs CMake and a C++ compiler")
    folder = Path(ov.__file__).parent
    for command in (
        ["cmake", "-S", EXAMPLES / "openvino_cpp", "-B", tmp_path, f"-DOpenVINO_DIR={folder / 'cmake'}"],
        ["cmake", "--build", tmp_path],
    ):
        built = subprocess.run(command, capture_output=True, text=True)
        assert built.returncode == 0, built.stdout[-2000:] + built.stderr[-2000:]
    results = {}
    for picture in pictures:
        results[tmp_path / f"{picture.stem}.ppm"] = expected[picture]
        Image.open(picture).save(tmp_path / f"{picture.stem}.ppm")
    command = [tmp_path / "score_images", camera_file]
    check_sample(command, list(results), results, LD_LIBRARY_PATH=str(folder / "libs"))
