"""How far each folded decoder is from the limit of its arithmetic on this machine.

    python benchmarks/decoders.py --backbones [resnet18, wide_resnet50_2, mobilenetv3_large_100]

The limit is the decoder's multiplications at the speed of one large matrix product in the same runtime and precision.
In INT8 the whitening stays in the precision of the rest, as in exported files.
"""

import logging
import time
from collections.abc import Callable, Sequence

import nncf
import numpy as np
import openvino as ov
import torch
from jsonargparse import auto_cli
from openvino import opset13 as operations
from rich import box
from rich.console import Console
from rich.table import Table

from cflow_plugin.model.folded import FoldedFlow
from cflow_plugin.model.torch_model import CflowModel


def main(
    backbones: list[str] = ["resnet18"],  # noqa: B006  shown in --help
    size: int = 256,
    precision: str = "f32",
    threads: int = 2,
    runs: int = 50,
) -> None:
    """Time each decoder in OpenVINO.

    Args:
        backbones: timm names of encoders.
        size: Height and width of the images.
        precision: f32, bf16, int8 (the rest in f32) or int8-bf16.
        threads: Threads.
        runs: Runs of each; the median counts.
    """
    settings = {
        "INFERENCE_PRECISION_HINT": "bf16" if precision.endswith("bf16") else "f32",
        "INFERENCE_NUM_THREADS": threads,
        "PERFORMANCE_HINT": "LATENCY",
    }

    def compile_model(
        model: ov.Model, example: np.ndarray, kept: Sequence[torch.Tensor] = ()
    ) -> Callable[[np.ndarray], object]:
        if precision.startswith("int8"):
            model = _quantized(model, example, kept)
        request = ov.Core().compile_model(model, "CPU", settings).create_infer_request()
        return lambda values: request.infer([values])

    side = 2048
    values = np.random.default_rng(0).random((side, side), dtype=np.float32)
    parameter = operations.parameter([side, side])
    product = compile_model(
        ov.Model([operations.matmul(parameter, operations.constant(values), False, True)], [parameter]), values
    )
    peak = 2 * side**3 / _seconds(product, values, runs)
    table = Table("decoder", "positions", "GFLOP", "limit ms", "ms", "of the limit", box=box.MARKDOWN)
    for backbone in backbones:
        torch.manual_seed(0)
        model = CflowModel(backbone).eval()
        for layer, decoder, features in zip(
            model.encoder.layers, model.decoders, model.encoder(torch.rand(1, 3, size, size)), strict=True
        ):
            height, width = features.shape[-2:]
            flow = FoldedFlow(decoder, height, width)
            weights = sum(module.weight.numel() for module in flow.modules() if isinstance(module, torch.nn.Linear))
            operations_needed = 2 * weights * height * width
            converted = ov.convert_model(torch.export.export(flow, (features,), strict=False))
            whitening = [layer.weight for name, layer in flow.named_children() if name.startswith("whitening")]
            spent = _seconds(compile_model(converted, features.numpy(), whitening), features.numpy(), runs)
            limit = operations_needed / peak
            table.add_row(
                f"{backbone} {layer}, D = {features.shape[1]}",
                f"{height}×{width}",
                f"{operations_needed / 1e9:.2f}",
                f"{1000 * limit:.2f}",
                f"{1000 * spent:.2f}",
                f"{limit / spent:.0%}",
            )
    console = Console(width=120)
    console.print(f"A {side}×{side} matrix product in {precision}, {threads} threads: {peak / 1e9:.0f} GFLOP/s")
    console.print(table)


def _quantized(model: ov.Model, example: np.ndarray, kept: Sequence[torch.Tensor]) -> ov.Model:
    """The model with its matrix products in INT8, but for those with weights that are kept."""
    names = [
        node.get_friendly_name()
        for node in model.get_ops()
        if node.get_type_name() == "MatMul"
        and any(np.array_equal(node.input_value(1).get_node().data, weight.numpy()) for weight in kept)
    ]
    logging.getLogger("nncf").setLevel(logging.WARNING)
    others = [node.get_friendly_name() for node in model.get_ops() if node.get_type_name() != "MatMul"]
    return nncf.quantize(
        model,
        nncf.Dataset([example]),
        preset=nncf.QuantizationPreset.MIXED,
        subset_size=1,
        ignored_scope=nncf.IgnoredScope(names=names + others, validate=False),
        advanced_parameters=nncf.AdvancedQuantizationParameters(overflow_fix=nncf.OverflowFix.ENABLE),
    )


def _seconds(run: Callable[[np.ndarray], object], values: np.ndarray, runs: int) -> float:
    spent = []
    for _ in range(runs + 3):
        start = time.perf_counter()
        run(values)
        spent.append(time.perf_counter() - start)
    return float(np.median(spent[3:]))


if __name__ == "__main__":
    auto_cli(main, as_positional=False)
