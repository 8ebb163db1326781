"""Time and memory of the metrics beside anomalib's, and their error on as many pixels as ShanghaiTech Campus has.

    python benchmarks/metrics.py

Maps are synthetic: smooth noise that is higher in elliptic defects, squashed so that most scores lie close to each
other. They are drawn batch by batch, so that what a metric keeps is its own. The exact values follow by another way: a
count for every float32 number from 2⁻¹² to 1, SciPy's regions, and the area below the curve through all thresholds in
float64. Every measurement runs in its own process; seconds are of processor time, to which other work adds little.
"""

import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import cv2
import numpy as np
import torch
from jsonargparse import auto_cli
from rich import box
from rich.progress import track
from rich.table import Table
from scipy import ndimage
from sklearn.metrics import auc
from training import in_own_process, publish

from cflow_plugin.commands.machine import peak_resident_bytes

FIELDS = ["anomaly_map", "gt_mask"]
LOWEST = np.float32(2**-12)
LEVELS = int(np.float32(1).view(np.int32) - LOWEST.view(np.int32)) + 1
# Test frames of ShanghaiTech Campus, and roughly the share of them with an anomaly.
STC_FRAMES, STC_ANOMALOUS = 42_883, 0.4


def batches(images: int, size: int, anomalous: float, batch: int = 32) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Draw maps and masks, always the same ones.

    Args:
        images: How many.
        size: Height and width.
        anomalous: Share of images with one to three defects.
        batch: Images in a batch.

    Yields:
        Maps ``(B, H, W)``, float32 from 2⁻¹² to 1, and masks ``(B, H, W)``, bool.
    """
    generator = np.random.default_rng(0)
    for start in range(0, images, batch):
        maps = np.empty((min(batch, images - start), size, size), np.float32)
        masks = np.zeros(maps.shape, bool)
        for index in range(len(maps)):
            coarse = generator.standard_normal((size // 8, size // 8), np.float32)
            noise = cv2.resize(coarse, (size, size), interpolation=cv2.INTER_CUBIC)
            if generator.random() < anomalous:
                drawn = np.zeros((size, size), np.float32)
                for _ in range(generator.integers(1, 4)):
                    x, y = (int(value) for value in generator.integers(0, size, 2))
                    axes = tuple(int(value) for value in generator.integers(size // 64, size // 10, 2))
                    cv2.ellipse(drawn, (x, y), axes, float(generator.uniform(0, 180)), 0, 360, 1.0, -1)
                masks[index] = drawn > 0
                noise += cv2.blur(drawn, (size // 16, size // 16)) * generator.uniform(0.5, 3)
            # Softly squashed: half of the scores lie between 0.01 and 0.05.
            np.exp(noise - 4, out=noise)
            np.maximum(noise / (1 + noise), LOWEST, out=maps[index])
        yield maps, masks


def run(classes: str, names: list[str], images: int, size: int, anomalous: float) -> dict:
    """Time metrics on a set.

    Args:
        classes: Module of the metrics.
        names: Names of the metrics.
        images: How many images.
        size: Height and width.
        anomalous: Share of images with defects.

    Returns:
        Processor seconds in updates and computing, peak memory in MiB beyond that at the start, values and bounds.
    """
    import importlib

    metrics = [getattr(importlib.import_module(classes), name)(fields=FIELDS) for name in names]
    # What is loaded on first use is no metric's.
    list(batches(2, size, 1.0))
    memory = _resident_bytes()
    spent = 0.0
    progress = track(batches(images, size, anomalous), total=-(-images // 32), disable=images < 1000)
    for maps, masks in progress:
        part = SimpleNamespace(anomaly_map=torch.from_numpy(maps)[:, None], gt_mask=torch.from_numpy(masks))
        start = time.process_time()
        for metric in metrics:
            metric.update(part)
        spent += time.process_time() - start
    start = time.process_time()
    values = {name: metric.compute().item() for name, metric in zip(names, metrics, strict=True)}
    spent += time.process_time() - start
    peak = (peak_resident_bytes() - memory) / 2**20
    bounds = {name: getattr(metric, "error_bound", None) for name, metric in zip(names, metrics, strict=True)}
    return {"seconds": spent, "peak_memory_mib": peak, "values": values, "bounds": bounds}


def exact(images: int, size: int, anomalous: float, fpr_limit: float = 0.3) -> dict[str, float]:
    """AUROC and AUPRO from the number of pixels of each possible score, in float64."""
    normal, pixels, regions = (np.zeros(LEVELS, kind) for kind in (np.uint32, np.uint32, np.float64))
    structure = np.zeros((3, 3, 3))
    structure[1] = 1
    for maps, masks in track(batches(images, size, anomalous), total=-(-images // 32), disable=images < 1000):
        # Largest score first.
        levels = LEVELS - 1 - (maps.view(np.int32) - LOWEST.view(np.int32))
        occupied, counts = np.unique(levels[~masks], return_counts=True)
        normal[occupied] += counts.astype(np.uint32)
        if masks.any():
            labels, _ = ndimage.label(masks, structure)
            found, labels = levels[masks], labels[masks]
            np.add.at(pixels, found, np.uint32(1))
            np.add.at(regions, found, 1 / np.bincount(labels)[labels])
    occupied = (normal > 0) | (pixels > 0)
    sums = (np.cumsum(counts[occupied], dtype=np.float64) for counts in (normal, pixels, regions))
    fpr, tpr, overlap = (np.concatenate([[0], counts / counts[-1]]) for counts in sums)
    inside = fpr <= fpr_limit
    limited_fpr = np.append(fpr[inside], fpr_limit)
    limited_overlap = np.append(overlap[inside], np.interp(fpr_limit, fpr, overlap))
    area = auc(limited_fpr, limited_overlap) / fpr_limit
    return {"AUROC": float(auc(fpr, tpr)), "AUPRO": float(area)}


def _resident_bytes() -> int:
    [line] = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmRSS")]
    return int(line.split()[1]) * 1024


def main(
    images: list[int] = [83, 167],  # noqa: B006  shown in --help
    sizes: list[int] = [256, 512],  # noqa: B006
    frames: int = STC_FRAMES,
    frame_size: int = 256,
    repetitions: int = 3,
    output: Path = Path("results/benchmarks/metrics"),
) -> None:
    """Measure the metrics, and write the figures as JSON and Markdown.

    Args:
        images: Numbers of images of the sets on which anomalib's metrics are timed as well.
        sizes: Heights and widths of these images.
        frames: Number of images of the large set; 0 leaves it out.
        frame_size: Height and width of its images.
        repetitions: How often to time the smaller sets; the fastest counts.
        output: Folder for the results.
    """
    table = Table("set", "metric", "of", "CPU s", "peak MiB", "value", "bound", "error", box=box.MARKDOWN)
    report: dict = {"sets": []}
    for size in sizes:
        for count in images:
            truth = in_own_process(exact, count, size, 0.7)
            for name in ("AUROC", "AUPRO"):
                for title, module in (("anomalib", "anomalib.metrics"), ("here", "cflow_plugin.metrics")):
                    runs = [in_own_process(run, module, [name], count, size, 0.7) for _ in range(repetitions)]
                    best = min(runs, key=lambda one: one["seconds"])
                    report["sets"].append({"images": count, "size": size, "of": title, "exact": truth, "runs": runs})
                    _add(table, f"{count} × {size}²", title, best, truth)
    if frames:
        truth = in_own_process(exact, frames, frame_size, STC_ANOMALOUS)
        found = in_own_process(run, "cflow_plugin.metrics", ["AUROC", "AUPRO"], frames, frame_size, STC_ANOMALOUS)
        report["frames"] = {"images": frames, "size": frame_size, "exact": truth, **found}
        _add(table, f"{frames} × {frame_size}²", "here", found, truth)
    publish("metrics", table, report, output.resolve())


def _add(table: Table, images: str, title: str, found: dict, truth: dict) -> None:
    for index, (name, value) in enumerate(found["values"].items()):
        # Metrics of one run share its seconds and its memory.
        cost = ["", ""] if index else [f"{found['seconds']:.2f}", f"{found['peak_memory_mib']:.0f}"]
        bound = found["bounds"][name]
        row = [f"{value:.7f}", "" if bound is None else f"{bound:.1e}", f"{abs(value - truth[name]):.1e}"]
        table.add_row(images, name, title, *cost, *row)


if __name__ == "__main__":
    auto_cli(main, as_positional=False)
