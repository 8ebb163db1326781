"""Train and test models side by side, and report on it."""

__all__ = ["compare"]

import itertools
import json
import logging
import multiprocessing
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any, Literal

import pandas as pd
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from cflow_plugin.anomalib_patches.error_hook import explain
from cflow_plugin.anomalib_patches.telemetry import switch_off_telemetry
from cflow_plugin.commands.compare.cell import METRICS, MODELS, Cell, DataSet, EncoderChoice, Job, Variant, run_cell
from cflow_plugin.commands.compare.on_ray import run_on_ray
from cflow_plugin.commands.compare.report import write_report
from cflow_plugin.commands.machine import Machine, describe_machine
from cflow_plugin.errors import CflowError
from cflow_plugin.files import atomic_file
from cflow_plugin.model import weights
from cflow_plugin.model.encoder import Encoder

logger = logging.getLogger(__name__)


def compare(
    data: list[DataSet],
    models: list[str] = list(MODELS),  # noqa: B006  shown in --help
    variants: dict[str, Variant] = {},  # noqa: B006
    encoders: list[EncoderChoice] = [EncoderChoice()],  # noqa: B006, B008
    seeds: list[int] = [0],  # noqa: B006
    image_size: tuple[int, int] = (256, 256),
    threads: int = 2,
    keep_weights: bool = False,
    output: Path = Path("results/comparison"),
    engine: Literal["local", "ray"] = "local",
    address: str | None = None,
) -> None:
    """Train and test models on the same data, with the same encoder and by the same protocol, and write a report.

    Every model meets every encoder, category and seed. Each of these cells runs in a process of its own and is added to
    results.csv when it is done; started again, the command runs only cells that are not there yet. Metrics are of the
    model after its last epoch; no threshold is fitted before the test. The report (report.html, and report.md) shows
    accuracy, cost, curves and pictures, and the paper's published figures beside the measured ones.

    Args:
        data: Data sets and their categories, e.g. '[{name: MVTecAD, categories: [screw, tile]}]'; names and
            settings are those of anomalib's image data modules.
        models: Which of the models; UFLOW is CflowPlugin without positional condition, Cflow is anomalib's own.
        variants: More models, by a title of your own, e.g.
            '{eight blocks: {model: CflowPlugin, settings: {coupling_blocks: 8}}}'.
        encoders: Encoders that all models share, with local weights where there is no internet access, e.g.
            '[{backbone: resnet18, layers: [layer2, layer3], weights: resnet18.safetensors}]'.
        seeds: Seeds; the report gives mean and standard deviation over them.
        image_size: Height and width that images are resized to.
        threads: CPU threads of a training.
        keep_weights: Keep the checkpoints; without it only figures and curves are kept.
        output: Folder for results and report; what is there already is not run again.
        engine: local trains one cell after another; ray trains as many at once as a Ray cluster has CPUs for, and needs
            pip install "cflow-plugin[ray]".
        address: A Ray cluster's host:port, or auto on one of its machines; data, weights and output must be files that
            all its machines see under the same names. Without it ray uses this machine.
    """
    if engine == "local" and address is not None:
        message = "--address is for --engine ray."
        raise CflowError(message)
    console = Console()
    cells = _plan(data, models, variants, encoders, seeds, image_size)
    output.mkdir(parents=True, exist_ok=True)
    machine = describe_machine(threads)
    console.print(f"{machine['processor']}, {threads} threads; " + ", ".join(machine["versions"].values()))
    console.print("Tested is the model of the last epoch; no threshold or constant is fitted to test images or labels.")
    results = _Results(output / "results.csv")
    todo = [cell for cell in cells if cell.key not in results.keys]
    if len(todo) < len(cells):
        console.print(f"{len(cells) - len(todo)} of {len(cells)} cells are done already ({results.file}).")
    if todo:
        _fetch_weights(encoders)
    failed: dict[str, str] = {}
    with Progress(
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), console=console
    ) as progress:
        task = progress.add_task("Comparing", total=len(todo))
        job = Job(output.absolute(), threads, keep_weights)
        if engine == "local":
            finished = _run(todo, job, lambda cell: progress.update(task, description=str(cell)))
        else:
            finished = run_on_ray(todo, job, address) if todo else iter(())
        for cell, row in finished:
            progress.advance(task)
            if isinstance(row, str):
                failed[str(cell)] = row
                progress.console.print(f"[red]{cell}: {row}", soft_wrap=True, highlight=False)
                continue
            results.add(cell, row, machine)
            figures = ", ".join(f"{metric} {row[metric]:.4f}" for metric in METRICS if metric in row)
            progress.console.print(f"{cell}: {figures}, {row['train_seconds']:.1f} s", soft_wrap=True, highlight=False)
    table = results.of([cell.key for cell in cells])
    if len(table):
        report = write_report(table, machine, output)
        console.print(f"The report is {report.resolve()}, the figures are in {results.file.resolve()}.", soft_wrap=True)
    if failed:
        message = (
            f"{len(failed)} of {len(cells)} cells failed, the first one for this reason: {next(iter(failed.values()))} "
            "All others are kept; the same command runs only what is missing."
        )
        raise CflowError(message)


def _plan(
    data: list[DataSet],
    models: list[str],
    variants: dict[str, Variant],
    encoders: list[EncoderChoice],
    seeds: list[int],
    image_size: tuple[int, int],
) -> list[Cell]:
    """All cells, in the order in which they are run: a category's models follow each other."""
    unknown = [name for name in models if name not in MODELS]
    if unknown:
        message = f"There is no model {unknown[0]!r} among models ({', '.join(MODELS)}); name others under variants."
        raise CflowError(message)
    chosen = {**{name: MODELS[name] for name in models}, **variants}
    cells = []
    for one in data:
        for category in one.categories or [None]:
            settings = {"num_workers": 0, **one.settings}
            if category is not None:
                settings["category"] = category
            title = str(category or settings.get("name") or one.name)
            cells += [
                Cell(model, variant, encoder, one.name, settings, title, seed, (image_size[0], image_size[1]))
                for encoder, seed, (model, variant) in itertools.product(encoders, seeds, chosen.items())
            ]
    if not cells:
        message = "There is nothing to compare: data, models or variants, encoders and seeds must not be empty."
        raise CflowError(message)
    return cells


def _fetch_weights(encoders: list[EncoderChoice]) -> None:
    """Raise if an encoder cannot be had: once, and before anything is trained."""
    for choice in encoders:
        encoder = Encoder(choice.backbone, choice.layers)
        if choice.weights is not None:
            weights.load_file(encoder, choice.weights)
        elif choice.pre_trained:
            weights.load_pretrained(encoder)


def _run(cells: list[Cell], job: Job, announce: Callable[[Cell], None]) -> Iterator[tuple[Cell, dict[str, Any] | str]]:
    """Run cells one after another, each in a process of its own; a row of results, or why there is none."""
    for cell in cells:
        announce(cell)
        try:
            with ProcessPoolExecutor(1, multiprocessing.get_context("spawn"), switch_off_telemetry) as executor:
                yield cell, executor.submit(run_cell, cell, job).result()
        except BrokenProcessPool:
            yield cell, "its process died, probably for lack of memory."
        except Exception as error:  # one cell's failure must not cost the others
            logger.debug("A cell failed.", exc_info=True)
            yield cell, explain(error) or f"{type(error).__name__}: {error}".splitlines()[0]


class _Results:
    """The tidy file: a row for each finished cell. It is replaced as a whole, so it is never half written."""

    def __init__(self, file: Path) -> None:
        self.file = file
        self._rows = pd.DataFrame()
        if file.exists():
            try:
                self._rows = pd.read_csv(file)
                self._rows["key"]
            except (ValueError, KeyError) as error:
                message = f"{file} is not a file of results; move it away, or choose another --output."
                raise CflowError(message) from error

    @property
    def keys(self) -> set[str]:
        """Keys of the finished cells."""
        return set(self._rows["key"]) if len(self._rows) else set()

    def of(self, keys: list[str]) -> pd.DataFrame:
        """The rows of these cells, in their order."""
        if not len(self._rows):
            return self._rows
        return self._rows.set_index("key", drop=False).reindex([key for key in keys if key in self.keys])

    def add(self, cell: Cell, row: dict[str, Any], machine: Machine) -> None:
        """Add a finished cell."""
        what = {
            "key": cell.key,
            "model": cell.model,
            "anomalib_model": cell.variant.model,
            "settings": json.dumps(cell.variant.settings),
            "encoder": cell.encoder.backbone,
            "layers": " ".join(cell.encoder.layers or []),
            "data": cell.data,
            "category": cell.category,
            "size": "×".join(map(str, cell.variant.settings.get("image_size", cell.image_size))),
            "seed": cell.seed,
        }
        where = {"date": machine["date"], "processor": machine["processor"], "threads": machine["threads"]}
        where["versions"] = ", ".join(machine["versions"].values())
        elsewhere = {name: row[name] for name in where if name in row}  # where a cluster's machine says otherwise
        self._rows = pd.concat([self._rows, pd.DataFrame([{**what, **row, **where, **elsewhere}])], ignore_index=True)
        with atomic_file(self.file) as partial:
            self._rows.to_csv(partial, index=False)
