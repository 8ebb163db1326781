"""Which operations INT8 must leave alone: accuracy with more and more of them kept in floating point.

    python benchmarks/quantization.py --weights resnet18.safetensors --data DATA --categories [cookies, magnetic_tile]

DATA holds one folder a category in MVTec AD's layout. For each category a model is trained by the default recipe and
quantized by NNCF, calibrated on its training images, with different operations left out. What the export does is the
last line.
"""

from collections.abc import Callable
from pathlib import Path

import nncf
import numpy as np
import openvino as ov
import torch
from anomalib.data import MVTecAD
from jsonargparse import auto_cli
from rich import box
from rich.table import Table
from sklearn.metrics import roc_auc_score
from training import publish, train_default

from cflow_plugin import CflowPlugin
from cflow_plugin.deploy.graph import convert_to_openvino
from cflow_plugin.deploy.quantization import TrainingImages


def is_map(node: ov.Node) -> bool:
    """Whether an operation turns log-likelihoods into the map: a matrix product outside encoder and decoders."""
    return node.get_type_name() == "MatMul" and not node.get_friendly_name().startswith("flows.")


def is_whitening(node: ov.Node) -> bool:
    """Whether an operation is a decoder's whitening."""
    return "whitening" in node.get_friendly_name()


def is_first_convolution(node: ov.Node) -> bool:
    """Whether an operation is the encoder's first convolution."""
    return node.get_type_name() == "Convolution" and node.input_value(0).get_partial_shape()[1].get_length() == 3


def is_encoder(node: ov.Node) -> bool:
    """Whether an operation is one of the encoder's convolutions."""
    return node.get_type_name() in {"Convolution", "GroupConvolution"}


KEPT: dict[str, list[Callable[[ov.Node], bool]]] = {
    "nothing": [],
    "the maps' products": [is_map],
    "… and the first convolution": [is_map, is_first_convolution],
    "… and the whitening": [is_map, is_first_convolution, is_whitening],
    "… and the encoder's convolutions": [is_map, is_whitening, is_encoder],
    "all but the coupling blocks' products (the export)": [lambda node: ".blocks." not in node.get_friendly_name()],
}


def main(
    data: Path,
    weights: Path,
    categories: list[str],
    layers: list[str] = ["layer2", "layer3"],  # noqa: B006  shown in --help
    seed: int = 0,
    output: Path = Path("results/benchmarks/quantization"),
) -> None:
    """Quantize trained models in more and more careful ways, and write the figures as JSON and Markdown.

    Args:
        data: Folder with one folder a category, in MVTec AD's layout.
        weights: ResNet-18 weights in timm's names.
        categories: Which categories.
        layers: Layers of the encoder.
        seed: Seed of everything.
        output: Folder for the results.
    """
    data, weights, output = data.resolve(), weights.resolve(), output.resolve()
    rows = []
    for category in categories:
        trained = train_default(data, category, weights, layers, seed, output / "runs")
        rows += [{"category": category, **row} for row in _compare(*trained)]
    table = Table("category", "kept in f32", "image AUROC", "pixel AUROC", "same decisions", box=box.MARKDOWN)
    for row in rows:
        figures = (f"{row['image_AUROC']:.4f}", f"{row['pixel_AUROC']:.4f}", f"{row['same']} of {row['images']}")
        table.add_row(row["category"], row["kept"], *figures)
    publish("quantization", table, {"seed": seed, "layers": layers, "rows": rows}, output)


def _compare(model: CflowPlugin, datamodule: MVTecAD) -> list[dict]:
    batches = list(datamodule.test_dataloader())
    images = torch.cat([batch.image for batch in batches]).numpy()
    labels = torch.cat([batch.gt_label for batch in batches]).numpy()
    masks = torch.cat([batch.gt_mask for batch in batches]).numpy().ravel() > 0
    size = images.shape[-2:]
    converted = convert_to_openvino(model, size)
    training = TrainingImages(datamodule, size)
    expected = _run(converted, images)
    threshold = model.post_processor.image_threshold.item()
    rows = []
    for kept, tests in {"everything": None, **KEPT}.items():
        found = expected
        if tests is not None:
            names = [node.get_friendly_name() for node in converted.get_ops() if any(test(node) for test in tests)]
            quantized = nncf.quantize(
                converted,
                nncf.Dataset(training),
                preset=nncf.QuantizationPreset.MIXED,
                subset_size=len(training),
                ignored_scope=nncf.IgnoredScope(names=names, validate=False),
            )
            found = _run(quantized, images)
        rows.append(
            {
                "kept": kept,
                "image_AUROC": roc_auc_score(labels, found["pred_score"]),
                "pixel_AUROC": roc_auc_score(masks, found["anomaly_map"].ravel()),
                "same": int(((found["pred_score"] > threshold) == (expected["pred_score"] > threshold)).sum()),
                "images": len(labels),
            }
        )
    return rows


def _run(model: ov.Model, images: np.ndarray) -> dict[str, np.ndarray]:
    compiled = ov.Core().compile_model(model, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    results = [compiled(part) for part in np.array_split(images, max(1, len(images) // 8))]
    names = ("pred_score", "anomaly_map")
    return {name: np.concatenate([result[name] for result in results]) for name in names}


if __name__ == "__main__":
    auto_cli(main, as_positional=False)
