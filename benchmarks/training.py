"""Training time, peak memory and accuracy beside anomalib's Cflow and Padim: same data, encoder, threads and metrics.

    python benchmarks/training.py --weights resnet18.safetensors --data DATA --categories [cookies, magnetic_tile]

DATA holds one folder a category in MVTec AD's layout. Validation is switched off on all sides, so fitting is only
training; the metrics are taken from raw scores by the same evaluator after the last epoch. Every measurement runs in a
process of its own, one after another, so that peak memory is its own.
"""

import json
import multiprocessing
import resource
import statistics
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from datetime import datetime, timezone
from importlib.metadata import version
from pathlib import Path
from platform import platform

import torch
from jsonargparse import auto_cli
from rich import box
from rich.console import Console
from rich.progress import track
from rich.table import Table

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
    from anomalib.data import MVTecAD
    from anomalib.engine import Engine
    from anomalib.models import get_model
    from lightning import seed_everything
    from safetensors.torch import load_file

    from cflow_plugin.evaluation import CflowEvaluator

    seed_everything(seed, verbose=False)
    settings = {"backbone": "resnet18", "layers": ["layer2", "layer3"], **settings}
    precision = settings.pop("precision", "32")
    source = {"weights": str(weights)} if name == "CflowPlugin" else {"pre_trained": False}
    model = get_model(name, evaluator=CflowEvaluator(), **{**source, **settings})
    model.visualizer = None
    if name != "CflowPlugin":
        encoder = model.model.encoder if name == "Cflow" else model.model.feature_extractor
        needed, given = encoder.feature_extractor.state_dict(), load_file(weights)
        encoder.feature_extractor.load_state_dict(
            {key: given[key] if key in given else value for key, value in needed.items()}
        )
        missing = [key for key in needed if key not in given and not key.endswith("num_batches_tracked")]
        if missing:
            message = f"{weights} lacks {', '.join(missing[:3])}."
            raise ValueError(message)
    datamodule = MVTecAD(root=data, category=category, num_workers=0)
    trainer = {"accelerator": "cpu", "precision": precision, "limit_val_batches": 0, "logger": False}
    trainer["enable_progress_bar"] = False
    length = {} if epochs is None else {"max_epochs": epochs}
    engine = Engine(default_root_dir=output, enable_model_summary=False, **trainer, **length)
    start = time.perf_counter()
    engine.fit(model, datamodule=datamodule)
    seconds = time.perf_counter() - start
    logged = {key: value.item() for key, value in engine.trainer.callback_metrics.items()}
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    [metrics] = engine.test(model, datamodule=datamodule, verbose=False)
    return {"seconds": seconds, "peak_memory_mib": memory, **{metric: metrics[metric] for metric in METRICS}, **logged}


def in_own_process(function: Callable[..., dict], *arguments: object) -> dict:
    """Call a function in a fresh process, so that its peak memory is its own."""
    with ProcessPoolExecutor(max_workers=1, mp_context=multiprocessing.get_context("spawn")) as executor:
        return executor.submit(function, *arguments).result()


def describe_machine() -> dict:
    """What figures depend on beside the code."""
    packages = ("anomalib", "cflow-plugin", "lightning", "torch")
    return {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "machine": platform(),
        "threads": torch.get_num_threads(),
        "versions": {name: version(name) for name in packages},
    }


def main(
    data: Path,
    weights: Path,
    categories: list[str],
    epochs: int = 8,
    rounds: int = 3,
    seed: int = 0,
    output: Path = Path("results/benchmarks/training"),
) -> None:
    """Compare training with anomalib's Cflow and Padim, and write the figures as JSON and Markdown.

    Args:
        data: Folder with one folder a category, in MVTec AD's layout.
        weights: ResNet-18 weights in timm's names, .safetensors, at least up to layer3.
        categories: Which categories.
        epochs: Epochs of anomalib's Cflow.
        rounds: How often a single epoch of both is timed, alternating.
        seed: Seed of everything.
        output: Folder for the results.
    """
    data, weights, output = data.resolve(), weights.resolve(), output.resolve()
    one_pass = {"steps_per_epoch": None}
    plan = []
    for category in categories:
        for _ in range(rounds):
            plan += [(category, "Cflow, one epoch", "Cflow", {}, 1)]
            plan += [(category, "CflowPlugin, one epoch", "CflowPlugin", one_pass, 1)]
        plan += [(category, f"Cflow, {epochs} epochs", "Cflow", {}, epochs)]
        plan += [(category, "CflowPlugin, default recipe", "CflowPlugin", {}, None)]
        plan += [(category, "Padim", "Padim", {}, None)]
    found: dict[tuple[str, str], list[dict]] = {}
    for category, title, name, settings, length in track(plan, description="Training"):
        run = in_own_process(measure, name, settings, length, data, category, weights, seed, output / "runs")
        found.setdefault((category, title), []).append(run)

    rows = [
        {
            "category": category,
            "training": title,
            "runs": len(runs),
            **{key: statistics.median(run[key] for run in runs) for key in runs[0]},
        }
        for (category, title), runs in found.items()
    ]
    report = {
        **describe_machine(),
        "precision": "float32",
        "rows": rows,
    }
    table = Table("category", "training", "seconds", "peak MiB", *METRICS, box=box.MARKDOWN)
    for row in rows:
        accuracy = [f"{row[metric]:.3f}" if "one" not in row["training"] else "" for metric in METRICS]
        table.add_row(
            row["category"], row["training"], f"{row['seconds']:.1f}", f"{row['peak_memory_mib']:.0f}", *accuracy
        )
    output.mkdir(parents=True, exist_ok=True)
    (output / "training.json").write_text(json.dumps(report, indent=2) + "\n")
    with (output / "training.md").open("w") as file:
        Console(file=file, width=140).print(table)
    Console(width=140).print(table)
    print(f"Results are in {output}.")


if __name__ == "__main__":
    auto_cli(main, as_positional=False)
