"""The report of a comparison: self-contained HTML, and Markdown with its figures beside it."""

__all__ = ["write_report"]

import base64
import io
from pathlib import Path

import numpy as np
import pandas as pd
from jinja2 import Environment, PackageLoader, StrictUndefined
from matplotlib.figure import Figure

from cflow_plugin.commands.compare.figures import Records, curves, densities, grid, trade_off
from cflow_plugin.commands.compare.tables import accuracy_tables, complexity_table, published_tables, summary_table
from cflow_plugin.commands.machine import Machine
from cflow_plugin.files import atomic_file

_CAPTIONS = {
    "curves": "ROC of image scores and of pixels; per-region overlap up to a false positive rate of 0.3.",
    "densities": "Scores of normal and anomalous pixels; threshold with the best F1 score (the paper's Figure 4).",
    "grid": "Images, true masks, maps, and masks at the threshold with the best F1 score (the paper's Figure 3).",
}


def write_report(results: pd.DataFrame, machine: Machine, folder: Path) -> Path:
    """Write ``report.html``, ``report.md`` and ``figures/``.

    Args:
        results: A row a cell.
        machine: What the figures depend on beside the code.
        folder: Where the cells' records are, and where the report goes.

    Returns:
        The HTML file.
    """
    figures: dict[str, list[tuple[str, str, Figure]]] = {}
    for encoder, category in dict.fromkeys(zip(results["encoder"], results["category"], strict=True)):
        records = _records(results[(results["encoder"] == encoder) & (results["category"] == category)], folder)
        title = category if results["encoder"].nunique() == 1 else f"{category}, {encoder}"
        drawn = (("curves", curves(records)), ("densities", densities(records)), ("grid", grid(records)))
        figures[title] = [(name, _CAPTIONS[name], figure) for name, figure in drawn if figure is not None]
    cost = trade_off(results)
    measured = [summary_table(results), *accuracy_tables(results), complexity_table(results)]
    published = published_tables(results)
    versions = ", ".join(machine["versions"].values())
    facts = [
        "; ".join((f"{machine['processor']}, {machine['threads']} threads", versions, f"{machine['date']}.")),
        "Every model was trained on the same good images with the same encoder, in a process of its own, and tested as "
        "it was after its last epoch. No threshold or constant was fitted to test images or labels; thresholds with "
        "the best F1 score, in pictures and distributions, are the one exception.",
    ]
    (folder / "figures").mkdir(exist_ok=True)
    environment = Environment(
        loader=PackageLoader("cflow_plugin.commands.compare", "."), autoescape=True, undefined=StrictUndefined
    )
    html = environment.get_template("report.html.j2").render(
        facts=facts,
        measured=measured,
        published=published,
        trade_off=_inline(cost),
        categories={
            title: [(name, caption, _inline(figure)) for name, caption, figure in parts]
            for title, parts in figures.items()
        },
    )
    lines = ["# Comparison", "", *(line + "\n" for line in facts), *(table.to_markdown() for table in measured)]
    lines += [_markdown(cost, folder, "trade-off", "Accuracy, time and size.")]
    for title, parts in figures.items():
        lines += [f"## {title}", ""]
        lines += [_markdown(figure, folder, f"{_file_name(title)}-{name}", caption) for name, caption, figure in parts]
    lines += ["## The paper's figures beside these", "", *(table.to_markdown() for table in published)]
    _replace(folder / "report.md", "\n".join(lines))
    _replace(folder / "report.html", html)
    return folder / "report.html"


def _records(cells: pd.DataFrame, folder: Path) -> Records:
    """Each model's record of its first seed."""
    records = {}
    for row in cells.drop_duplicates("model").itertuples():
        file = folder / "cells" / row.key / "record.npz"
        if file.exists():
            with np.load(file, allow_pickle=False) as record:
                records[row.model] = dict(record)
    return records


def _png(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, dpi=130)
    return buffer.getvalue()


def _inline(figure: Figure) -> str:
    return "data:image/png;base64," + base64.b64encode(_png(figure)).decode()


def _markdown(figure: Figure, folder: Path, name: str, caption: str) -> str:
    (folder / "figures" / f"{name}.png").write_bytes(_png(figure))
    return f"![{caption}](figures/{name}.png)\n\n{caption}\n"


def _file_name(title: str) -> str:
    return "".join(letter if letter.isalnum() else "-" for letter in title)


def _replace(file: Path, text: str) -> None:
    with atomic_file(file) as partial:
        partial.write_text(text, encoding="utf-8")
