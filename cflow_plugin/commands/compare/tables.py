"""A comparison's figures as tables, and the paper's beside them."""

__all__ = ["TITLES", "Table", "accuracy_tables", "complexity_table", "published_tables", "summary_table"]

import json
import math
from dataclasses import dataclass, field

import pandas as pd

from cflow_plugin.commands.compare.cell import METRICS
from cflow_plugin.commands.compare.published import CAPTIONS, published_table
from cflow_plugin.model.encoder import BACKBONES

TITLES = {"image_AUROC": "image AUROC", "pixel_AUROC": "pixel AUROC", "pixel_AUPRO": "AUPRO"}
"""What metrics are called."""

_PUBLISHED_NAMES = {"CflowPlugin": "CFLOW-AD", "Cflow": None, "Padim": "PaDiM", "Spade": "SPADE"}
_CLASSES = {"MVTecAD": 15, "ShanghaiTechFrames": 12}
_NOT_MEASURED = "—"
# Table 1: what each method computes in training, computes in a test, and keeps beside the encoder λ.
_COMPLEXITY = {
    "Spade": ("gallery G of training features", "distances to G", "λ + G"),
    "Padim": ("inverse covariances Σ⁻¹ of each position", "Mahalanobis distances", "λ + Σ⁻¹"),
    "CflowPlugin": ("likelihood of the decoders θ (Eq. 7)", "log-likelihood (Eq. 8)", "λ + θ"),
    "Cflow": ("likelihood of the decoders θ (Eq. 7)", "log-likelihood (Eq. 8)", "λ + θ"),
}


@dataclass
class Table:
    """A table for people.

    Attributes:
        title: What it shows.
        columns: Headings.
        rows: Texts; the first of each row names the row.
        note: What a reader has to know about it.
        best: ``(row, column)`` of the texts to be set in bold.
    """

    title: str
    columns: list[str]
    rows: list[list[str]] = field(default_factory=list)
    note: str = ""
    best: set[tuple[int, int]] = field(default_factory=set)

    def to_markdown(self) -> str:
        """The table as GitHub-flavoured Markdown."""
        lines = [f"### {self.title}", ""]
        if self.note:
            lines += [self.note, ""]
        lines += ["| " + " | ".join(self.columns) + " |", "|" + "---|" * len(self.columns)]
        for number, row in enumerate(self.rows):
            texts = [f"**{text}**" if (number, place) in self.best else text for place, text in enumerate(row)]
            lines.append("| " + " | ".join(texts) + " |")
        return "\n".join([*lines, ""])


def summary_table(results: pd.DataFrame) -> Table:
    """Means over all categories, for each model and encoder: accuracy and cost.

    Args:
        results: A row a cell.
    """
    columns = ["model", "encoder", "size", *TITLES.values(), "training s", "test ms an image", "peak MB", "model MB"]
    table = Table("All categories", columns, note=_spread(results, "Means over categories"))
    categories = results["category"].nunique()
    complete = []
    for (encoder, size, model), group in results.groupby(["encoder", "size", "model"], sort=False):
        done = group["category"].nunique()
        if done == categories:
            complete.append(len(table.rows))
        else:
            # Not to be compared with the others: some categories are harder.
            model = f"{model} ({done} of {categories} categories)"
        # σ of the mean over categories: each seed has a mean of its own.
        means = group.groupby("seed")[[metric for metric in METRICS if metric in group]].mean()
        figures = [_mean(means.get(metric)) for metric in METRICS]
        costs = [
            f"{group['train_seconds'].mean():.1f}",
            f"{group['image_ms'].mean():.1f}",
            f"{group['peak_memory_mb'].max():.0f}",
            f"{group['size_mb'].max():.0f}",
        ]
        table.rows.append([str(model), str(encoder), str(size), *figures, *costs])
    for place in range(3, 3 + len(METRICS)):
        _mark_best(table, complete, place)
    return table


def accuracy_tables(results: pd.DataFrame) -> list[Table]:
    """For each metric a table of categories and models.

    Args:
        results: A row a cell.
    """
    tables = []
    for (encoder, size), part in results.groupby(["encoder", "size"], sort=False):
        models = list(dict.fromkeys(part["model"]))
        for metric in METRICS:
            if metric not in part or part[metric].isna().all():
                continue
            title = f"{TITLES[metric]}, {encoder}, {size}"
            table = Table(title, ["category", *models], note=_spread(part, "Means over seeds"))
            for category, group in part.groupby("category", sort=False):
                table.rows.append([str(category), *(_mean(group[group["model"] == model][metric]) for model in models)])
            for number in range(len(table.rows)):
                _mark_best(table, number, list(range(1, 1 + len(models))))
            tables.append(table)
    return tables


def complexity_table(results: pd.DataFrame) -> Table:
    """Table 1 of the paper, with what it came to here.

    Args:
        results: A row a cell.
    """
    columns = ["model", "training computes", "s", "a test computes", "ms an image", "keeps", "MB", "peak memory MB"]
    table = Table(
        "Complexity (Table 1)",
        columns,
        note="λ stands for the encoder. Seconds, peak memory and size are means over cells, of whole processes.",
    )
    for (_, model, kind), group in results.groupby(["encoder", "model", "anomalib_model"], sort=False):
        train, test, memory = _COMPLEXITY.get(kind, ("", "", ""))
        mean = group[["train_seconds", "image_ms", "size_mb", "peak_memory_mb"]].mean()
        name = f"{model}, {group['encoder'].iloc[0]}"
        seconds, milliseconds = f"{mean['train_seconds']:.1f}", f"{mean['image_ms']:.1f}"
        sizes = [f"{mean['size_mb']:.0f}", f"{mean['peak_memory_mb']:.0f}"]
        table.rows.append([name, train, seconds, test, milliseconds, memory, *sizes])
    return table


def published_tables(results: pd.DataFrame) -> list[Table]:
    """Tables 2 to 6 of the paper; what was measured of them stands in brackets, with the difference.

    Args:
        results: A row a cell.
    """
    measured = results.copy()
    measured["published_name"] = [_published_name(row) for _, row in measured.iterrows()]
    return [
        _ablation(measured),
        _classes(measured),
        *(_means(measured, number, data) for number, data in ((4, "MVTecAD"), (5, "ShanghaiTechFrames"))),
        _speed(measured),
    ]


def _published_name(row: pd.Series) -> str | None:
    name = _PUBLISHED_NAMES.get(row["anomalib_model"])
    if name == "CFLOW-AD" and json.loads(row["settings"]).get("condition_dims") == 0:
        return "UFLOW"
    return name


def _ablation(measured: pd.DataFrame) -> Table:
    published = published_table(2)
    setups = ["encoder", "coupling_blocks", "pooling_layers", "size", "model"]
    wanted = published[setups].drop_duplicates()
    table = _published(2, ["class"])
    table.columns += [
        f"{row.encoder}, {row.coupling_blocks} blocks, {row.pooling_layers} layers, {row.size}"
        + (", UFLOW" if row.model == "UFLOW" else "")
        for row in wanted.itertuples()
    ]
    here = measured[measured["data"] == "MVTecAD"].copy()
    here["coupling_blocks"] = [json.loads(text).get("coupling_blocks", 8) for text in here["settings"]]
    here["pooling_layers"] = [_layers(row) for _, row in here.iterrows()]
    here["pixels"] = [int(str(size).split("×")[0]) for size in here["size"]]
    for category, rows in published.groupby("category", sort=False):
        texts = [str(category)]
        for row in rows.itertuples():
            same = here[
                (here["published_name"] == row.model)
                & (here["encoder"] == row.encoder)
                & (here["coupling_blocks"] == row.coupling_blocks)
                & (here["pooling_layers"] == row.pooling_layers)
                & (here["pixels"] == row.size)
            ]
            sigma = "" if math.isnan(row.sigma) else f" ± {row.sigma:.2f}"
            texts.append(_beside(row.value, _over(same, category, "pixel_AUROC", "MVTecAD"), sigma))
        table.rows.append(texts)
    return table


def _layers(row: pd.Series) -> int:
    """Number of a cell's layers."""
    named = str(row["layers"]) if isinstance(row["layers"], str) else ""
    return len(named.split()) or len(getattr(BACKBONES.get(row["encoder"]), "layers", (1, 2, 3)))


def _classes(measured: pd.DataFrame) -> Table:
    published = published_table(3)
    wanted = published[["model", "encoder", "metric"]].drop_duplicates()
    table = _published(
        3, ["class", *(f"{row.model}, {row.encoder}, {TITLES[row.metric]}" for row in wanted.itertuples())]
    )
    here = measured[measured["data"] == "MVTecAD"]
    for category, rows in published.groupby("category", sort=False):
        found = {(row.model, row.encoder, row.metric): row.value for row in rows.itertuples()}
        texts = [str(category)]
        for key in wanted.itertuples(index=False):
            same = here[(here["published_name"] == key.model) & (here["encoder"] == key.encoder)]
            texts.append(_beside(found[tuple(key)], _over(same, category, key.metric, "MVTecAD")))
        table.rows.append(texts)
    return table


def _means(measured: pd.DataFrame, number: int, data: str) -> Table:
    published = published_table(number)
    metrics = list(dict.fromkeys(published["metric"]))
    table = _published(number, ["model", *(TITLES[metric] for metric in metrics)])
    here = measured[(measured["data"] == data) & (measured["encoder"] == "wide_resnet50_2")]
    for model, rows in published.groupby("model", sort=False):
        found = dict(zip(rows["metric"], rows["value"], strict=True))
        same = here[here["published_name"] == model]
        texts = [_beside(found.get(metric), _over(same, "average", metric, data)) for metric in metrics]
        table.rows.append([str(model), *texts])
    return table


def _speed(measured: pd.DataFrame) -> Table:
    table = _published(6, ["model", "encoder", "images/s at 256", "MB, MVTec AD"])
    table.note += (
        " In brackets: PyTorch's on this machine's CPU, one image after another; `cflow-plugin benchmark` has more."
    )
    here = measured[measured["size"] == "256×256"]
    for row in published_table(6).itertuples():
        same = here[(here["published_name"] == row.model) & (here["encoder"] == row.encoder)]
        speed = 1000 / same["image_ms"].mean() if len(same) else None
        size = same["size_mb"].mean() if len(same) else None
        table.rows.append(
            [row.model, row.encoder, _beside(row.fps_256, speed, digits=1), _beside(row.mvtec_mb, size, digits=0)]
        )
    return table


def _published(number: int, columns: list[str]) -> Table:
    note = "Published figures; in brackets what was measured here, and the difference. " + _NOT_MEASURED
    return Table(f"Table {number}. {CAPTIONS[number]}", columns, note=note + " was not measured.")


def _over(rows: pd.DataFrame, category: str, metric: str, data: str) -> float | None:
    """A metric in percent: of one category, or the mean over all of the data set's."""
    if metric not in rows:
        return None
    if category != "average":
        rows = rows[rows["category"] == category]
    elif rows["category"].nunique() < _CLASSES[data]:
        return None
    value = rows[metric].mean()
    return None if math.isnan(value) else 100 * value


def _beside(published: float | None, measured: float | None, sigma: str = "", digits: int = 2) -> str:
    known = published is not None and not math.isnan(published)
    text = f"{published:g}{sigma}" if known else ""
    if measured is None or math.isnan(measured):
        return f"{text} ({_NOT_MEASURED})"
    difference = f", {measured - published:+.{digits}f}" if known else ""
    return f"{text} ({measured:.{digits}f}{difference})"


def _spread(results: pd.DataFrame, what: str) -> str:
    seeds = results["seed"].nunique()
    return f"{what}; ± is the standard deviation over {seeds} seeds." if seeds > 1 else f"{what}; one seed."


def _mean(values: pd.Series | None) -> str:
    values = pd.Series(dtype=float) if values is None else values.dropna()
    if not len(values):
        return _NOT_MEASURED
    return f"{values.mean():.4f}" + (f" ± {values.std():.4f}" if len(values) > 1 else "")


def _mark_best(table: Table, rows: int | list[int], columns: int | list[int]) -> None:
    """Mark the highest among a row's or a column's texts."""
    places = [(row, columns) for row in rows] if isinstance(rows, list) else [(rows, column) for column in columns]
    values = {
        place: float(text.split()[0]) for place in places if (text := table.rows[place[0]][place[1]]) != _NOT_MEASURED
    }
    if len(values) > 1:
        table.best |= {place for place, value in values.items() if value == max(values.values())}
