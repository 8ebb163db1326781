"""Size against accuracy against speed: encoders, scales, coupling blocks and number formats, on real sets.

    python benchmarks/tradeoffs.py accuracy --data DATA --weights resnet18.safetensors
    python benchmarks/tradeoffs.py speed

DATA holds one folder a set, as for ``accuracy.py``. Each of the settings in ``tradeoffs.yaml`` is trained on each set
by the default recipe and exported in full precision, in FP16, and with decoders in INT8. The test images go through
OpenVINO in each number format that this processor computes in. Accuracy is compared with torch's, and decisions as
well, at the threshold of highest F1 on the test images, where they turn most easily. Each cell is kept: a run that is
cut off goes on where it was. ``speed`` then times the files of the last set in alternating rounds, on a machine that
does nothing else, and writes a table and a plot of both.
"""

import json
import shutil
import statistics
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import openvino as ov
import pandas as pd
import torch
import yaml
from accuracy import data_of
from anomalib.deploy import CompressionType
from anomalib.engine import Engine
from jsonargparse import auto_cli
from lightning import seed_everything
from matplotlib.figure import Figure
from matplotlib.ticker import ScalarFormatter
from rich.progress import track
from sklearn.metrics import precision_recall_curve
from training import in_own_process

from cflow_plugin.commands.machine import describe_machine
from cflow_plugin.metrics import AUPRO, AUROC

_FILES = {"FP32": None, "FP16": CompressionType.FP16, "INT8": CompressionType.INT8_PTQ}
_SETTINGS = Path(__file__).with_suffix(".yaml")
_OUTPUT = Path("results/benchmarks/tradeoffs")
_METRICS = ("image_AUROC", "pixel_AUROC", "AUPRO")


def _formats() -> list[tuple[str, str]]:
    """What is executed: a file, and what OpenVINO computes the rest of it in."""
    able = ov.Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")
    formats = [("FP32", "f32"), ("FP16", "f32"), ("FP32", "bf16"), ("INT8", "f32"), ("INT8", "bf16")]
    return [(file, computed) for file, computed in formats if computed == "f32" or "BF16" in able]


def measure(folder: Path, encoder: dict[str, Any], settings: dict[str, Any], seed: int, output: Path) -> dict:
    """Train and export a model, and score the test images with it in each format.

    Args:
        folder: The set.
        encoder: ``backbone``, ``layers`` and ``weights``.
        settings: CflowPlugin's, where they differ from its defaults.
        seed: Seed of everything.
        output: Folder for the files.

    Returns:
        A row for each format.
    """
    from cflow_plugin.commands.compare.cell import EncoderChoice, Variant, build_model

    seed_everything(seed, verbose=False)
    model = build_model(Variant("CflowPlugin", settings), EncoderChoice(**encoder), (256, 256))
    data = data_of(folder)
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    engine = Engine(default_root_dir=output / "run", accelerator="cpu", limit_val_batches=0, **quiet)
    engine.fit(model, datamodule=data)
    engine.test(model, datamodule=data, verbose=False)
    model.eval()
    batches = list(data.test_dataloader())
    with torch.inference_mode():
        outputs = [model(image[None]) for batch in batches for image in batch.image]
    expected = [(float(one.pred_score), one.anomaly_map[0, 0].numpy()) for one in outputs]
    labels = [bool(label) for batch in batches for label in batch.gt_label]
    scores = np.array([score for score, _ in expected])
    precision, recall, thresholds = precision_recall_curve(labels, scores)
    best = (2 * precision * recall / np.maximum(precision + recall, 1e-12))[:-1].argmax()
    # Between two scores: no rounding of the one that it was found at decides.
    threshold = (thresholds[best] + max(scores[scores < thresholds[best]], default=thresholds[best])) / 2
    rows = []

    def add(name: str, computed: str, path: Path | None, found: list[tuple[float, np.ndarray]]) -> None:
        changed = np.array([score for score, _ in found])
        parts = path.parent.glob(f"{path.stem}.*") if path else ()
        differences = [np.abs(a - b).max() for (_, a), (_, b) in zip(found, expected, strict=True)]
        rows.append(
            {
                "file": name,
                "computed": computed,
                "file_mb": sum(part.stat().st_size for part in parts) / 1e6 or None,
                **_accuracy(batches, found),
                "same": int(((changed > threshold) == (scores > threshold)).sum()),
                "images": len(scores),
                "score_difference": float(np.abs(changed - scores).max()),
                "map_difference": float(max(differences)),
            }
        )

    add("", "torch f32", None, expected)
    files = {
        name: model.to_openvino(
            output / name, input_size=None, compression_type=kind, datamodule=data if kind else None
        )
        for name, kind in _FILES.items()
    }
    for name, computed in _formats():
        compiled = ov.Core().compile_model(files[name], "CPU", {"INFERENCE_PRECISION_HINT": computed})
        results = [compiled(image[None].numpy()) for batch in batches for image in batch.image]
        add(name, computed, files[name], [(one["pred_score"].item(), one["anomaly_map"][0, 0]) for one in results])
    shutil.rmtree(output / "run")
    return {"rows": rows}


def _accuracy(batches: list[Any], found: list[tuple[float, np.ndarray]]) -> dict[str, float]:
    fields = {"fields": ["anomaly_map", "gt_mask"]}
    metrics = {
        "image_AUROC": AUROC(fields=["pred_score", "gt_label"]),
        "pixel_AUROC": AUROC(**fields),
        "AUPRO": AUPRO(**fields),
    }
    rest = iter(found)
    for batch in batches:
        of_batch = [next(rest) for _ in range(len(batch.image))]
        values = SimpleNamespace(
            pred_score=torch.tensor([score for score, _ in of_batch]),
            anomaly_map=torch.from_numpy(np.stack([one for _, one in of_batch])),
            gt_label=batch.gt_label,
            gt_mask=batch.gt_mask.reshape(len(of_batch), *batch.gt_mask.shape[-2:]),
        )
        for metric in metrics.values():
            metric.update(values)
    return {name: float(metric.compute()) for name, metric in metrics.items()}


def accuracy(
    data: Path,
    weights: Path,
    sets: list[str] | None = None,
    settings: Path = _SETTINGS,
    only: list[str] | None = None,
    seed: int = 0,
    output: Path = _OUTPUT,
) -> None:
    """Measure accuracy in each format.

    Args:
        data: Folder with one folder a set.
        weights: ResNet-18's weights in timm's names.
        sets: Which sets; all by default.
        settings: File that names settings.
        only: Which of these; all by default.
        seed: Seed of everything.
        output: Folder for the results; what is there already is not measured again.
    """
    output = output.resolve()
    named = yaml.safe_load(settings.read_text())
    for folder in [data.resolve() / name for name in sets or sorted(path.name for path in data.iterdir())]:
        for name in track(only or list(named), folder.name):
            cell = output / "cells" / folder.name / f"{name}.json"
            if cell.is_file():
                continue
            cell.parent.mkdir(parents=True, exist_ok=True)
            encoder = {**named[name]["encoder"]}
            if encoder["backbone"] == "resnet18":
                encoder["weights"] = weights.resolve()
            found = in_own_process(
                measure, folder, encoder, named[name].get("model", {}), seed, output / "files" / name
            )
            cell.write_text(json.dumps(found["rows"]))
    _report(output, pd.DataFrame())


def speed(threads: int = 2, rounds: int = 5, seconds: float = 1.0, output: Path = _OUTPUT) -> None:
    """Time the files that ``accuracy`` left, in alternating rounds, one image at a time.

    Args:
        threads: Threads.
        rounds: How often each has its turn.
        seconds: Length of a turn.
        output: Folder that ``accuracy`` wrote to.
    """
    image = np.random.default_rng(0).random((1, 3, 256, 256), dtype=np.float32)
    keys = [(folder.name, *one) for folder in sorted((output / "files").iterdir()) for one in _formats()]
    spent: dict[tuple[str, str, str], list[float]] = {key: [] for key in keys}
    for _ in track(range(rounds), "Timing"):
        for setting, name, computed in keys:
            model = ov.Core().read_model(output / "files" / setting / name / "weights/openvino/model.xml")
            model.reshape(image.shape)
            hints = {
                "INFERENCE_PRECISION_HINT": computed,
                "INFERENCE_NUM_THREADS": threads,
                "PERFORMANCE_HINT": "LATENCY",
            }
            # Anew in each turn: one of many that lie compiled side by side takes up to 40 % longer.
            request = ov.Core().compile_model(model, "CPU", hints).create_infer_request()
            request.infer([image])
            end = time.perf_counter() + seconds
            while time.perf_counter() < end:
                start = time.perf_counter()
                request.infer([image])
                spent[setting, name, computed].append(time.perf_counter() - start)
    rows = [(*key, 1000 * statistics.median(times)) for key, times in spent.items()]
    times = pd.DataFrame(rows, columns=["setting", "file", "computed", "ms"]).set_index(["setting", "file", "computed"])
    (output / "speed.json").write_text(json.dumps({"machine": describe_machine(threads), "ms": rows}, indent=2) + "\n")
    _report(output, times)


def _report(output: Path, times: pd.DataFrame) -> None:
    """Write means over the sets as CSV and Markdown, and the plot where there are times."""
    rows = [
        {"setting": cell.stem, "set": cell.parent.name, **row}
        for cell in sorted((output / "cells").glob("*/*.json"))
        for row in json.loads(cell.read_text())
    ]
    every = pd.DataFrame(rows)
    every.to_csv(output / "tradeoffs.csv", index=False)
    key = ["setting", "file", "computed"]
    found = every.groupby(key, sort=False).agg(
        **{name: (name, "mean") for name in (*_METRICS, "file_mb")},
        same=("same", "sum"), images=("images", "sum"), map_difference=("map_difference", "max"),
        sets=("set", "nunique"),
    )  # fmt: skip
    # By how much the worst set differs from torch.
    torch_rows = every[every.computed == "torch f32"].set_index(["setting", "set"])
    for name in _METRICS:
        change = every[name] - every.set_index(["setting", "set"]).index.map(torch_rows[name])
        found[f"{name} at worst"] = change.groupby([every[one] for one in key]).min()
    found["same decisions"] = found.pop("same") / found["images"]
    if len(times):
        found = found.join(times)
        found["fps"] = 1000 / found["ms"]
        _plot(found).savefig(output / "tradeoffs.png", dpi=150)
    text = found.round(4).reset_index().to_markdown(index=False)
    (output / "tradeoffs.md").write_text(text + "\n")
    print(text)


def _plot(found: pd.DataFrame) -> Figure:
    """Mean of the three metrics against images a second; the area of a point is the file's size."""
    figure = Figure(figsize=(10, 5), layout="constrained")
    axes = figure.add_subplot()
    timed = found[found.fps.notna()].reset_index()
    markers = dict(
        zip(timed[["file", "computed"]].drop_duplicates().itertuples(index=False, name=None), "osD^v<>", strict=False)
    )
    for number, (name, rows) in enumerate(timed.groupby("setting", sort=False)):
        for row in rows.itertuples():
            mean = np.mean([getattr(row, metric) for metric in _METRICS])
            axes.scatter(
                row.fps,
                mean,
                s=4 * row.file_mb + 10,
                marker=markers[row.file, row.computed],
                color=f"C{number}",
                alpha=0.7,
            )
        axes.plot([], [], "s", color=f"C{number}", label=name)
    for (file, computed), marker in markers.items():
        axes.plot([], [], marker, color="black", label=f"{file} file, {computed}")
    axes.set(xscale="log", xlabel="images a second, one at a time", ylabel="mean of image AUROC, pixel AUROC and AUPRO")
    for choose in (axes.xaxis.set_major_formatter, axes.xaxis.set_minor_formatter):
        choose(ScalarFormatter())  # 40, where the usual one of a logarithmic axis has 4×10¹
    axes.grid(visible=True, which="both", alpha=0.3)
    figure.legend(loc="outside right upper", fontsize=8)
    return figure


if __name__ == "__main__":
    auto_cli([accuracy, speed], as_positional=False)
