"""Figures of speed as a table on the screen, and as Markdown, CSV, JSON and a plot."""

__all__ = ["left_out", "print_fast_enough", "print_table", "write_report"]

import csv
import itertools
import json
from collections.abc import Iterable
from math import isnan
from pathlib import Path

from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from rich import box
from rich.console import Console
from rich.measure import Measurement
from rich.table import Table

from cflow_plugin.commands.compare.published import CAPTIONS, published_table
from cflow_plugin.files import atomic_file

# What the paper's rows are called among the measured ones, so that both share a colour.
_MEASURED_AS = {"CFLOW-AD": "CflowPlugin", "PaDiM": "Padim", "SPADE": "Spade"}
_COLUMNS = {
    "model": "model",
    "backbone": "encoder",
    "size": "size",
    "batch": "batch",
    "runtime": "runtime",
    "executed": "executed in",
    "p50_ms": "p50 ms",
    "p90_ms": "p90 ms",
    "p99_ms": "p99 ms",
    "fps": "fps",
    "fps_throughput": "fps, throughput mode",
    "file_mb": "file MB",
    "parameters_mb": "parameters MB",
    "peak_memory_mb": "peak memory MB",
    "export_seconds": "export or compile s",
}
# Image AUROC, pixel AUROC and AUPRO as benchmarks/accuracy.py measured them, see docs/encoders.md.
_ACCURACY = {
    "resnet18": (0.980, 0.959, 0.879),
    "tf_efficientnet_lite0": (0.973, 0.959, 0.843),
    "tf_efficientnet_lite1": (0.971, 0.963, 0.866),
    "tf_efficientnet_lite2": (0.973, 0.964, 0.860),
}
_VARIED = ("backbone", "size", "batch", "runtime")
_MAIN_COLUMNS = ("precision", "p50_ms", "fps", "file_mb")
_NAMED = 3  # combinations that are named one by one


def left_out(skipped: dict[str, list[str]]) -> list[str]:
    """A line for each reason why something was not timed, with what it befell."""
    lines = []
    for reason, names in skipped.items():
        what = ", ".join(names) if len(names) <= _NAMED else f"{len(names)} combinations, such as {names[0]}"
        lines.append(f"Left out, for {reason}: {what}.")
    return lines


def print_table(rows: list[dict], console: Console) -> None:
    """Show the figures, on a narrow screen those that matter most."""
    table = _table(rows, box.SIMPLE_HEAD, _COLUMNS)
    if Measurement.get(console, console.options.update(width=1000), table).maximum > console.width:
        varied = [key for key in _VARIED if len({row.get(key) for row in rows}) > 1]
        table = _table(rows, box.SIMPLE_HEAD, ["model", *varied, *_MAIN_COLUMNS])
    console.print(table)


def print_fast_enough(rows: list[dict], fps: float, console: Console) -> None:
    """Say with which encoders CflowPlugin keeps up with a stream of images, and how to have the most accurate of them.

    Args:
        rows: What was measured.
        fps: Images a second.
        console: Where to.
    """
    own = [row for row in rows if row["model"].startswith("CflowPlugin") and row["fps"] >= fps and _decides(row)]
    if not own:
        console.print(f"No setting of CflowPlugin among these reaches {fps:g} images a second here.")
        return
    # Of each encoder the fastest, in bf16 only where nothing closer to what was trained is fast enough.
    own.sort(key=lambda row: (-sum(_ACCURACY.get(row["backbone"], (0.0,))), _in_bf16(row), -row["fps"]))
    fastest: dict[str, dict] = {}
    for row in own:
        fastest.setdefault(row["backbone"], row)
    table = Table("encoder", "image AUROC / pixel AUROC / AUPRO", "fps", "executed in", box=box.SIMPLE_HEAD)
    for row in fastest.values():
        known = _ACCURACY.get(row["backbone"])
        quality = "not measured" if known is None else " / ".join(f"{value:.3f}" for value in known)
        table.add_row(row["backbone"], quality, f"{row['fps']:.0f}", row["executed"])
    console.print(
        f"These keep up with {fps:g} images a second, the most accurate first (on nine real sets, with two scales), "
        "each with its fastest setting, in bf16 only where no other is fast enough:"
    )
    console.print(table)
    best = next(iter(fastest.values()))
    console.print("The first of them:")
    for line in _commands(best):
        console.print(f"  {line}", soft_wrap=True, highlight=False)


def _decides(row: dict) -> bool:
    """Whether it decides as in single precision: bf16 turns about one decision in twenty of EfficientNet-Lite."""
    return not (_in_bf16(row) and row["backbone"].startswith("tf_efficientnet_lite"))


def _in_bf16(row: dict) -> bool:
    return row["precision"].endswith("bf16")


def _commands(row: dict) -> list[str]:
    """What to type to have a setting."""
    size = f'"[{row["size"]}, {row["size"]}]"'
    train = f"anomalib train --model CflowPlugin --model.backbone {row['backbone']} --model.image_size {size}"
    train += " --model.encoder_precision int8" if row["model"] == "CflowPlugin-int8" else ""
    if row["runtime"].startswith("torch"):
        return [f"{train} --data …"]
    kind = "onnx" if row["runtime"] == "onnxruntime" else "openvino"
    export = f"anomalib export --model CflowPlugin --export_type {kind} --input_size {size}"
    export += " --compression_type INT8_PTQ" if row["precision"].startswith("int8") else ""
    use = "cflow-plugin watch --model model.xml --source …"
    use += " --precision bf16" if _in_bf16(row) else ""
    return [f"{train} --data …", f"{export} --ckpt_path …", *([use] if kind == "openvino" else [])]


def _table(rows: list[dict], style: box.Box, columns: Iterable[str]) -> Table:
    table = Table(box=style, pad_edge=style is box.MARKDOWN)
    for key in columns:
        is_number = any(isinstance(row.get(key), float) for row in rows)
        # Where a screen is too narrow for these columns, names go on in the next line and figures stay whole.
        justify = "right" if is_number else "left"
        table.add_column(_COLUMNS.get(key, key), justify=justify, no_wrap=is_number, overflow="fold")
    for row in rows:
        table.add_row(*(_format(row.get(key)) for key in columns))
    return table


def _format(value: object) -> str:
    if value is None:
        return ""
    return f"{value:.1f}" if isinstance(value, float) else str(value)


def write_report(report: dict, folder: Path) -> None:
    """Write ``speed.json``, ``speed.csv``, ``speed.md`` and ``speed.png``.

    Args:
        report: Machine and rows.
        folder: Where to; it is made if need be.
    """
    rows = report["rows"]
    folder.mkdir(parents=True, exist_ok=True)
    with atomic_file(folder / "speed.json") as partial:
        partial.write_text(json.dumps(report, indent=2) + "\n")
    with atomic_file(folder / "speed.csv") as partial, partial.open("w", newline="") as file:
        writer = csv.DictWriter(file, ["precision", *_COLUMNS, "runs"])
        writer.writeheader()
        writer.writerows(rows)
    machine = report["machine"]
    with atomic_file(folder / "speed.md") as partial, partial.open("w") as file:
        console = Console(file=file, width=400)
        console.print(
            f"{machine['processor']}, {machine['threads']} threads; {', '.join(machine['versions'].values())}"
        )
        console.print()
        console.print(_table(rows, box.MARKDOWN, _COLUMNS))
        console.print(f"Published, Table 6. {CAPTIONS[6]}:\n")
        console.print(_published() + "\n", soft_wrap=True)
        for line in left_out(report["left_out"]):
            console.print(line)
    with atomic_file(folder / "speed.png") as partial:
        _plot(rows).savefig(partial, format="png", dpi=150)


def _published() -> str:
    names = {"fps_256": "fps at 256", "fps_512": "fps at 512", "mvtec_mb": "size MB"}
    table = published_table(6).drop(columns="stc_mb").rename(columns=names)
    texts = table.map(lambda value: value if isinstance(value, str) else "" if isnan(value) else f"{value:g}")
    return texts.to_markdown(index=False, disable_numparse=True)


def _plot(rows: list[dict]) -> Figure:
    """Speed against size on disk (in parameters where there is no file), the paper's figures among them."""
    figure = Figure(figsize=(10, 5), layout="constrained")
    axes = figure.add_subplot()
    points = [
        (
            row["model"],
            f"{row['runtime']} {row['precision']}, {row['size']}², batch {row['batch']}",
            row.get("file_mb") or row["parameters_mb"],
            row["fps"],
            row["backbone"],
        )
        for row in rows
    ]
    measured = {row["backbone"] for row in rows}
    points += [
        (_MEASURED_AS.get(row["model"], row["model"]), "published", row["mvtec_mb"], row["fps_256"], row["encoder"])
        for row in published_table(6).to_dict("records")
        if row["encoder"] in measured
    ]
    # A colour for each model and a marker for each way of running it.
    colours = {name: f"C{index}" for index, name in enumerate(dict.fromkeys(point[0] for point in points))}
    markers = dict(zip(dict.fromkeys(point[1] for point in points), itertools.cycle("osD^v<>PXhp*"), strict=False))
    for model, way, size, speed, backbone in points:
        axes.plot(size, speed, markers[way], color=colours[model], markersize=7)
        if len(measured) > 1:
            axes.annotate(backbone, (size, speed), fontsize=6, xytext=(5, 3), textcoords="offset points")
    axes.set(xscale="log", yscale="log", xlabel="size, MB", ylabel="images a second")
    axes.grid(visible=True, which="both", alpha=0.3)
    handles = [Line2D([], [], marker="s", linestyle="", color=colour, label=name) for name, colour in colours.items()]
    handles += [
        Line2D([], [], marker=marker, linestyle="", color="black", label=way) for way, marker in markers.items()
    ]
    figure.legend(handles=handles, loc="outside right upper", fontsize=7)
    return figure
