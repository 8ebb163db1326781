"""Accuracy on all real sets, beside anomalib's Padim and this package's Spade, and of settings beside each other.

    python benchmarks/accuracy.py --data DATA --weights resnet18.safetensors --seeds [0,1,2]
    python benchmarks/accuracy.py --data DATA --weights resnet18.safetensors --variants benchmarks/choices.yaml
    python benchmarks/accuracy.py --data DATA --weights resnet18.safetensors --images 4
    python benchmarks/accuracy.py --data DATA --backbone tf_efficientnet_lite0 --layers "[blocks.2, blocks.4]"

DATA holds one folder a set: ``train/good``, ``test/...`` and ``ground_truth/...``. The file of variants names the
settings in which each differs from CflowPlugin's default.

A default is chosen on all sets, and what was chosen on a set says little about it. So the table's column "left out"
shows for each set the variant that is best on all *other* sets. Each training runs in a process of its own; variants of
the scoring alone are tested with the default's training. Each cell is kept: a run that is cut off goes on where it was.
Validation is switched off, and no image is held out for thresholds.
"""

import json
from pathlib import Path

import pandas as pd
import torch
import yaml
from anomalib.data import AnomalibDataModule, Batch, Folder, MVTecAD
from anomalib.engine import Engine
from jsonargparse import auto_cli
from lightning import LightningModule, seed_everything
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.trainer.states import TrainerFn
from rich.progress import track
from training import METRICS, in_own_process

from cflow_plugin import CflowPlugin
from cflow_plugin.errors import CflowError
from cflow_plugin.files import atomic_file
from cflow_plugin.model.scoring import AnomalyScoring
from cflow_plugin.training.vector_loader import VectorLoader

RIVALS = ("Padim", "Spade")
DEFAULT = "CflowPlugin"
# Settings of CflowPlugin that change nothing of its training.
SCORING = ("sigma", "top_fraction", "position_correction", "aggregation", "map_mean", "whole_image")


def data_of(folder: Path) -> AnomalibDataModule:
    """The data module for a set, whether or not its files are named as MVTec AD's.

    Args:
        folder: The set.
    """
    settings = {"num_workers": 0, "eval_batch_size": 8}
    if any(folder.glob("ground_truth/*/*_mask.png")):
        return MVTecAD(root=folder.parent, category=folder.name, **settings)
    kinds = sorted(path.name for path in (folder / "test").iterdir() if path.name != "good")
    return Folder(
        name=folder.name,
        root=folder,
        normal_dir="train/good",
        normal_test_dir="test/good",
        abnormal_dir=[f"test/{kind}" for kind in kinds],
        mask_dir=[f"ground_truth/{kind}" for kind in kinds],
        val_split_mode="none",
        test_split_mode="from_dir",
        **settings,
    )


def measure(
    model: str,
    settings: dict,
    folder: Path,
    backbone: str,
    layers: list[str] | None,
    weights: Path | None,
    seed: int,
    runs: Path,
    images: int | None = None,
    rescored: dict[str, dict] | None = None,
) -> dict[str, dict]:
    """Train one model once, and test it.

    Args:
        model: ``CflowPlugin``, ``Cflow``, ``Padim`` or ``Spade``.
        settings: Arguments of the model where they differ from its defaults.
        folder: The set.
        backbone: timm's name of the encoder.
        layers: Its layers.
        weights: Its weights in timm's names; by default those of a package or of timm's hub.
        seed: Seed of everything.
        runs: Folder for what training writes.
        images: Train on so many images, drawn at random by the seed; on all by default.
        rescored: Settings of CflowPlugin's scoring by name, with which what was trained is tested as well.

    Returns:
        By name, that of the settings trained with being empty: the metrics, the mean of the map over good test images,
        before normalisation, and how many were trained on.
    """
    from cflow_plugin.commands.compare.cell import EncoderChoice, Variant, build_model

    seed_everything(seed, verbose=False)
    network = build_model(Variant(model, settings), EncoderChoice(backbone, layers, weights), (256, 256))
    data = data_of(folder)
    data.setup(TrainerFn.FITTING)  # of another stage the engine would do it again, and take all images
    if images is not None:
        drawn = torch.randperm(len(data.train_data), generator=torch.Generator().manual_seed(seed))
        data.train_data = data.train_data.subsample(sorted(drawn[:images].tolist()))
    glow, kept = Glow(), KeptVectors()
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    engine = Engine(default_root_dir=runs, accelerator="cpu", limit_val_batches=0, callbacks=[glow, kept], **quiet)
    engine.fit(network, datamodule=data)
    trained_on = len(data.train_data)
    found = {}
    for name, changed in {"": None, **(rescored or {})}.items():
        if changed is not None:
            rescore(network, changed, kept.vectors)
        glow.means.clear()
        [metrics] = engine.test(network, datamodule=data, verbose=False)
        found[name] = {metric: metrics[metric] for metric in METRICS}
        found[name] |= {"good_map": sum(glow.means) / len(glow.means), "training_images": trained_on}
    return found


def rescore(network: CflowPlugin, settings: dict, vectors: VectorLoader) -> None:
    """Let a trained model score as if it had been trained with other settings of the scoring.

    Args:
        network: The model.
        settings: The settings that differ from those it was trained with.
        vectors: What it was trained on.
    """
    values = {name: settings.get(name, network.hparams[name]) for name in SCORING}
    model = network.model
    model.whole.weight = values.pop("whole_image")
    scoring = AnomalyScoring(len(model.decoders), **values)
    scoring.interest = model.scoring.interest
    model.scoring = scoring
    network.calibration.begin(vectors, None, network.scored)
    network.calibration.calibrate(network)
    network.calibration.end()


class KeptVectors(Callback):
    """What a model was trained on; without this nothing refers to it any more."""

    def on_train_end(self, trainer: object, pl_module: LightningModule) -> None:
        """Keep it."""
        del trainer
        self.vectors = pl_module.calibration.vectors if isinstance(pl_module, CflowPlugin) else None


class Glow(Callback):
    """How bright the maps of good images are; without validation nothing normalises them."""

    def __init__(self) -> None:
        self.means: list[float] = []

    def on_test_batch_end(self, trainer: object, pl_module: object, outputs: object, batch: Batch, *_: object) -> None:
        """Note the means of the batch's maps."""
        del trainer, pl_module, outputs
        self.means += batch.anomaly_map.flatten(1).mean(1)[~batch.gt_label.bool()].tolist()


def left_out(means: pd.DataFrame, variants: list[str]) -> dict[str, str]:
    """For each set the variant that is best on the others.

    Args:
        means: Metrics by set and variant, averaged over seeds.
        variants: What is chosen from.

    Returns:
        Names of variants by set. The best has the highest mean of all metrics over the sets.
    """
    scores = means[list(METRICS)].mean(axis=1).unstack("variant")[variants]
    return {name: str(scores.drop(index=name).mean().idxmax()) for name in scores.index}


def main(
    data: Path,
    weights: Path | None = None,
    backbone: str = "resnet18",
    sets: list[str] | None = None,
    layers: list[str] | None = None,
    seeds: list[int] | None = None,
    variants: Path | None = None,
    only: list[str] | None = None,
    rivals: list[str] | None = None,
    images: int | None = None,
    output: Path = Path("results/benchmarks/accuracy"),
) -> None:
    """Measure, and write all figures as CSV and the table as Markdown.

    Args:
        data: Folder with one folder a set.
        weights: The encoder's weights in timm's names; by default those of a package or of timm's hub.
        backbone: timm's name of the encoder; one output folder for each.
        sets: Which sets; all by default.
        layers: Layers of the encoder; of ResNet-18 layer2 and layer3 by default, of others the encoder's own.
        seeds: Seeds of everything; 0 by default.
        variants: File that names variants of CflowPlugin and their settings.
        only: Which of these; all by default.
        rivals: Models to compare with; by default Padim and Spade where weights are given, which Padim needs.
        images: Train on so many good images; on all by default.
        output: Folder for the results; what is there already is not measured again.
    """
    data, weights, output = data.resolve(), weights and weights.resolve(), output.resolve()
    layers = layers or (["layer2", "layer3"] if backbone == "resnet18" else None)
    folders = [data / name for name in sets or sorted(path.name for path in data.iterdir() if path.is_dir())]
    rivals = list(RIVALS if weights else ()) if rivals is None else rivals
    named = yaml.safe_load(variants.read_text()) if variants else {}
    chosen = {DEFAULT: {}, **{name: settings for name, settings in named.items() if only is None or name in only}}
    plan = [(DEFAULT, name, settings) for name, settings in chosen.items()] + [(name, name, {}) for name in rivals]
    rows = []
    cells = [(folder, *one, seed) for folder in folders for one in plan for seed in seeds or [0]]
    for folder, model, variant, settings, seed in track(cells, description="Training"):
        few = "" if images is None else f"-of-{images}"
        files = {name: output / "cells" / folder.name / f"{name}-{seed}{few}.json" for name in (variant, *chosen)}
        cell = files[variant]
        if not cell.is_file():
            cell.parent.mkdir(parents=True, exist_ok=True)
            rescored = {
                name: others
                for name, others in chosen.items()
                if variant == DEFAULT and others and not set(others) - set(SCORING) and not files[name].is_file()
            }
            arguments = (settings, folder, backbone, layers, weights, seed, output / "runs", images, rescored)
            try:
                results = in_own_process(measure, model, *arguments)
            except CflowError as error:  # Padim of one image, which has no covariance, gives no numbers
                if model == DEFAULT:
                    raise
                print(f"{model} on {folder.name}: {error}")
                results = {"": dict.fromkeys((*METRICS, "good_map"), float("nan"))}
            for name, found in results.items():
                with atomic_file(files[name or variant]) as file:
                    file.write_text(json.dumps({"settings": rescored.get(name, settings), **found}))
        found = json.loads(cell.read_text())
        if found.pop("settings") != settings:
            raise SystemExit(f"{cell} was measured with other settings: give the variant another name.")
        rows.append({"set": folder.name, "variant": variant, "seed": seed, **found})
    table = pd.DataFrame(rows)
    table.to_csv(output / "accuracy.csv", index=False)
    means = table.drop(columns="seed").groupby(["set", "variant"]).mean()
    spread = table.drop(columns="seed").groupby(["set", "variant"]).std(ddof=0)
    shown = pd.DataFrame(
        {
            variant: {
                name: " / ".join(
                    f"{means.loc[name, variant][m]:.3f} ± {spread.loc[name, variant][m]:.3f}" for m in METRICS
                )
                for name in means.index.unique("set")
            }
            for _, variant, _ in plan
        }
    )
    shown["left out"] = pd.Series(left_out(means, list(chosen)))
    best = pd.concat([means.xs(name, level="variant") for name in rivals]).groupby("set").max() if rivals else None
    few = "" if images is None else f", {images} training images"
    lines = [f"Image AUROC / pixel AUROC / AUPRO, float32, seeds {seeds or [0]}{few}.", "", shown.to_markdown(), ""]
    for _, variant, _ in plan:
        own = means.xs(variant, level="variant")
        line = f"- {variant}: mean " + " / ".join(f"{own[m].mean():.4f}" for m in METRICS)
        line += f"; mean of the map on good test images at most {own['good_map'].max():.3f}"
        if best is not None and variant not in rivals:
            margins = own[list(METRICS)] - best[list(METRICS)]
            worst = (f"{margins[m].min():+.3f} on {margins[m].idxmin()}" for m in METRICS)
            line += "; worst margin against the best rival " + " / ".join(worst)
        lines.append(line)
    picks = left_out(means, list(chosen))
    honest = pd.DataFrame([means.loc[name, variant] for name, variant in picks.items()])
    lines.append("- left out: mean " + " / ".join(f"{honest[m].mean():.4f}" for m in METRICS))
    text = "\n".join(lines) + "\n"
    (output / "accuracy.md").write_text(text)
    print(text)
    print(f"Results are in {output}.")


if __name__ == "__main__":
    auto_cli(main, as_positional=False)
