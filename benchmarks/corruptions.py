"""Accuracy on corrupted test images, beside Padim's.

    python benchmarks/corruptions.py --weights resnet18.safetensors --data DATA --categories [cookies, magnetic_tile]

Models are trained on good images as they are. The test images, good and defective alike, are corrupted as a camera, a
cable or a bulb would do it: the kinds and the strengths of ImageNet-C (Hendrycks and Dietterich, ICLR 2019, severities
1 to 5), applied to 256×256 pixels.
"""

import io
from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np
import torch
from anomalib.data import MVTecAD
from anomalib.engine import Engine
from jsonargparse import auto_cli
from lightning import seed_everything
from PIL import Image
from rich import box
from rich.progress import track
from rich.table import Table
from skimage.color import hsv2rgb, rgb2hsv
from skimage.util import random_noise
from sklearn.metrics import roc_auc_score
from training import publish

from cflow_plugin.commands.compare.cell import MODELS, EncoderChoice, build_model

Image3 = np.ndarray
"""Shape ``(H, W, 3)``, values between 0 and 1."""


def gaussian_noise(image: Image3, severity: int, generator: np.random.Generator) -> Image3:
    """A sensor's noise in little light."""
    return random_noise(image, "gaussian", var=(0.08, 0.12, 0.18, 0.26, 0.38)[severity - 1] ** 2, rng=generator)


def shot_noise(image: Image3, severity: int, generator: np.random.Generator) -> Image3:
    """The noise of few photons."""
    photons = (60, 25, 12, 5, 3)[severity - 1]
    return generator.poisson(image * photons) / photons


def impulse_noise(image: Image3, severity: int, generator: np.random.Generator) -> Image3:
    """Bit errors."""
    return random_noise(image, "s&p", amount=(0.03, 0.06, 0.09, 0.17, 0.27)[severity - 1], rng=generator)


def defocus_blur(image: Image3, severity: int, generator: np.random.Generator) -> Image3:
    """Out of focus."""
    del generator
    radius = (3, 4, 6, 8, 10)[severity - 1]
    disk = cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (2 * radius + 1, 2 * radius + 1)).astype(np.float64)
    return cv2.filter2D(image, -1, disk / disk.sum())


def motion_blur(image: Image3, severity: int, generator: np.random.Generator) -> Image3:
    """Moved within the exposure, in any direction up to 45° from the horizontal."""
    length = (10, 15, 15, 15, 20)[severity - 1]
    line = np.zeros((2 * length + 1, 2 * length + 1))
    line[length, length // 2 : length // 2 + length + 1] = 1
    turn = cv2.getRotationMatrix2D((length, length), generator.uniform(-45, 45), 1)
    line = cv2.warpAffine(line, turn, line.shape)
    return cv2.filter2D(image, -1, line / line.sum())


def brightness(image: Image3, severity: int, generator: np.random.Generator) -> Image3:
    """More light."""
    del generator
    colours = rgb2hsv(image)
    colours[..., 2] += (0.1, 0.2, 0.3, 0.4, 0.5)[severity - 1]
    return hsv2rgb(np.clip(colours, 0, 1))


def contrast(image: Image3, severity: int, generator: np.random.Generator) -> Image3:
    """Fog, or a dirty lens."""
    del generator
    mean = image.mean((0, 1), keepdims=True)
    return (image - mean) * (0.4, 0.3, 0.2, 0.1, 0.05)[severity - 1] + mean


def pixelate(image: Image3, severity: int, generator: np.random.Generator) -> Image3:
    """Enlarged from fewer pixels."""
    del generator
    height, width = image.shape[:2]
    share = (0.6, 0.5, 0.4, 0.3, 0.25)[severity - 1]
    small = cv2.resize(image, (int(width * share), int(height * share)), interpolation=cv2.INTER_AREA)
    return cv2.resize(small, (width, height), interpolation=cv2.INTER_NEAREST)


def jpeg_compression(image: Image3, severity: int, generator: np.random.Generator) -> Image3:
    """Compressed by the camera."""
    del generator
    packed = io.BytesIO()
    Image.fromarray((255 * image).round().astype(np.uint8)).save(
        packed, "JPEG", quality=(25, 18, 15, 10, 7)[severity - 1]
    )
    return np.asarray(Image.open(packed)) / 255


CORRUPTIONS: list[Callable[[Image3, int, np.random.Generator], Image3]] = [
    gaussian_noise, shot_noise, impulse_noise, defocus_blur, motion_blur, brightness, contrast, pixelate,
    jpeg_compression,
]  # fmt: skip


def corrupt(batch: torch.Tensor, corruption: Callable | None, severity: int, seed: int) -> torch.Tensor:
    """Corrupt images ``(B, 3, H, W)`` with values between 0 and 1; all models get the same ones."""
    if corruption is None:
        return batch
    generator = np.random.default_rng(seed)
    images = batch.permute(0, 2, 3, 1).double().numpy()
    changed = [np.clip(corruption(image, severity, generator), 0, 1) for image in images]
    return torch.from_numpy(np.stack(changed)).permute(0, 3, 1, 2).float()


@torch.no_grad()
def measure(models: dict, batches: list, corruption: Callable | None, severity: int) -> list[dict]:
    """Both AUROCs of each model on all test images, corrupted in one way."""
    scores: dict[str, list] = {name: [] for name in models}
    maps: dict[str, list] = {name: [] for name in models}
    for number, batch in enumerate(batches):
        images = corrupt(batch.image, corruption, severity, number)
        for name, model in models.items():
            result = model.model(model.pre_processor(images))
            scores[name].append(result.pred_score.flatten())
            maps[name].append(result.anomaly_map.flatten())
    labels = torch.cat([batch.gt_label for batch in batches])
    masks = torch.cat([batch.gt_mask.flatten() for batch in batches]) > 0
    kind = "none" if corruption is None else corruption.__name__
    return [
        {
            "model": name,
            "corruption": kind,
            "severity": severity,
            "image_AUROC": float(roc_auc_score(labels, torch.cat(scores[name]))),
            "pixel_AUROC": float(roc_auc_score(masks, torch.cat(maps[name]))),
        }
        for name in models
    ]


def main(
    data: Path,
    weights: Path,
    categories: list[str],
    severities: list[int] = [1, 3, 5],  # noqa: B006  shown in --help
    layers: list[str] = ["layer2", "layer3"],  # noqa: B006
    seed: int = 0,
    output: Path = Path("results/benchmarks/corruptions"),
) -> None:
    """Test CflowPlugin and Padim on corrupted images, and write the figures as JSON and Markdown.

    Args:
        data: Folder with one folder a category, in MVTec AD's layout.
        weights: ResNet-18 weights in timm's names.
        categories: Which categories.
        severities: Strengths, 1 to 5.
        layers: Layers of the encoder, for both models.
        seed: Seed of everything.
        output: Folder for the results.
    """
    data, weights, output = data.resolve(), weights.resolve(), output.resolve()
    encoder = EncoderChoice("resnet18", layers, weights)
    rows = []
    for category in categories:
        datamodule = MVTecAD(root=data, category=category, num_workers=0)
        models = {}
        for name in ("CflowPlugin", "Padim"):
            seed_everything(seed, verbose=False)
            model = build_model(MODELS[name], encoder, (256, 256))
            engine = Engine(default_root_dir=output / "runs", logger=False, limit_val_batches=0)
            engine.fit(model, datamodule=datamodule)
            models[name] = model.eval().cpu()
        batches = list(datamodule.test_dataloader())
        cases = [(None, 0), *((corruption, severity) for corruption in CORRUPTIONS for severity in severities)]
        for corruption, severity in track(cases, description=category):
            rows += [{"category": category, **row} for row in measure(models, batches, corruption, severity)]
    publish("corruptions", _table(rows, categories, severities), {"seed": seed, "rows": rows}, output)


def _table(rows: list[dict], categories: list[str], severities: list[int]) -> Table:
    """Means over severities, image AUROC / pixel AUROC."""
    models = ("CflowPlugin", "Padim")
    columns = [f"{category}, {model}" for category in categories for model in models]
    table = Table(f"mean of severities {severities}", *columns, box=box.MARKDOWN)
    for kind in dict.fromkeys(row["corruption"] for row in rows):
        cells = []
        for category in categories:
            for model in models:
                found = [
                    row for row in rows if (row["category"], row["model"], row["corruption"]) == (category, model, kind)
                ]
                means = [np.mean([row[metric] for row in found]) for metric in ("image_AUROC", "pixel_AUROC")]
                cells.append(" / ".join(f"{mean:.3f}" for mean in means))
        table.add_row(kind, *cells)
    return table


if __name__ == "__main__":
    auto_cli(main, as_positional=False)
