"""Training time, peak memory and accuracy beside anomalib's Cflow and Padim: same data, encoder, threads and metrics.

    python benchmarks/training.py --weights resnet18.safetensors --data DATA --categories [cookies, magnetic_tile]

DATA holds one folder a category in MVTec AD's layout. Validation is switched off on all sides, so fitting is only
training; the metrics are those of the last epoch, by the same evaluator. Every measurement runs in its own process,
one after another, so that peak memory is its own.
"""

import json
import multiprocessing
import statistics
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import torch
from anomalib.data import MVTecAD
from anomalib.engine import Engine
from jsonargparse import auto_cli
from lightning import LightningModule, Trainer, seed_everything
from lightning.pytorch.callbacks import Callback
from rich import box
from rich.console import Console
from rich.progress import track
from rich.table import Table

from cflow_plugin import CflowPlugin
from cflow_plugin.commands.machine import describe_machine, peak_resident_bytes

METRICS = ("image_AUROC", "pixel_AUROC", "pixel_AUPRO")


def measure(
    name: str, settings: dict, epochs: int | None, data: Path, category: str, weights: Path, seed: int, output: Path
) -> dict:
    """Train one model once.

    Args:
        name: ``CflowPlugin``, ``Cflow`` or ``Padim``.
        settings: Arguments of the model where they differ from ResNet-18 with two layers and the given weights, and
            the trainer's ``precision``.
        epochs: Number of epochs; ``None`` takes the model's own.
        data: Root of the data.
        category: Category.
        weights: Encoder weights in timm's names.
        seed: Seed of everything.
        output: Folder for what training writes.

    Returns:
        Seconds of ``fit``, peak resident memory in MiB after it, the metrics, and what training logged last.
    """
    from cflow_plugin.commands.compare.cell import EncoderChoice, Variant, build_model

    seed_everything(seed, verbose=False)
    precision = settings.get("precision", "32")
    settings = {key: value for key, value in settings.items() if key != "precision"}
    encoder = EncoderChoice("resnet18", ["layer2", "layer3"], weights)
    model = build_model(Variant(name, settings), encoder, (256, 256))
    datamodule = MVTecAD(root=data, category=category, num_workers=0)
    trainer = {"accelerator": "cpu", "precision": precision, "logger": False}
    trainer["enable_progress_bar"] = False
    length = {} if epochs is None else {"max_epochs": epochs}
    clock = EpochClock()
    engine = Engine(
        default_root_dir=output, enable_model_summary=False, callbacks=[clock], limit_val_batches=0, **trainer, **length
    )
    start = time.perf_counter()
    engine.fit(model, datamodule=datamodule)
    seconds = time.perf_counter() - start
    logged = {key: value.item() for key, value in engine.trainer.callback_metrics.items()}
    memory = peak_resident_bytes() / 2**20
    [metrics] = engine.test(model, datamodule=datamodule, verbose=False)
    logged |= {"epoch_seconds": statistics.median(clock.spent)} if clock.spent else {}
    return {"seconds": seconds, "peak_memory_mib": memory, **{metric: metrics[metric] for metric in METRICS}, **logged}


class EpochClock(Callback):
    """How long epochs take from start to start, the first one left out: what is done once is not an epoch's."""

    def __init__(self) -> None:
        self.spent: list[float] = []
        self._start: float | None = None

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Note the time."""
        del pl_module
        now = time.perf_counter()
        if trainer.current_epoch > 1:
            self.spent.append(now - self._start)
        self._start = now


def in_own_process(function: Callable[..., dict], *arguments: object) -> dict:
    """Call a function in a fresh process, so that its peak memory is its own."""
    with ProcessPoolExecutor(max_workers=1, mp_context=multiprocessing.get_context("spawn")) as executor:
        return executor.submit(function, *arguments).result()


def train_default(
    data: Path, category: str, weights: Path, layers: list[str], seed: int, folder: Path
) -> tuple[CflowPlugin, MVTecAD]:
    """Train and test CflowPlugin by its default recipe.

    Args:
        data: Folder with one folder a category, in MVTec AD's layout.
        category: Category.
        weights: ResNet-18 weights in timm's names.
        layers: Layers of the encoder.
        seed: Seed of everything.
        folder: Folder for what training writes.

    Returns:
        The model, in eval mode, and its data.
    """
    seed_everything(seed, verbose=False)
    # Trained on all images, and with a threshold in the midst of the test scores, where decisions turn most easily.
    model = CflowPlugin(layers=layers, weights=str(weights), visualizer=False, target_false_alarm_rate=None)
    datamodule = MVTecAD(root=data, category=category, num_workers=0)
    engine = Engine(default_root_dir=folder, accelerator="cpu", logger=False, enable_progress_bar=False)
    engine.train(model, datamodule=datamodule)
    return model.eval(), datamodule


def publish(name: str, table: Table, report: dict, output: Path) -> None:
    """Write figures as ``name.json`` and ``name.md``, and show them.

    Args:
        name: Name of the files.
        table: The figures for people.
        report: All figures; the machine they were measured on is added.
        output: Folder; it is made if need be.
    """
    output.mkdir(parents=True, exist_ok=True)
    report = {"machine": describe_machine(torch.get_num_threads()), **report}
    (output / f"{name}.json").write_text(json.dumps(report, indent=2) + "\n")
    with (output / f"{name}.md").open("w") as file:
        Console(file=file, width=1000).print(table)  # no cell may be broken: Markdown knows no lines within one
    Console(width=160).print(table)
    print(f"Results are in {output.resolve()}.")


def main(
    data: Path,
    weights: Path,
    categories: list[str],
    epochs: int = 8,
    seed: int = 0,
    only: list[str] | None = None,
    output: Path = Path("results/benchmarks/training"),
) -> None:
    """Compare training with anomalib's Cflow and Padim, and write the figures as JSON and Markdown.

    Args:
        data: Folder with one folder a category, in MVTec AD's layout.
        weights: ResNet-18 weights in timm's names, .safetensors, at least up to layer3.
        categories: Which categories.
        epochs: Epochs of anomalib's Cflow.
        seed: Seed of everything.
        only: Titles of the rows to measure, for example "CflowPlugin, default recipe"; all by default.
        output: Folder for the results.
    """
    data, weights, output = data.resolve(), weights.resolve(), output.resolve()
    # An epoch of anomalib's is one pass over all feature vectors; here with the paper's number of vectors a step.
    passes = {"steps_per_epoch": None, "vectors_per_step": 8192}
    short = max(1, epochs // 2)
    plan = []
    for category in categories:
        plan += [
            (category, f"Cflow, {epochs} epochs", "Cflow", {}, epochs),
            (category, f"CflowPlugin, {epochs} epochs of all vectors", "CflowPlugin", passes, epochs),
            (category, "CflowPlugin, default recipe", "CflowPlugin", {}, None),
            (category, f"CflowPlugin, {short} epochs", "CflowPlugin", {}, short),
            (category, "Padim", "Padim", {}, None),
        ]
    plan = [row for row in plan if only is None or row[1] in only]
    rows = []
    for category, title, name, settings, length in track(plan, description="Training"):
        run = in_own_process(measure, name, settings, length, data, category, weights, seed, output / "runs")
        rows.append({"category": category, "training": title, **run})
    columns = ("category", "training", "seconds", "an epoch", "peak MiB", *METRICS)
    table = Table(*columns, box=box.MARKDOWN)
    for row in rows:
        epoch = f"{row['epoch_seconds']:.2f}" if "epoch_seconds" in row else ""
        figures = [f"{row['seconds']:.1f}", epoch, f"{row['peak_memory_mib']:.0f}"]
        table.add_row(row["category"], row["training"], *figures, *(f"{row[metric]:.3f}" for metric in METRICS))
    publish("training", table, {"precision": "float32", "rows": rows}, output)


if __name__ == "__main__":
    auto_cli(main, as_positional=False)
