"""One cell of a comparison: which model, encoder, data and seed, and how it is trained and tested."""

__all__ = ["METRICS", "MODELS", "Cell", "DataSet", "EncoderChoice", "Job", "Variant", "build_model", "run_cell"]

import dataclasses
import hashlib
import json
import logging
import shutil
import time
import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cflow_plugin.anomalib_patches.telemetry import switch_off_telemetry

METRICS = ("image_AUROC", "pixel_AUROC", "pixel_AUPRO")


@dataclass(frozen=True)
class Variant:
    """A model with settings.

    Attributes:
        model: Name of an anomalib model.
        settings: Its arguments, where they differ from its defaults.
        max_epochs: Length of training; by default the model's own.
    """

    model: str
    settings: dict[str, Any] = field(default_factory=dict)
    max_epochs: int | None = None


@dataclass(frozen=True)
class EncoderChoice:
    """The encoder that all models of a comparison share.

    Attributes:
        backbone: timm's name.
        layers: Layers that features are taken from; by default each model's own.
        weights: Local file with its weights (.safetensors); by default timm's are downloaded.
        pre_trained: ``false`` leaves it untrained.
    """

    backbone: str = "resnet18"
    layers: list[str] | None = None
    weights: Path | None = None
    pre_trained: bool = True


@dataclass(frozen=True)
class DataSet:
    """An anomalib image data module and those of its categories that are wanted.

    Attributes:
        name: Name of an anomalib data module.
        categories: Categories; none for a data module that has no categories.
        settings: Its other arguments.
    """

    name: str
    categories: list[str] = field(default_factory=list)
    settings: dict[str, Any] = field(default_factory=dict)


# Cflow's own default has no end; here it gets as many epochs as CflowPlugin's recipe has.
MODELS = {
    "CflowPlugin": Variant("CflowPlugin"),
    "UFLOW": Variant("CflowPlugin", {"condition_dims": 0}),
    "Padim": Variant("Padim"),
    "Spade": Variant("Spade"),
    "Cflow": Variant("Cflow", max_epochs=8),
}
"""Models that can be compared without further words."""


@dataclass(frozen=True)
class Cell:
    """A training and test.

    Attributes:
        model: Title of the variant.
        variant: The model and its settings.
        encoder: The encoder.
        data: Name of the data module.
        data_settings: Its settings.
        category: Category, or the data's own name.
        seed: Seed of everything.
        image_size: Height and width that images are resized to.
    """

    model: str
    variant: Variant
    encoder: EncoderChoice
    data: str
    data_settings: dict[str, Any]
    category: str
    seed: int
    image_size: tuple[int, int]

    def __str__(self) -> str:
        """Name it in a line."""
        return f"{self.model}, {self.encoder.backbone}, {self.category}, seed {self.seed}"

    @property
    def key(self) -> str:
        """Name of its files: readable, and another one whenever any setting differs."""
        settings = json.dumps(dataclasses.asdict(self), sort_keys=True, default=str)
        readable = "-".join((self.model, self.encoder.backbone, self.category, str(self.seed)))
        readable = "".join(letter if letter.isalnum() or letter in "-_." else "_" for letter in readable)
        return f"{readable}-{hashlib.sha256(settings.encode()).hexdigest()[:8]}"


@dataclass(frozen=True)
class Job:
    """What all cells of a comparison share beside their settings.

    Attributes:
        folder: Results go below ``cells/`` there.
        threads: CPU threads of a training.
        keep_weights: Keep the checkpoints that training writes; the largest are gigabytes.
    """

    folder: Path
    threads: int
    keep_weights: bool


def build_model(variant: Variant, encoder: EncoderChoice, image_size: tuple[int, int]) -> Any:
    """Build a model as a comparison trains it: the given encoder, the same evaluator, no pictures.

    Args:
        variant: Model and settings; ``image_size`` among them has precedence.
        encoder: The encoder.
        image_size: Height and width in pixels.

    Raises:
        CflowError: If the model is unknown, or the weights do not fit.
    """
    from anomalib.models import get_model

    from cflow_plugin.errors import CflowError
    from cflow_plugin.metrics.evaluator import CflowEvaluator

    ours = variant.model in {"CflowPlugin", "Spade"}
    given: dict[str, Any] = {"backbone": encoder.backbone, "layers": encoder.layers, "image_size": tuple(image_size)}
    given["pre_trained"] = encoder.pre_trained and (ours or encoder.weights is None)
    if ours:
        given["weights"] = encoder.weights and str(encoder.weights)
    if variant.model == "Spade" and encoder.layers:
        given["image_layer"] = encoder.layers[-1]
    if variant.model == "CflowPlugin":
        given["target_false_alarm_rate"] = None  # all models train on the same images
    settings = given | variant.settings
    if settings["layers"] is None:
        del settings["layers"]
    size = settings["image_size"]
    if not ours:
        del settings["image_size"]
    try:
        model = get_model(variant.model, evaluator=CflowEvaluator(), visualizer=False, **settings)
    except CflowError:
        raise
    except Exception as error:
        message = f"{variant.model} cannot be built with {settings} ({type(error).__name__}: {error})."
        raise CflowError(message) from error
    if not ours:
        model.pre_processor = type(model).configure_pre_processor(size)
        if encoder.weights is not None:
            _load_weights(model, encoder.weights)
    return model


def _load_weights(model: Any, file: Path) -> None:
    """Give an anomalib model's encoder the weights of a local file."""
    from anomalib.models.components.feature_extractors import TimmFeatureExtractor

    from cflow_plugin.errors import CflowError
    from cflow_plugin.model.weights import read_weights

    given = read_weights(file)
    for module in model.modules():
        if isinstance(module, TimmFeatureExtractor):
            network = module.feature_extractor
            needed = network.state_dict()
            missing = [key for key in needed if key not in given and not key.endswith("num_batches_tracked")]
            if missing:
                message = f"The weights file {file} does not fit {type(model).__name__}: it lacks {missing[0]}."
                raise CflowError(message)
            network.load_state_dict({key: given.get(key, value) for key, value in needed.items()})


def run_cell(cell: Cell, job: Job) -> dict[str, Any]:
    """Train and test one cell in this process.

    The model is trained without validation and tested as it is after the last epoch; no threshold is fitted before
    the test, so nothing but the reported F1 score depends on test labels.

    Args:
        cell: What to run; what a killed run left of it is removed.
        job: Where and how.

    Returns:
        A row of results: metrics, seconds, memory and sizes.
    """
    switch_off_telemetry()  # of a Ray worker: others have done so when they started
    import torch
    from anomalib.engine import Engine
    from lightning import seed_everything

    from cflow_plugin.commands.compare.record import Recorder
    from cflow_plugin.commands.machine import peak_resident_bytes

    torch.set_num_threads(job.threads)
    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)
    seed_everything(cell.seed, verbose=False)
    model = build_model(cell.variant, cell.encoder, cell.image_size)
    datamodule = _build_data(cell)
    recorder = Recorder()
    length = {} if cell.variant.max_epochs is None else {"max_epochs": cell.variant.max_epochs}
    home = job.folder / "cells" / cell.key
    shutil.rmtree(home, ignore_errors=True)
    engine = Engine(
        default_root_dir=home / "training",
        callbacks=[recorder],
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        limit_val_batches=0,
        **length,
    )
    start = time.perf_counter()
    engine.fit(model, datamodule=datamodule)
    train_seconds = time.perf_counter() - start
    # The model goes along, so what is tested is the last epoch's and not a checkpoint that some metric chose.
    [metrics] = engine.test(model, datamodule=datamodule, verbose=False)
    tensors = [tensor for tensor in (*model.parameters(), *model.buffers()) if tensor.is_floating_point()]
    facts = recorder.save(home / "record.npz")
    if not job.keep_weights:
        shutil.rmtree(home / "training", ignore_errors=True)
    return {
        **{metric: float(metrics[metric]) for metric in METRICS if metric in metrics},
        **facts,
        "train_seconds": train_seconds,
        "peak_memory_mb": peak_resident_bytes() / 1e6,
        "size_mb": sum(tensor.numel() * tensor.element_size() for tensor in tensors) / 1e6,
    }


def _build_data(cell: Cell) -> Any:
    import anomalib.data

    import cflow_plugin.data  # noqa: F401  registers what it has
    from cflow_plugin.errors import CflowError

    if not hasattr(anomalib.data, cell.data):
        message = f"anomalib has no data module {cell.data!r}; MVTecAD and Folder are two that it has."
        raise CflowError(message)
    try:
        return getattr(anomalib.data, cell.data)(**cell.data_settings)
    except (TypeError, ValueError) as error:
        message = f"{cell.data} cannot be built with {cell.data_settings} ({error})."
        raise CflowError(message) from error
