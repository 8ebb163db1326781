"""What precision costs: accuracy and decisions of exported models against the trained model's, on real images.

    python benchmarks/precision.py --weights resnet18.safetensors --data DATA --categories [cookies, magnetic_tile]

DATA holds one folder a category in MVTec AD's layout. For each category a model is trained by the default recipe and
exported in full precision, FP16 and INT8; the test images go through OpenVINO with each and through ONNX Runtime. What
OpenVINO does on processors that compute in bf16 or f16 is computed by torch as well, on any processor: the factors of
all convolutions and matrix products are rounded, and their sums are not.
"""

import tempfile
from pathlib import Path

import numpy as np
import onnxruntime
import openvino as ov
import torch
from anomalib.deploy import CompressionType
from jsonargparse import auto_cli
from rich import box
from rich.table import Table
from sklearn.metrics import roc_auc_score
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only
from training import publish, train_default

OUTPUTS = ("pred_score", "pred_label", "anomaly_map")
PRODUCTS = {"convolution", "conv2d", "linear", "matmul", "addmm", "mm", "bmm", "baddbmm"}


def main(
    data: Path,
    weights: Path,
    categories: list[str],
    layers: list[str] = ["layer2", "layer3"],  # noqa: B006  shown in --help
    seed: int = 0,
    output: Path = Path("results/benchmarks/precision"),
) -> None:
    """Compare exported models with the trained ones, and write the figures as JSON and Markdown.

    Args:
        data: Folder with one folder a category, in MVTec AD's layout.
        weights: ResNet-18 weights in timm's names, .safetensors, at least up to the last layer.
        categories: Which categories.
        layers: Layers of the encoder.
        seed: Seed of everything.
        output: Folder for the results.
    """
    data, weights, output = data.resolve(), weights.resolve(), output.resolve()
    rows = []
    for category in categories:
        with tempfile.TemporaryDirectory() as folder:
            rows += [{"category": category, **row} for row in _compare(data, weights, category, layers, seed, folder)]
    table = Table(
        "category", "runs in", "file MB", "image AUROC", "pixel AUROC", "same decisions", "largest score difference",
        "largest map difference",
        box=box.MARKDOWN,
    )  # fmt: skip
    for row in rows:
        table.add_row(
            row["category"],
            row["runtime"],
            f"{row['file_mb']:.1f}",
            f"{row['image_AUROC']:.4f}",
            f"{row['pixel_AUROC']:.4f}",
            f"{row['same']} of {row['images']}",
            f"{row['score_difference']:.1e}",
            f"{row['map_difference']:.1e}",
        )
    publish("precision", table, {"seed": seed, "layers": layers, "rows": rows}, output)


def _compare(data: Path, weights: Path, category: str, layers: list[str], seed: int, folder: str) -> list[dict]:
    model, datamodule = train_default(data, category, weights, layers, seed, Path(folder))
    batches = list(datamodule.test_dataloader())
    images = torch.cat([batch.image for batch in batches])
    labels = torch.cat([batch.gt_label for batch in batches]).numpy()
    masks = torch.cat([batch.gt_mask for batch in batches]).numpy() > 0
    size = tuple(images.shape[-2:])

    def in_torch() -> dict[str, np.ndarray]:
        with torch.no_grad():
            parts = [model(part) for part in images.split(1)]
        return {name: torch.cat([getattr(part, name) for part in parts]).numpy() for name in OUTPUTS}

    expected = in_torch()

    def row(runtime: str, path: Path | None, found: dict[str, np.ndarray]) -> dict:
        files = [] if path is None else path.parent.glob(f"{path.stem}.*")
        return {
            "runtime": runtime,
            "file_mb": sum(Path(file).stat().st_size for file in files) / 1e6,
            "image_AUROC": roc_auc_score(labels, found["pred_score"]),
            "pixel_AUROC": roc_auc_score(masks.ravel(), found["anomaly_map"].ravel()),
            "same": int((found["pred_label"] == expected["pred_label"]).sum()),
            "images": len(labels),
            "score_difference": float(np.abs(found["pred_score"] - expected["pred_score"]).max()),
            "map_difference": float(np.abs(found["anomaly_map"] - expected["anomaly_map"]).max()),
        }

    rows = [row("torch f32", None, expected)]
    for dtype in (torch.bfloat16, torch.float16):
        with Rounding(dtype):
            rows.append(row(f"torch, factors rounded to {str(dtype).removeprefix('torch.')}", None, in_torch()))
    path = model.to_onnx(folder, input_size=size)
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    results = [session.run(list(OUTPUTS), {"input": part.numpy()}) for part in images.split(1)]
    found = {name: np.concatenate(values) for name, values in zip(OUTPUTS, zip(*results, strict=True), strict=True)}
    rows.append(row("ONNX Runtime f32", path, found))
    for kind, precisions in (
        (None, ("f32", "bf16")),
        (CompressionType.FP16, ("f32",)),
        (CompressionType.INT8_PTQ, ("f32", "bf16")),
    ):
        path = model.to_openvino(
            f"{folder}/{kind}", input_size=size, compression_type=kind, datamodule=datamodule if kind else None
        )
        able = ov.Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")
        for precision in [name for name in precisions if name == "f32" or name.upper() in able]:
            compiled = ov.Core().compile_model(path, "CPU", {"INFERENCE_PRECISION_HINT": precision})
            results = [compiled(part.numpy()) for part in images.split(1)]
            found = {name: np.concatenate([result[name] for result in results]) for name in OUTPUTS}
            name = "FP32" if kind is None else kind.value.upper()
            rows.append(row(f"OpenVINO {name} file, {precision}", path, found))
    return rows


class Rounding(TorchDispatchMode):
    """Lets torch multiply numbers of fewer digits, and add the products in full, as processors do.

    Args:
        dtype: Of the factors.
    """

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.dtype = dtype

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # noqa: ANN001, ANN204
        del types
        if func.overloadpacket.__name__ in PRODUCTS:
            args = tree_map_only(torch.Tensor, lambda value: value.to(self.dtype).to(value.dtype), args)
        return func(*args, **(kwargs or {}))


if __name__ == "__main__":
    auto_cli(main, as_positional=False)
