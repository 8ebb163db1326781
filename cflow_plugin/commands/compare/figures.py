"""A comparison's curves, distributions and pictures (the paper's Figures 3 and 4 among them)."""

__all__ = ["curves", "densities", "grid", "trade_off"]

from collections.abc import Mapping

import numpy as np
import pandas as pd
from matplotlib.collections import PathCollection
from matplotlib.figure import Figure
from sklearn.metrics import roc_curve

Records = Mapping[str, Mapping[str, np.ndarray]]


def curves(records: Records) -> Figure | None:
    """ROC curves of images and of pixels, and the PRO curve up to its limit.

    Args:
        records: What was recorded in each model's test.

    Returns:
        The figure, or nothing if no test had good and bad examples.
    """
    figure = Figure(figsize=(11, 3.6), layout="constrained")
    axes = figure.subplots(1, 3)
    drawn = False
    for number, (model, record) in enumerate(records.items()):
        style = {"color": f"C{number}", "linewidth": 1.5, "label": model}
        if "image_threshold" in record:
            false, true, _ = roc_curve(record["image_labels"], record["image_scores"])
            axes[0].plot(false, true, **style)
            drawn = True
        for place, name in ((1, "roc"), (2, "pro")):
            if name in record:
                axes[place].plot(*record[name], **style)
                drawn = True
    if not drawn:
        return None
    titles = ("images", "pixels", "regions")
    names = ("true positive rate", "true positive rate", "per-region overlap")
    for axis, title, name, limit in zip(axes, titles, names, (1, 1, 0.3), strict=True):
        axis.set(title=title, xlabel="false positive rate", ylabel=name, xlim=(0, limit), ylim=(0, 1.005))
        axis.grid(visible=True, alpha=0.3)
    axes[0].legend(fontsize=8, loc="lower right")
    return figure


def densities(records: Records) -> Figure | None:
    """Distribution of normal and of anomalous pixels' scores, with the F1-optimal threshold (Figure 4).

    Args:
        records: What was recorded in each model's test.
    """
    records = {model: record for model, record in records.items() if "density_edges" in record}
    if not records:
        return None
    figure = Figure(figsize=(2.9 * len(records), 2.7), layout="constrained")
    for axis, (model, record) in zip(figure.subplots(1, len(records), squeeze=False)[0], records.items(), strict=True):
        edges = record["density_edges"]
        for name, colour in (("normal", "tab:green"), ("anomalous", "tab:red")):
            axis.stairs(record[f"density_{name}"], edges, fill=True, color=colour, alpha=0.5, label=name)
        axis.axvline(float(record["pixel_threshold"]), color="black", linewidth=1, linestyle="--", label="threshold τ")
        axis.set(title=model, xlabel="pixel score", yticks=[], xlim=(edges[0], edges[-1]))
    figure.axes[0].set_ylabel("density")
    figure.axes[0].legend(fontsize=7)
    return figure


def grid(records: Records) -> Figure | None:
    """Inputs and true masks, and each model's maps and masks at the F1-optimal threshold (Figure 3).

    Args:
        records: What was recorded in each model's test; all show the same images.
    """
    records = {model: record for model, record in records.items() if "pixel_threshold" in record}
    if not records:
        return None
    first = next(iter(records.values()))
    rows = [("input", first["sample_images"], {}), ("true mask", first["sample_masks"], {"cmap": "gray", "vmin": 0})]
    for model, record in records.items():
        maps, edges = record["sample_maps"], record["density_edges"]
        rows.append((f"{model}\nmap", maps, {"cmap": "jet", "vmin": edges[0], "vmax": edges[-1]}))
        above = maps > float(record["pixel_threshold"])
        rows.append((f"{model}\nmask", above, {"cmap": "gray", "vmin": 0, "vmax": 1}))
    names = first["sample_names"]
    figure = Figure(figsize=(1.4 * len(names) + 0.6, 1.4 * len(rows)), layout="constrained")
    axes = figure.subplots(len(rows), len(names), squeeze=False)
    for (title, pictures, style), line in zip(rows, axes, strict=True):
        line[0].set_ylabel(title, fontsize=8)
        for axis, picture in zip(line, pictures, strict=True):
            axis.imshow(picture, **({"vmax": 1} | style if style else {}))
            axis.set(xticks=[], yticks=[])
    for axis, name in zip(axes[0], names, strict=True):
        axis.set_title(str(name), fontsize=8)
    return figure


def trade_off(results: pd.DataFrame) -> Figure:
    """Accuracy against time an image; a disc's area is the model's size.

    Args:
        results: A row a cell.
    """
    metric = "pixel_AUROC" if "pixel_AUROC" in results and results["pixel_AUROC"].notna().any() else "image_AUROC"
    groups = ["model", "encoder", "size"]
    # A mean over some of the categories is no match for one over all.
    done = results.groupby(groups, sort=False)["category"].transform("nunique")
    complete = results[done == results["category"].nunique()]
    means = complete.groupby(groups, sort=False)[[metric, "image_ms", "size_mb"]].mean().reset_index()
    figure = Figure(figsize=(8, 4), layout="constrained")
    axis = figure.add_subplot()
    for number, row in enumerate(means.itertuples()):
        area = 400 * row.size_mb / means["size_mb"].max() + 10
        label = f"{row.model}, {row.size_mb:.0f} MB" + (f", {row.encoder}" if means["encoder"].nunique() > 1 else "")
        axis.scatter(row.image_ms, getattr(row, metric), s=area, color=f"C{number}", alpha=0.6, label=label)
    for handle in figure.legend(loc="outside right upper", fontsize=8).legend_handles:
        if isinstance(handle, PathCollection):
            handle.set_sizes([50])
    axis.set(xscale="log", xlabel="ms an image (PyTorch)", ylabel=f"mean {metric.replace('_', ' ')}")
    axis.margins(0.25)
    axis.grid(visible=True, which="both", alpha=0.3)
    return figure
