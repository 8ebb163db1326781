"""False alarms asked for and found, and what defects are still found at that threshold.

    python benchmarks/false_alarms.py --weights resnet18.safetensors --data DATA --categories [cookies, magnetic_tile]
    python benchmarks/false_alarms.py --weights resnet18.safetensors --resolution 768 --tile 384 --splits 200

DATA holds one folder a category in MVTec AD's layout. For each category a model is trained by the default recipe on
half of the good training images. The other half and the good test images are a pool that the model has never seen. It
is split at random, many times, into images that set the threshold and images that check it; within a pool, random
splits make the two exchangeable, which is all that the guarantee asks for. The same is done with procedural textures.
The splits share one pool and one model, so they are not independent of each other; each of them alone is a fair trial.

Three shares of false alarms are counted: normal images above the image threshold, normal images whose mask shows any
pixel, and normal images with a region of at least ``--smallest`` pixels. Whether a split is inside is judged twice. The
*binomial* interval (95 %, Clopper-Pearson) around what was found must hold the rate that was asked for. It takes the
threshold's own rate to be exactly that, though a threshold from n images has a rate that scatters around it. So that
this scatter is small beside the interval, five sixths of a pool set the threshold and one sixth checks it
(``--checked``). How many can then be inside is computed from the theory and stands beside what was found. The
*beta-binomial* interval (the middle 95 % of the number of alarms) allows for both.
"""

import tempfile
from pathlib import Path

import numpy as np
import torch
from anomalib.data import MVTecAD
from anomalib.data.utils import ValSplitMode
from anomalib.engine import Engine
from jsonargparse import auto_cli
from lightning import LightningDataModule, seed_everything
from lightning.pytorch.trainer.states import TrainerFn
from rich import box
from rich.progress import track
from rich.table import Table
from scipy.stats import betabinom, binomtest
from sklearn.metrics import precision_recall_curve
from training import publish

from cflow_plugin import CflowPlugin
from cflow_plugin.data import Textures
from cflow_plugin.decisions.conformal import images_needed, threshold_rank
from cflow_plugin.decisions.regions import region_level

CHECKED_AT_LEAST = 10
PIXEL_STRIDE = 4  # of the pixels that pixel recall and the F1-optimal pixel threshold are read on


def main(
    weights: Path,
    data: Path | None = None,
    categories: list[str] = [],  # noqa: B006  shown in --help
    textures: list[str] = ["weave", "wood_grain"],  # noqa: B006
    rates: list[float] = [0.01, 0.05, 0.1],  # noqa: B006
    splits: int = 500,
    pool: int = 300,
    checked: float = 1 / 6,
    resolution: int = 256,
    tile: int = 0,
    smallest: int = 16,
    seed: int = 0,
    output: Path = Path("results/benchmarks/false_alarms"),
) -> None:
    """Compare false-alarm rates found with those asked for, and write the figures as JSON and Markdown.

    Args:
        weights: ResNet-18 weights in timm's names, .safetensors, at least up to layer3.
        data: Folder with one folder a category, in MVTec AD's layout; not needed without categories.
        categories: Which categories.
        textures: Which procedural textures.
        rates: False-alarm rates to ask for.
        splits: Random splits of each pool.
        pool: Good images in the pool of a texture.
        checked: Share of a pool that checks the threshold.
        resolution: Height and width of textures in pixels, and of what the model takes.
        tile: Look at images in tiles of at most so many pixels; 0 for none.
        smallest: Pixels of the map that a region has at least.
        seed: Seed of everything.
        output: Folder for the results.
    """
    weights, output = weights.resolve(), output.resolve()
    if categories and data is None:
        raise SystemExit("The categories are looked for below --data, which is missing.")
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        sources: list[tuple[str, LightningDataModule]] = [
            (name, MVTecAD(root=Path(data or "").resolve(), category=name, num_workers=0)) for name in categories
        ]
        images = {"train_good": 100, "test_good": pool - 50, "resolution": resolution, "seed": seed}
        sources += [(f"{name} (texture)", Textures(root=folder, category=name, **images)) for name in textures]
        sizes = {"image_size": (resolution, resolution), "tile_size": tile or None}
        for name, source in sources:
            normal, defective = _score(source, weights, sizes, smallest, seed, Path(folder) / "runs")
            rows += [
                {"data": name, "asked": rate, **_compare(normal, defective, rate, checked, splits, seed)}
                for rate in rates
            ]
    columns = ["data", "asked", "held out / checked"]
    for what in ("images", "masks", "regions"):
        columns += [f"{what}: false alarms", "inside binomial", "inside beta-binomial"]
    columns += ["binomial in theory", "recall", "of pixels", "F1-optimal: false alarms", "recall", "of pixels"]
    table = Table(*columns, box=box.MARKDOWN)
    for row in rows:
        if "needed" in row:
            refused = f"not possible: {row['needed']} held out and {CHECKED_AT_LEAST} checked of {row['pool']}"
            table.add_row(row["data"], f"{row['asked']:.0%}", refused)
            continue
        percentages = []
        for what in ("image", "mask", "region"):
            percentages += [row[f"{what}_{key}"] for key in ("alarms", "binomial", "beta_binomial")]
        percentages += [row[key] for key in ("binomial_expected", "recall", "pixel_recall")]
        percentages += [row[key] for key in ("f1_alarms", "f1_recall", "f1_pixel_recall")]
        counts = f"{row['held_out']} / {row['checked']}"
        table.add_row(row["data"], f"{row['asked']:.0%}", counts, *(f"{100 * value:.1f} %" for value in percentages))
    settings = {"seed": seed, "splits": splits, "resolution": resolution, "tile": tile, "smallest": smallest}
    publish("false_alarms", table, {**settings, "rows": rows}, output)


def _score(
    source: LightningDataModule, weights: Path, sizes: dict, smallest: int, seed: int, folder: Path
) -> tuple[dict, dict]:
    """Train on half of the training images, and score all others: normal ones and defective ones."""
    source.val_split_mode = ValSplitMode.NONE
    source.prepare_data()
    source.setup(TrainerFn.FITTING)  # a stage of this type is not set up again in the run
    seed_everything(seed, verbose=False)
    order = torch.randperm(len(source.train_data)).tolist()
    half = len(order) // 2
    left = source.train_data.subsample(sorted(order[half:]))
    source.train_data = source.train_data.subsample(sorted(order[:half]))
    common = {"weights": str(weights), "target_false_alarm_rate": None, "visualizer": False}
    model = CflowPlugin(layers=["layer2", "layer3"], **common, **sizes)
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    Engine(default_root_dir=folder, accelerator="cpu", limit_val_batches=0, **quiet).fit(model, datamodule=source)
    model.eval()
    sides: tuple[dict, dict] = ({}, {})
    for item in track([*left, *source.test_data], "Scoring", transient=True):
        with torch.inference_mode():
            result = model.model(model.pre_processor(item.image[None]))
        anomaly_map = result.anomaly_map[0, 0, ::PIXEL_STRIDE, ::PIXEL_STRIDE].numpy()
        size = [PIXEL_STRIDE * cells for cells in anomaly_map.shape]
        mask = np.zeros(anomaly_map.shape, bool)
        if item.gt_label:
            given = torch.nn.functional.interpolate(item.gt_mask[None, None].float(), size)[0, 0]
            mask = given[::PIXEL_STRIDE, ::PIXEL_STRIDE].numpy() > 0
        whole = result.anomaly_map[0, 0].numpy()
        values = {"score": result.pred_score.item(), "maximum": whole.max(), "region": region_level(whole, smallest)}
        for key, value in {**values, "map": anomaly_map, "mask": mask}.items():
            sides[int(item.gt_label)].setdefault(key, []).append(value)
    return tuple({key: np.array(values) for key, values in side.items()} for side in sides)


def _compare(normal: dict, defective: dict, rate: float, share: float, splits: int, seed: int) -> dict:
    total = len(normal["score"])
    held_out = max(images_needed(rate), total - round(share * total))
    checked = total - held_out
    if checked < CHECKED_AT_LEAST:
        held_out = images_needed(rate)
        checked = total - held_out
    if checked < CHECKED_AT_LEAST:
        return {"needed": images_needed(rate), "pool": total}
    rank = threshold_rank(held_out, rate)
    extreme = held_out + 1 - rank
    theory = betabinom(checked, extreme, held_out + 1 - extreme)
    counts = np.arange(checked + 1)
    binomial = np.array([_interval_holds(count, checked, rate) for count in counts])
    low, high = theory.ppf([0.025, 0.975])
    beta_binomial = (low <= counts) & (counts <= high)
    generator = np.random.default_rng(seed)
    alarms = {"score": [], "maximum": [], "region": []}
    recalls, pixel_recalls = [], []
    for _ in range(splits):
        order = generator.permutation(total)
        thresholds = {}
        for key, found in alarms.items():
            thresholds[key] = np.sort(normal[key][order[:held_out]])[rank - 1]
            found.append(int((normal[key][order[held_out:]] > thresholds[key]).sum()))
        recalls.append((defective["score"] > thresholds["score"]).mean())
        pixel_recalls.append((defective["map"][defective["mask"]] > thresholds["maximum"]).mean())
    image_f1 = _f1_optimal(normal["score"], defective["score"], np.ones(len(defective["score"]), bool))
    pixel_f1 = _f1_optimal(normal["map"].ravel(), defective["map"].ravel(), defective["mask"].ravel())
    return {
        "held_out": held_out,
        "checked": checked,
        **{
            f"{what}_{name}": float(found.mean())
            for what, key in (("image", "score"), ("mask", "maximum"), ("region", "region"))
            for name, found in (
                ("alarms", np.array(alarms[key]) / checked),
                ("binomial", binomial[alarms[key]]),
                ("beta_binomial", beta_binomial[alarms[key]]),
            )
        },
        "binomial_expected": float((theory.pmf(counts) * binomial).sum()),
        "beta_binomial_expected": float((theory.pmf(counts) * beta_binomial).sum()),
        "recall": float(np.mean(recalls)),
        "pixel_recall": float(np.mean(pixel_recalls)),
        "f1_alarms": float((normal["score"] >= image_f1).mean()),
        "f1_recall": float((defective["score"] >= image_f1).mean()),
        "f1_pixel_recall": float((defective["map"][defective["mask"]] >= pixel_f1).mean()),
    }


def _interval_holds(alarms: int, checked: int, rate: float) -> bool:
    interval = binomtest(alarms, checked).proportion_ci(0.95, method="exact")
    return bool(interval.low <= rate <= interval.high)


def _f1_optimal(normal: np.ndarray, other: np.ndarray, truth: np.ndarray) -> float:
    """The threshold (values from it on are positive) that maximises F1."""
    labels = np.concatenate([np.zeros(len(normal), bool), truth])
    precision, recall, thresholds = precision_recall_curve(labels, np.concatenate([normal, other]))
    f1 = 2 * precision * recall / np.maximum(precision + recall, 1e-12)
    return float(thresholds[np.argmax(f1[:-1])])


if __name__ == "__main__":
    auto_cli(main, as_positional=False)
