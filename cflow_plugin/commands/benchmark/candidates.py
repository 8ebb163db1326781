"""What can be timed: models, built without training, and the runtimes that execute them."""

__all__ = [
    "Candidate",
    "EncoderAlone",
    "Loaded",
    "Model",
    "Precision",
    "Runtime",
    "UnavailableError",
    "build_model",
    "export_model",
    "load",
    "unavailable",
]

import time
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import openvino as ov
import torch
from anomalib.deploy import CompressionType
from anomalib.models import get_model
from anomalib.models.components import AnomalibModule
from anomalib.models.image.padim.torch_model import PadimModel
from anomalib.post_processing import PostProcessor
from torch import nn

from cflow_plugin.anomalib_patches.thresholds import set_thresholds
from cflow_plugin.baselines.spade import Spade
from cflow_plugin.deploy.graph import InferenceGraph, convert_to_openvino, free_dimensions, with_decisions
from cflow_plugin.deploy.quantization import compress, quantize
from cflow_plugin.model.backbones import BACKBONES
from cflow_plugin.model.encoder import Encoder
from cflow_plugin.model.quantized import measure_ranges
from cflow_plugin.modules import in_full_single_precision
from cflow_plugin.training.lightning_model import CflowPlugin

Model = Literal["CflowPlugin", "CflowPlugin-int8", "encoder", "Cflow", "Padim", "Spade"]
Runtime = Literal["torch", "torch-compiled", "torch-cuda", "openvino", "openvino-gpu", "onnxruntime"]
Precision = Literal["f32", "bf16", "f16", "int8", "int8-bf16"]


# Its time depends on the images it retrieves, not on how many more the gallery holds; its size does.
_SPADE_IMAGES = 60
# Of which CflowPlugin notes the features' means: enough for all directions that it keeps.
_IMAGES = 300
_RESNET_LAYERS = (("layer1", "layer2", "layer3"), "layer4")  # of the pyramid, and of the whole image
_SPADE_LAYERS = {"resnet18": _RESNET_LAYERS, "wide_resnet50_2": _RESNET_LAYERS}


class UnavailableError(RuntimeError):
    """A candidate cannot be timed here; the message says why."""


@dataclass(frozen=True)
class Candidate:
    """One thing to time.

    Attributes:
        model: ``CflowPlugin``, ``CflowPlugin-int8`` (its encoder computes in INT8 in every precision), ``encoder`` (the
            encoder alone), ``Spade``, or anomalib's ``Cflow`` or ``Padim``.
        backbone: timm's name of the encoder.
        size: Height and width of the images.
        batch: Images at once.
        runtime: What executes it.
        precision: What is asked for; what was executed in the end is reported with the figures.
    """

    model: Model
    backbone: str
    size: int
    batch: int
    runtime: Runtime
    precision: Precision

    def __str__(self) -> str:
        """Name it in a line."""
        return " ".join(map(str, asdict(self).values()))

    @property
    def file_key(self) -> tuple[str, str, int, str, str]:
        """Candidates that share this share a file."""
        kind = "onnx" if self.runtime == "onnxruntime" else "openvino"
        return self.model, self.backbone, self.size, kind, self.stored

    @property
    def stored(self) -> str:
        """What the file holds."""
        return {"bf16": "f32", "int8-bf16": "int8"}.get(self.precision, self.precision)

    @property
    def computed(self) -> str:
        """What is computed in where the file does not say: INT8 operations are in the file."""
        return {"int8": "f32", "int8-bf16": "bf16"}.get(self.precision, self.precision)


class EncoderAlone(nn.Module):
    """An encoder without anything behind it."""

    def __init__(self, backbone: str, size: int) -> None:
        super().__init__()
        self.encoder = Encoder(backbone, image_size=(size, size))

    def forward(self, images: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """The features of images ``(B, 3, H, W)``, for each layer ``(B, D_k, H_k, W_k)``."""
        return tuple(self.encoder(images))


def unavailable(candidate: Candidate) -> str | None:
    """Why a candidate cannot be timed on this machine, or ``None`` if it can."""
    runtime, precision = candidate.runtime, candidate.precision
    if runtime == "torch-cuda" and not torch.cuda.is_available():
        return "torch sees no CUDA device"
    if runtime == "openvino-gpu" and not any(name.startswith("GPU") for name in ov.Core().available_devices):
        return "OpenVINO sees no GPU"
    if runtime == "onnxruntime":
        try:
            import onnxruntime  # noqa: F401
        except ImportError:
            return "onnxruntime is not installed"
        if precision != "f32":
            return "ONNX Runtime is timed in f32 only"
    if runtime.startswith("torch") and precision not in {"f32", "bf16"}:
        return f"torch is not timed in {precision}"
    if candidate.model == "Spade" and not runtime.startswith("torch"):
        return "Spade runs in torch only: its gallery cannot be exported"
    if candidate.stored == "int8":
        if candidate.model in {"Cflow", "Padim"}:
            return "INT8 is timed for CflowPlugin and its encoder"
        try:
            import nncf  # noqa: F401
        except ImportError:
            return "nncf is not installed"
    return None


def build_model(name: Model, backbone: str, size: int) -> AnomalibModule | EncoderAlone:
    """Build a model with random weights and everything it needs to run: speed does not depend on their values.

    Args:
        name: Which model.
        backbone: timm's name of the encoder.
        size: Height and width of the images.

    Raises:
        UnavailableError: If the model does not work with that encoder.
    """
    torch.manual_seed(0)
    if name == "encoder":
        return EncoderAlone(backbone, size).eval()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if name in {"CflowPlugin", "CflowPlugin-int8"}:
            model = CflowPlugin(
                backbone=backbone,
                encoder_precision="int8" if name == "CflowPlugin-int8" else "float32",
                pre_trained=False,
                image_size=(size, size),
                visualizer=False,
            )
            with measure_ranges(model.model.encoder):
                model.model.encoder(torch.rand(1, 3, size, size))
            model.model.scoring.log_maximum.zero_()
            model.model.whole.fit(torch.rand(_IMAGES, len(model.model.whole.mean)))
            return _with_thresholds(model.eval())
        if name == "Spade":
            return _with_thresholds(_spade(backbone, size))
        try:
            layers = {"layers": list(BACKBONES[backbone].layers)} if name == "Cflow" and backbone in BACKBONES else {}
            model = get_model(name, backbone=backbone, pre_trained=False, visualizer=False, **layers).eval()
            model.pre_processor = model.configure_pre_processor((size, size))
            if isinstance(model.model, PadimModel):
                _fill_padim(model.model, size)
            model(torch.rand(1, 3, size, size))
        except Exception as error:
            message = f"anomalib's {name} does not run with {backbone} ({type(error).__name__}: {error})"
            raise UnavailableError(message.splitlines()[0]) from error
    return _with_thresholds(model)


def _spade(backbone: str, size: int) -> Spade:
    """Spade with a gallery of random images."""
    if backbone not in _SPADE_LAYERS:
        message = f"no layers are known for Spade with {backbone}"
        raise UnavailableError(message)
    layers, image_layer = _SPADE_LAYERS[backbone]
    model = Spade(backbone, layers, image_layer, pre_trained=False, image_size=(size, size), visualizer=False).eval()
    for _ in range(_SPADE_IMAGES):
        model.model.gallery.add(*model.model.features(torch.rand(1, 3, size, size)))
    model.model.finish_gallery()
    return model


def _with_thresholds(model: AnomalibModule) -> AnomalibModule:
    """Give the post-processing the ranges and thresholds that a validation would."""
    processor = model.post_processor
    assert isinstance(processor, PostProcessor)  # what all these models have by default
    for name, value in (("min", 0.0), ("max", 1.0)):
        getattr(processor, f"image_{name}").fill_(value)
        getattr(processor, f"pixel_{name}").fill_(value)
    set_thresholds(processor, 0.5, 0.5)
    return model


def _fill_padim(model: PadimModel, size: int) -> None:
    """Give Padim the statistics that training would: a mean and an inverse covariance for each position."""
    with torch.no_grad():
        embedding = model.generate_embedding(model.feature_extractor(torch.rand(1, 3, size, size)))
    positions = embedding.shape[-2] * embedding.shape[-1]
    features = embedding.shape[1]
    model.gaussian.mean = torch.zeros(features, positions)
    model.gaussian.inv_covariance = torch.eye(features).repeat(positions, 1, 1)


def export_model(model: AnomalibModule | EncoderAlone, candidate: Candidate, folder: Path) -> tuple[Path, float]:
    """Write the file that the candidate's runtime reads.

    Args:
        model: What :func:`build_model` returned.
        candidate: Says for which runtime and precision.
        folder: Where to.

    Returns:
        The file, and the seconds it took.
    """
    size = (candidate.size, candidate.size)
    start = time.perf_counter()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if isinstance(model, EncoderAlone):
            path = _export_encoder(model, candidate, folder)
        elif candidate.runtime == "onnxruntime":
            options: dict[str, Any] = {"batch": None} if isinstance(model, CflowPlugin) else {}
            path = model.to_onnx(folder, input_size=size, **options)
        elif candidate.stored in {"f16", "int8"} and isinstance(model, CflowPlugin):
            path = _compressed(model, candidate, folder)
        else:
            half = CompressionType.FP16 if candidate.stored == "f16" else None
            options = {"batch": None} if isinstance(model, CflowPlugin) else {}
            path = model.to_openvino(folder, input_size=size, compression_type=half, ov_kwargs=options)
    return path, time.perf_counter() - start


def _export_encoder(model: EncoderAlone, candidate: Candidate, folder: Path) -> Path:
    example = torch.zeros(2, 3, candidate.size, candidate.size)
    shapes = free_dimensions((candidate.size, candidate.size))
    if candidate.runtime == "onnxruntime":
        path = folder / "encoder.onnx"
        torch.onnx.export(model, (example,), path, dynamo=True, dynamic_shapes=shapes, opset_version=18, verbose=False)
        return path
    converted = ov.convert_model(torch.export.export(model, (example,), dynamic_shapes=shapes, strict=False))
    if candidate.stored == "int8":
        import nncf

        converted = nncf.quantize(converted, nncf.Dataset(_random_images(candidate.size)))
    path = folder / "encoder.xml"
    ov.save_model(converted, path, compress_to_fp16=candidate.stored in {"f16", "int8"})
    return path


def _compressed(model: CflowPlugin, candidate: Candidate, folder: Path) -> Path:
    converted = convert_to_openvino(model, (candidate.size, candidate.size))
    if candidate.stored == "int8":
        converted = quantize(converted, _random_images(candidate.size))
    else:
        converted = compress(converted, CompressionType.FP16)
    path = folder / "model.xml"
    ov.save_model(with_decisions(converted, model.post_processor), path, compress_to_fp16=False)
    return path


def _random_images(size: int, count: int = 4) -> list[np.ndarray]:
    """Images to take INT8 ranges from: speed does not depend on the ranges."""
    generator = np.random.default_rng(0)
    return [generator.random((1, 3, size, size), dtype=np.float32) for _ in range(count)]


@dataclass
class Loaded:
    """A candidate ready to run.

    Attributes:
        run: Runs one batch and waits for the result.
        executed: The precision that is executed.
        queue: Runs this many batches as fast as it can, several at a time, or ``None`` where there is no such mode.
        seconds: How long compiling it took, where that is no export.
    """

    run: Callable[[], object]
    executed: str
    queue: Callable[[int], object] | None = None
    seconds: float | None = None


def load(candidate: Candidate, source: Path | nn.Module, threads: int) -> Loaded:
    """Make a candidate ready to run.

    Args:
        candidate: What to run and how.
        source: The exported file, or the model itself for torch.
        threads: Threads to use on a CPU.
    """
    images = np.random.default_rng(0).random((candidate.batch, 3, candidate.size, candidate.size), dtype=np.float32)
    if isinstance(source, nn.Module):
        return _load_torch(candidate, source, images)
    if candidate.runtime == "onnxruntime":
        return _load_onnxruntime(source, images, threads)
    return _load_openvino(candidate, source, images, threads)


def _load_torch(candidate: Candidate, model: nn.Module, images: np.ndarray) -> Loaded:
    cuda = candidate.runtime == "torch-cuda"
    device = "cuda" if cuda else "cpu"
    compiled = candidate.runtime == "torch-compiled"
    if compiled:  # the same without checks, as in an exported file
        model = InferenceGraph(model, (candidate.size, candidate.size)) if isinstance(model, CflowPlugin) else model
        model.compile()
    model, batch = model.to(device), torch.from_numpy(images).to(device)
    lower = candidate.precision == "bf16"

    def run() -> object:
        autocast = torch.autocast(device, torch.bfloat16, enabled=lower)
        with torch.inference_mode(), in_full_single_precision(), autocast:  # f32 is f32, not TF32
            result = model(batch)
        if cuda:
            torch.cuda.synchronize()
        return result

    seconds = None
    if compiled:
        start = time.perf_counter()
        try:
            run()
        except Exception as error:
            message = f"torch.compile ends with {type(error).__name__}: {error}"
            raise UnavailableError(message.splitlines()[0]) from error
        seconds = time.perf_counter() - start
    return Loaded(run, "bf16 (autocast)" if lower else "f32", seconds=seconds)


def _load_onnxruntime(path: Path, images: np.ndarray, threads: int) -> Loaded:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    feed = {session.get_inputs()[0].name: images}
    return Loaded(lambda: session.run(None, feed), "f32")


def _load_openvino(candidate: Candidate, path: Path, images: np.ndarray, threads: int) -> Loaded:
    core = ov.Core()
    device = "GPU" if candidate.runtime == "openvino-gpu" else "CPU"
    model = core.read_model(path)
    model.reshape(images.shape)
    settings: dict[str, str | int] = {"INFERENCE_PRECISION_HINT": candidate.computed}
    if device == "CPU":
        settings["INFERENCE_NUM_THREADS"] = threads
    compiled = core.compile_model(model, device, {**settings, "PERFORMANCE_HINT": "LATENCY"})
    request = compiled.create_infer_request()
    fast = core.compile_model(model, device, {**settings, "PERFORMANCE_HINT": "THROUGHPUT"})
    requests = ov.AsyncInferQueue(fast)

    def queue(count: int) -> None:
        for _ in range(count):
            requests.start_async([images])
        requests.wait_all()

    return Loaded(lambda: request.infer([images]), _executed(compiled), queue)


def _executed(compiled: ov.CompiledModel) -> str:
    """The precisions of the convolutions and matrix products that OpenVINO executes, most frequent first."""
    counts: dict[str, int] = {}
    for node in compiled.get_runtime_model().get_ops():
        info = node.get_rt_info()
        kind = info["layerType"].astype(str) if "layerType" in info else ""
        if kind in {"Convolution", "MatMul", "FullyConnected"}:
            precision = info["runtimePrecision"].astype(str)
            counts[precision] = counts.get(precision, 0) + 1
    return ", ".join(f"{name} ({count})" for name, count in sorted(counts.items(), key=lambda item: -item[1]))
