"""Exported files in every runtime at hand: the same scores and decisions, whatever an image's size; and the samples."""

import logging
import os
import re
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec
from pathlib import Path

import cv2
import numpy as np
import onnx
import onnxruntime
import openvino as ov
import pytest
import torch
from anomalib.pre_processing import PreProcessor
from openvino import opset13 as operations
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

from cflow_plugin import CflowError, CflowPlugin
from cflow_plugin.commands.check.runtimes import NotHereError, Runtime, runtimes_for
from cflow_plugin.data.textures import draw
from cflow_plugin.deploy import export as export_module
from cflow_plugin.deploy import onnx_file
from cflow_plugin.deploy.fingerprint import result_of
from cflow_plugin.deploy.openvino_input import take_bytes, take_other_sizes
from cflow_plugin.deploy.resizing import ExactResize
from cflow_plugin.deploy.runtime import compile_exported

from .brightness import save_brightness_model
from .conftest import once, run_command
from .test_export import F32, assert_agrees, check_in_onnxruntime, images_of, random_model, run_openvino

EXAMPLES = Path(__file__).parent.parent / "examples"
_random = np.random.default_rng(1)
SIZES = [(64, 64), (32, 32), (70, 200), (301, 97), (800, 600), (3000, 4000)]
SIZES += [tuple(size) for size in np.exp(_random.uniform(np.log(32), np.log(900), (44, 2))).astype(int).tolist()]
NODE_RUNTIMES = ["onnxruntime-node", "onnxruntime-web"]
EIGHT_BITS = 40  # of the fifty; the others have 12 in 16


def test_threads_get_the_results_of_their_own_images(tmp_path):
    scorer = compile_exported(save_brightness_model(tmp_path / "model.xml"), "CPU", "f32")
    images = [np.full((1, 300, 300, 3), value, np.uint8) for value in range(0, 240, 40)]
    expected = [float(scorer([image])["pred_score"].item()) for image in images]
    assert len(set(expected)) == 6
    calls = [number % 6 for number in range(1200)]
    with ThreadPoolExecutor(4) as threads:
        found = list(threads.map(lambda number: float(scorer([images[number]])["pred_score"].item()), calls))
    assert found == pytest.approx([expected[number] for number in calls], abs=1e-6)


@pytest.mark.parametrize("new", [(64, 64), (33, 70), (300, 200)])
@pytest.mark.parametrize("old", [(64, 64), (100, 75), (32, 500), (2000, 31)])
@pytest.mark.parametrize("mode", ["bilinear", "bicubic"])
def test_the_resizing_is_torch_s(old, new, mode):
    pixels = np.random.default_rng(0).integers(0, 256, (*old, 3), dtype=np.uint8)
    images = torch.from_numpy(pixels[..., ::-1].copy()).permute(2, 0, 1)[None] / 255
    expected = functional.interpolate(images.double(), new, mode=mode, antialias=True).float()
    torch.testing.assert_close(ExactResize(new, mode)(images), expected, rtol=0, atol=2e-5)
    # And a file's, of camera bytes.
    given = operations.parameter([1, 3, *new], ov.Type.f32)
    model = ov.Model([operations.multiply(given, np.float32(1))], [given], "nothing")
    take_other_sizes(model, mode)
    take_bytes(model)
    found = torch.from_numpy(ov.Core().compile_model(model, "CPU", F32)(pixels[None])[0])
    torch.testing.assert_close(found, expected, rtol=0, atol=2e-6)
    if old == new and mode == "bilinear":
        assert torch.equal(ExactResize(new)(images), images)


@pytest.mark.parametrize("old", [(50, 80), (80, 50), (60, 60)])
def test_a_size_of_the_shorter_side(old):
    images = torch.rand(1, 3, *old)
    torch.testing.assert_close(ExactResize([40])(images), Resize(40, antialias=True)(images), rtol=0, atol=2e-6)


def write_picture(path: Path, number: int) -> Path:
    """Pictures of many sizes; in the large ones is noise, which a reduction without smoothing takes for defects."""
    height, width = SIZES[number]
    kind = "hole" if number % 2 else "good"
    texture = Image.fromarray(draw("weave", kind, "test", number, size=64).image).resize((width, height))
    noise = (
        np.random.default_rng(number).normal(0, 25, (256, 256, 3)) if height * width > 10_000 else np.zeros((1, 1, 3))
    )
    noise = np.tile(noise, (height // len(noise) + 1, width // len(noise) + 1, 1))[:height, :width]
    values = (np.asarray(texture) + noise).clip(0, 255)
    deep = (values[..., 0] / 255 * 4095).astype(np.uint16)
    cv2.imwrite(str(path), values.astype(np.uint8)[..., ::-1] if number < EIGHT_BITS else deep)
    return path


def pixels_of(path: Path) -> np.ndarray:
    """As a camera gives them: blue first, a grey one three times."""
    found = cv2.imread(str(path), cv2.IMREAD_UNCHANGED)
    return found if found.ndim == 3 else np.repeat(found[..., None], 3, 2)


def tensor_of(path: Path) -> torch.Tensor:
    found = np.asarray(Image.open(path))
    found = found / np.float32(np.iinfo(found.dtype).max)
    return (
        torch.from_numpy(found)[None].permute(0, 3, 1, 2)
        if found.ndim == 3
        else torch.from_numpy(found).expand(1, 3, -1, -1)
    )


@pytest.fixture(scope="module")
def camera_file(trained, common):
    def write(folder: Path) -> None:
        trained.to_openvino(folder, ov_kwargs={"camera_bytes": True})

    return next(once(common / "camera bytes", write).rglob("model.xml"))


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pictures")
    return [write_picture(folder / f"{number}.png", number) for number in range(5)]


@torch.no_grad()
def expected_of(model, paths):
    found = {path: model(tensor_of(path)) for path in paths}
    assert len({round(float(result.anomaly_map.mean()), 5) for result in found.values()}) == len(found)
    return found


@pytest.fixture(scope="module")
def expected(trained, pictures):
    found = expected_of(trained, pictures)
    assert len({round(float(result.pred_score), 3) for result in found.values()}) > 1
    return found


@pytest.mark.long
@pytest.mark.parametrize("bits", [8, 12])
def test_fifty_images_in_every_runtime(bits, trained, export, camera_file, trained_on_12_bits, tmp_path):
    """The same scores, maps and decisions as torch's; what does not take a file says so."""
    numbers = range(EIGHT_BITS) if bits == 8 else range(EIGHT_BITS, len(SIZES))
    paths = [write_picture(tmp_path / f"{number}.png", number) for number in numbers]
    model, files = trained, {"xml": export(None), "onnx": export(None, "onnx"), "camera": camera_file}
    if bits == 12:
        model = CflowPlugin.load_from_checkpoint(trained_on_12_bits / "model.ckpt", map_location="cpu").eval()
        files = {kind: next(trained_on_12_bits.rglob(f"model.{kind}")) for kind in ("xml", "onnx")}
        files["camera"] = model.to_openvino(tmp_path / "camera", ov_kwargs={"camera_bytes": True})
    expected = expected_of(model, paths)
    pixels = {path: pixels_of(path) for path in paths}
    ran, refused = set(), {}
    for kind, file in files.items():
        read = ov.Core().read_model(file)
        runtimes = runtimes_for(file, read, model if kind == "onnx" else None)
        if kind != "onnx":
            scorer = compile_exported(file, "CPU", "f32")
            runtimes.append(
                Runtime("score and watch", lambda scorer=scorer: lambda pixels: result_of(scorer([pixels[None]])))
            )
        for runtime in runtimes:
            if kind == "onnx" and ("model-api" in runtime.name or "OpenVINOInferencer" in runtime.name):
                continue  # as OpenVINO, which reads the file for them
            try:
                run = runtime.open()
            except NotHereError as error:
                refused[kind, runtime.name] = str(error)
                continue
            ran.add((kind, runtime.name))
            for path, wanted in expected.items():
                found = run(pixels[path])
                assert found.score == pytest.approx(float(wanted.pred_score), abs=1e-4), (kind, runtime.name, path.name)
                assert found.label == bool(wanted.pred_label)
                if found.map is not None:
                    np.testing.assert_allclose(found.map, wanted.anomaly_map[0, 0].numpy(), rtol=0, atol=1e-4)
    everywhere = {(kind, "OpenVINO f32") for kind in files}
    everywhere |= {("xml", name) for name in ("anomalib OpenVINOInferencer", "score and watch")}
    assert ran >= everywhere | {("onnx", name) for name in ("ONNX Runtime", "torch", "anomalib TorchInferencer")}
    if find_spec("model_api"):
        assert {kind for kind, name in ran if name == "openvino-model-api"} == (
            {"xml", "camera"} if bits == 8 else {"camera"}
        )
    assert all(re.match("it takes|not installed", words) for words in refused.values()), refused


def test_one_file_of_plain_operations(export):
    """It can be copied alone, and holds no operation whose meaning is a runtime's own."""
    path = export(None, "onnx")
    assert [file.name for file in path.parent.iterdir()] == ["model.onnx"]
    assert_plain(path)


def assert_plain(path):
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


def test_weights_beside_the_file(tmp_path, monkeypatch, caplog):
    """As beyond 2 GB; and a score that TensorRT cannot compute is said to be one."""
    caplog.set_level(logging.INFO, "cflow_plugin")
    monkeypatch.setattr(export_module, "_ONE_FILE", 1000)
    monkeypatch.setattr(onnx_file, "_TENSORRT_TOP", 200)
    model = random_model((64, 64), backbone="gabor", layers=["scale2"], top_fraction=0.95)
    path = model.to_onnx(tmp_path)
    assert {file.name for file in path.parent.iterdir()} == {"model.onnx", "model.onnx.data"}
    assert path.stat().st_size < (tmp_path / "weights/onnx/model.onnx.data").stat().st_size
    assert_plain(path)
    assert_agrees(run_openvino(path, images_of((50, 90), 1)), model, images_of((50, 90), 1))
    check_in_onnxruntime(path, model, [(50, 90)])
    assert re.search(r"ONNX opset 18, operators Abs, Add, .*Conv, .*TopK", caplog.text)
    assert (
        "TensorRT will refuse this file: the score is the mean of the map's 243 highest pixels, and it takes 200"
        in caplog.text
    )


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
def test_camera_bytes_of_a_fixed_size_take_others_in_watch_and_score(trained, export, pictures, tmp_path):
    camera = trained.to_openvino(tmp_path, input_size=(64, 64), ov_kwargs={"camera_bytes": True})
    own, other = (compile_exported(file, "CPU", "f32") for file in (export((64, 64)), camera))
    for path in pictures:
        found, wanted = (scorer([pixels_of(path)[None]]) for scorer in (other, own))
        np.testing.assert_allclose(found["pred_score"], wanted["pred_score"], atol=1e-5)
        np.testing.assert_allclose(found["anomaly_map"], wanted["anomaly_map"], atol=1e-5)


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


def test_model_api_on_a_fixed_size(trained, export, tmp_path):
    """Images of the size that the file was made for; others are resized by the wrapper, without smoothing."""
    if find_spec("model_api") is None:
        pytest.skip("openvino-model-api is not installed")
    picture = tmp_path / "0.png"
    Image.fromarray(draw("weave", "hole", "test", 1, size=64).image).save(picture)
    with torch.no_grad():
        expected = {picture: trained(tensor_of(picture))}
    check_sample([sys.executable, EXAMPLES / "model_api_python.py", export((64, 64))], [picture], expected)


@pytest.fixture(scope="module")
def node_modules(common):
    """A folder with ONNX Runtime for Node and for browsers, from npm."""
    if shutil.which("node") is None or shutil.which("npm") is None:
        pytest.skip("needs Node and npm")

    def install(folder: Path) -> None:
        (folder / "package.json").write_text("{}")
        command = ["npm", "install", "--ignore-scripts", "--no-audit", "--no-fund", *NODE_RUNTIMES, "pngjs"]
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
        if done.returncode:
            (folder / "failed").write_text(done.stderr[-300:])

    folder = once(common / "node", install)
    if (folder / "failed").exists():
        pytest.skip(f"npm installs nothing here: {(folder / 'failed').read_text()}")
    return folder


@pytest.mark.long
@pytest.mark.parametrize("runtime", NODE_RUNTIMES)
def test_sample_node(runtime, node_modules, export, pictures, expected, monkeypatch):
    monkeypatch.chdir(node_modules)
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
