"""Score a large collection of images with an exported model."""

__all__ = ["score"]

import hashlib
import logging
import time
from pathlib import Path
from typing import Literal

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from cflow_plugin.commands.score.engines import score_here, score_on_ray
from cflow_plugin.commands.score.listing import list_images
from cflow_plugin.commands.score.parts import ScoreTable
from cflow_plugin.commands.score.scorer import Settings
from cflow_plugin.deploy.runtime import read_exported
from cflow_plugin.errors import CflowError

logger = logging.getLogger(__name__)


def score(
    model: Path,
    source: str,
    output: Path = Path("results/scores"),
    maps: bool = False,
    engine: Literal["local", "ray"] = "local",
    address: str | None = None,
    workers: int | None = None,
    threads: int | None = None,
    batch: int = 64,
    device: str = "CPU",
    precision: Literal["f32", "bf16", "f16"] = "f32",
) -> None:
    """Score a collection of images of any number, on this machine or on a Ray cluster.

    The output folder gets Parquet files with columns path, score, anomalous, p_value (where the model was trained with
    a false-alarm rate), error, width, height and regions (as JSON), to be read as one table (for example with
    pandas.read_parquet). _regions.csv and _regions.coco.json beside them list all regions. An image that cannot be
    read has a row whose error says why, and no score. The command can be interrupted or killed: started again, it
    scores only images that have no score yet, and those that were changed since.

    Args:
        model: The .xml (or .onnx) file that ``anomalib export`` wrote.
        source: A folder, with all folders below it; a pattern such as ``'line 3/**/*.png'``, in quotes; or a Parquet
            file (or a folder of them) with a column path; relative paths in it start at the working directory.
        output: Folder for the scores.
        maps: Add a column anomaly_map: the map as an 8-bit PNG, 255 for 1.
        engine: local uses this process; ray uses workers of a Ray cluster, and needs pip install "cflow-plugin[ray]".
        address: A Ray cluster's host:port, or auto on one of its machines; model, images and output must be files that
            all its machines see under the same names. Without it ray uses this machine.
        workers: Ray workers; by default as many as there are CPUs for.
        threads: CPU threads, with ray those of a worker; by default all, with ray 1.
        batch: Images in an output file; also what is lost when the command is killed.
        device: OpenVINO device, for example CPU, GPU or AUTO.
        precision: What OpenVINO computes in where the model is not INT8.
    """
    for name, value in {"workers": workers, "threads": threads, "batch": batch}.items():
        if value is not None and value < 1:
            message = f"--{name} must be at least 1, got {value}."
            raise CflowError(message)
    if engine == "local" and (address is not None or workers is not None):
        message = "--address and --workers are for --engine ray; the local engine uses --threads."
        raise CflowError(message)
    read_exported(model)  # raises before anything is listed
    images = list_images(source)
    parts = ScoreTable(output, maps)
    settings = Settings(model.absolute(), Path.cwd(), maps, device, precision, threads)
    console = Console()
    with parts.opened(
        {"model": _fingerprint(model), "precision": precision, "maps": maps, "columns": parts.schema.names}
    ):
        batches = parts.missing(images, batch)
        todo, errors = sum(map(len, batches)), 0
        if todo < len(images):
            console.print(f"{len(images) - todo} of {len(images)} images are scored already ({parts.folder}).")
        if todo:
            if engine == "local":
                running = score_here(batches, parts, settings)
            else:
                running = score_on_ray(batches, parts, settings, address, workers)
            start = time.monotonic()
            with Progress(
                TextColumn("{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TimeRemainingColumn(),
                console=console,
                transient=True,
            ) as progress:
                task = progress.add_task("Scoring", total=todo)
                for done in running:
                    errors += done.errors
                    progress.advance(task, done.images)
                    speed = progress.tasks[0].completed / (time.monotonic() - start)
                    progress.update(task, description=f"Scoring, {speed:.0f} images/s")
            spent = time.monotonic() - start
            logger.info("%d images in %.1f s, %.1f a second.", todo, spent, todo / spent)
            if errors:
                what = "1 image" if errors == 1 else f"{errors} images"
                logger.warning("%s could not be scored; the column error says why.", what)
        parts.write_regions()  # also where a run was killed before it came to this
    logger.info("Scores are in %s.", parts.folder)
    if todo == len(images) == errors:
        message = f"None of the {todo} images could be scored; the column error in {parts.folder} says why."
        raise CflowError(message)


def _fingerprint(model: Path) -> str:
    """A hash of the model's files, so that scores of two models are not mixed."""
    content = hashlib.sha256()
    for file in (model, model.with_suffix(".bin"), model.with_name(f"{model.name}.data")):
        if file.is_file():
            with file.open("rb") as opened:
                while piece := opened.read(1 << 20):
                    content.update(piece)
    return content.hexdigest()
