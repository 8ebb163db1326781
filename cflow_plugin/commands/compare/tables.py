"""A comparison's figures as tables, and the paper's beside them."""

__all__ = ["TITLES", "Table", "accuracy_tables", "complexity_table", "published_tables", "summary_table"]

import inspect
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from html import escape
from typing import Any

import pandas as pd
import yaml

from cflow_plugin.commands.compare.cell import METRICS
from cflow_plugin.commands.compare.published import CAPTIONS, published_table
from cflow_plugin.commands.configs import find_config
from cflow_plugin.model.backbones import BACKBONES

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


@dataclass(frozen=True)
class Table:
    """A table for people.

    Attributes:
        title: What it shows.
        texts: Its cells, shape ``(R, C)``; the first column names the rows.
        note: What a reader has to know about it.
        best: Which texts are set in bold, of the same shape; none where ``None``.
    """

    title: str
    texts: pd.DataFrame
    note: str = ""
    best: pd.DataFrame | None = None

    def to_markdown(self) -> str:
        """The table with title and note, as GitHub-flavoured Markdown."""
        # Without disable_numparse tabulate would print 98.10 as 98.1.
        table = self._in_bold(self.texts, "**", "**").to_markdown(index=False, disable_numparse=True)
        return "\n\n".join(part for part in (f"### {self.title}", self.note, table) if part) + "\n"

    def to_html(self) -> str:
        """The table alone, as HTML."""
        style = self._in_bold(self.texts.map(escape), "<b>", "</b>").style
        return style.hide(axis="index").format_index(escape="html", axis=1).to_html(exclude_styles=True)

    def _in_bold(self, texts: pd.DataFrame, before: str, after: str) -> pd.DataFrame:
        return texts if self.best is None else texts.mask(self.best, before + texts + after)


def summary_table(results: pd.DataFrame) -> Table:
    """Means over all categories, for each model and encoder: accuracy and cost.

    Args:
        results: A row a cell.
    """
    groups = ["encoder", "size", "model"]
    rows = results.groupby(groups, sort=False)
    done, categories = rows["category"].nunique(), results["category"].nunique()
    # σ of the mean over categories: each seed has a mean of its own.
    each_seed = results.reindex(columns=[*groups, "seed", *METRICS]).groupby([*groups, "seed"], sort=False).mean()
    means, figures = _means_and_texts(each_seed, groups)
    # Not to be compared with the others: some categories are harder.
    best = _highest(means.where(done == categories))
    texts = figures.rename(columns=TITLES)
    for column, values, digits in (
        ("training s", rows["train_seconds"].mean(), 1),
        ("test ms an image", rows["image_ms"].mean(), 1),
        ("peak MB", rows["peak_memory_mb"].max(), 0),
        ("model MB", rows["size_mb"].max(), 0),
    ):
        texts[column] = values.map(f"{{:.{digits}f}}".format)
    texts = texts.reset_index()
    texts["model"] = [
        str(model) if count == categories else f"{model} ({count} of {categories} categories)"
        for model, count in zip(texts["model"], done, strict=True)
    ]
    texts = texts[["model", "encoder", "size", *texts.columns[3:]]].astype(str)
    best = best.rename(columns=TITLES).reset_index(drop=True).reindex(columns=texts.columns, fill_value=False)
    return Table("All categories", texts, _spread(results, "Means over categories"), best)


def accuracy_tables(results: pd.DataFrame) -> list[Table]:
    """For each metric a table of categories and models.

    Args:
        results: A row a cell.
    """
    tables = []
    for encoder, size in _distinct(results, ["encoder", "size"]):
        part = results.loc[(results["encoder"] == encoder) & (results["size"] == size)]
        order = {"index": part["category"].unique(), "columns": part["model"].unique()}
        means, figures = _means_and_texts(part.set_index(["category", "model"]), ["category", "model"])
        for metric in figures:
            if means[metric].isna().all():
                continue
            best = _highest(means[metric].unstack().reindex(**order).T).T
            texts = figures[metric].unstack(fill_value=_NOT_MEASURED).reindex(**order).reset_index()
            best = best.reset_index(drop=True).reindex(columns=texts.columns, fill_value=False)
            title = f"{TITLES[str(metric)]}, {encoder}, {size}"
            tables.append(Table(title, texts.astype(str), _spread(part, "Means over seeds"), best))
    return tables


def complexity_table(results: pd.DataFrame) -> Table:
    """Table 1 of the paper, with what it came to here.

    Args:
        results: A row a cell.
    """
    groups = ["encoder", "model", "anomalib_model"]
    costs = ["train_seconds", "image_ms", "size_mb", "peak_memory_mb"]
    rows = []
    for mean in _records(results.groupby(groups, sort=False)[costs].mean().reset_index()):
        train, test, memory = _COMPLEXITY.get(mean["anomalib_model"], ("", "", ""))
        rows.append(
            {
                "model": f"{mean['model']}, {mean['encoder']}",
                "training computes": train,
                "s": f"{mean['train_seconds']:.1f}",
                "a test computes": test,
                "ms an image": f"{mean['image_ms']:.1f}",
                "keeps": memory,
                "MB": f"{mean['size_mb']:.0f}",
                "peak memory MB": f"{mean['peak_memory_mb']:.0f}",
            }
        )
    note = "λ stands for the encoder. Seconds, peak memory and size are means over cells, of whole processes."
    return Table("Complexity (Table 1)", pd.DataFrame(rows), note)


def published_tables(results: pd.DataFrame) -> list[Table]:
    """Tables 2 to 6 of the paper; what was measured of them stands in brackets, with the difference.

    The first one's note says in what else than its columns the measured cells differ from the paper's.

    Args:
        results: A row a cell.
    """
    rows = _records(results)
    own = _default_settings()
    measured = results.rename(columns={"model": "title", "size": "pixels"}).assign(
        model=[_published_name(row) for row in rows],
        coupling_blocks=[{**own, **json.loads(row["settings"])}["coupling_blocks"] for row in rows],
        pooling_layers=[_layers(row) for row in rows],
        size=[int(str(row["size"]).split("×")[0]) for row in rows],
    )
    wide = measured[measured["encoder"] == "wide_resnet50_2"]
    ablation = _by_class(2, measured, ["encoder", "coupling_blocks", "pooling_layers", "size", "model"])
    return [
        replace(ablation, note=f"{ablation.note} {_other_settings(measured, own)}".strip()),
        _by_class(3, measured, ["model", "encoder"]),
        *(_averages(number, wide, data) for number, data in ((4, "MVTecAD"), (5, "ShanghaiTechFrames"))),
        _speed(measured[measured["pixels"] == "256×256"]),
    ]


def _default_settings() -> dict[str, Any]:
    from cflow_plugin import CflowPlugin  # takes seconds, and a table needs few

    return {name: one.default for name, one in inspect.signature(CflowPlugin).parameters.items()}


def _other_settings(measured: pd.DataFrame, own: Mapping[str, Any]) -> str:
    """In what the measured cells differ from the paper's."""
    paper = yaml.safe_load(find_config("paper").read_text(encoding="utf-8"))["model"]["init_args"]
    parts = [
        f"{encoder} at {pixels} with {layers} layers (the paper's CFLOW-AD: three layers, each class at its best size)"
        for encoder, pixels, layers in _distinct(measured, ["encoder", "pixels", "pooling_layers"])
    ]
    for title, settings in _distinct(measured[measured["anomalib_model"] == "CflowPlugin"], ["model", "settings"]):
        taken = {**own, **json.loads(settings)}
        other = [f"{name} {taken[name]} ({value})" for name, value in paper.items() if taken[name] != value]
        parts.append(f"{title}, the paper's in brackets: {', '.join(other)}" if other else f"{title}: as in the paper")
    return f"Measured were {'; '.join(parts)}." if parts else ""


def _published_name(row: Mapping[str, Any]) -> str | None:
    name = _PUBLISHED_NAMES.get(row["anomalib_model"])
    if name == "CFLOW-AD" and json.loads(row["settings"]).get("condition_dims") == 0:
        return "UFLOW"
    return name


def _layers(row: Mapping[str, Any]) -> int:
    """Number of a cell's layers."""
    named = str(row["layers"]) if isinstance(row["layers"], str) else ""
    return len(named.split()) or len(getattr(BACKBONES.get(row["encoder"]), "layers", (1, 2, 3)))


def _by_class(number: int, measured: pd.DataFrame, setup: list[str]) -> Table:
    """Table 2 or 3: a row a class of MVTec AD, a column a setup."""
    rows: dict[str, dict[str, str]] = {}
    figures = published_table(number).merge(_percentages(measured, setup, "MVTecAD"), how="left")
    for figure in _records(figures):
        if number == 2:
            column = "{encoder}, {coupling_blocks} blocks, {pooling_layers} layers, {size}".format_map(figure)
            column += ", UFLOW" if figure["model"] == "UFLOW" else ""
        else:
            column = f"{figure['model']}, {figure['encoder']}, {TITLES[figure['metric']]}"
        sigma = figure.get("sigma", math.nan)
        sigma = "" if math.isnan(sigma) else f" ± {sigma:.2f}"
        row = rows.setdefault(figure["category"], {"class": figure["category"]})
        row[column] = _beside(figure["value"], figure["measured"], sigma)
    return _published(number, pd.DataFrame(list(rows.values())))


def _averages(number: int, measured: pd.DataFrame, data: str) -> Table:
    """Table 4 or 5: a row a model, a column a metric, both over all categories."""
    published = published_table(number)
    metrics = published["metric"].unique()
    every = pd.MultiIndex.from_product([published["model"].unique(), metrics], names=["model", "metric"])
    published = published.set_index(["model", "metric"]).reindex(every).reset_index().assign(category="average")
    rows: dict[str, dict[str, str]] = {}
    for figure in _records(published.merge(_percentages(measured, ["model"], data), how="left")):
        row = rows.setdefault(figure["model"], {"model": figure["model"]})
        row[TITLES[figure["metric"]]] = _beside(figure["value"], figure["measured"])
    return _published(number, pd.DataFrame(list(rows.values())))


def _speed(measured: pd.DataFrame) -> Table:
    means = measured.groupby(["model", "encoder"])[["image_ms", "size_mb"]].mean().reset_index()
    rows = [
        {
            "model": row["model"],
            "encoder": row["encoder"],
            "images/s at 256": _beside(row["fps_256"], 1000 / row["image_ms"], digits=1),
            "MB, MVTec AD": _beside(row["mvtec_mb"], row["size_mb"], digits=0),
        }
        for row in _records(published_table(6).merge(means, how="left"))
    ]
    more = " In brackets: PyTorch's on this machine's CPU, one image after another; `cflow-plugin benchmark` has more."
    return _published(6, pd.DataFrame(rows), more)


def _published(number: int, texts: pd.DataFrame, more: str = "") -> Table:
    note = (
        f"Published figures; in brackets what was measured here, and the difference. {_NOT_MEASURED} was not measured."
    )
    return Table(f"Table {number}. {CAPTIONS[number]}", texts, note + more)


def _percentages(measured: pd.DataFrame, setup: list[str], data: str) -> pd.DataFrame:
    """Mean metrics in percent of a data set's categories, and their average where there are all of them.

    Returns:
        A row a setup, category and metric: ``*setup, category, metric, measured``.
    """
    metrics = [metric for metric in METRICS if metric in measured]
    here = measured[measured["data"] == data]
    cells = here.melt([*setup, "category"], metrics, var_name="metric", value_name="measured")
    # A mean over some of the categories is not the mean over all of them.
    found = cells.groupby([*setup, "metric"])["category"].transform("nunique")
    cells = pd.concat([cells, cells[found >= _CLASSES[data]].assign(category="average")])
    return (100 * cells.groupby([*setup, "category", "metric"])["measured"].mean()).reset_index()


def _beside(published: float, measured: float, sigma: str = "", digits: int = 2) -> str:
    """A published figure, or nothing where it is NaN, and in brackets the measured one."""
    known = not math.isnan(published)
    text = f"{published:g}{sigma}" if known else ""
    if math.isnan(measured):
        return f"{text} ({_NOT_MEASURED})"
    difference = f", {measured - published:+.{digits}f}" if known else ""
    return f"{text} ({measured:.{digits}f}{difference})"


def _spread(results: pd.DataFrame, what: str) -> str:
    seeds = results["seed"].nunique()
    return f"{what}; ± is the standard deviation over {seeds} seeds." if seeds > 1 else f"{what}; one seed."


def _means_and_texts(seeds: pd.DataFrame, levels: list[str]) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Means of the metrics over seeds, and the same as texts with standard deviations.

    Args:
        seeds: A row a seed, indexed by ``levels``.
        levels: What belongs together.
    """
    groups = seeds[[metric for metric in METRICS if metric in seeds]].groupby(level=levels, sort=False)
    means = groups.mean()
    sigmas = groups.std().map(lambda sigma: "" if math.isnan(sigma) else f" ± {sigma:.4f}")
    return means, (means.map("{:.4f}".format) + sigmas).where(means.notna(), _NOT_MEASURED)


def _highest(means: pd.DataFrame) -> pd.DataFrame:
    """Whether each is the highest of its column, to the digits that are shown; none in a column of a single one."""
    shown = means.round(4)
    return shown.eq(shown.max()) & (shown.count() > 1)


def _distinct(table: pd.DataFrame, columns: list[str]) -> list[tuple[Any, ...]]:
    return list(dict.fromkeys(zip(*(table[column] for column in columns), strict=True)))


def _records(table: pd.DataFrame) -> list[dict[str, Any]]:
    return [{str(name): value for name, value in row.items()} for row in table.to_dict("records")]
