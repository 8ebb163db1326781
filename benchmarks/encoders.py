"""Which of timm's networks serve as encoders: the smallest of each of its model files, built, trained and exported.

    python benchmarks/encoders.py

Weights are random. For each network the features are compared with those of timm's own wrapper around it, the decoders
take two steps of training, and the model is exported to OpenVINO and to ONNX; the maps of OpenVINO and ONNX Runtime are
compared with torch's. Needs the extra ``onnx``. What has been done is skipped when the command is repeated.
"""

import gc
import json
import logging
import tempfile
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import openvino as ov
import timm
import torch
from anomalib.models import get_model
from jsonargparse import auto_cli
from timm.models import is_model_in_modules

import cflow_plugin  # noqa: F401  registers the model
from cflow_plugin.deploy.graph import convert_to_openvino
from cflow_plugin.deploy.quantization import quantize
from cflow_plugin.errors import first_line
from cflow_plugin.files import atomic_file

Export = Literal["OpenVINO", "ONNX", "INT8"]

TOLERANCES: dict[Export, float] = {
    "OpenVINO": 1e-3,
    "ONNX": 1e-3,
    "INT8": 0.05,
}  # of the map's range; INT8's on average


def main(
    names: list[str] | None = None,
    size: int = 256,
    exports: list[Export] = ["OpenVINO", "ONNX", "INT8"],  # noqa: B006  shown in --help
    output: Path = Path("results/benchmarks"),
) -> None:
    """Try networks as encoders.

    Args:
        names: timm names; by default the smallest network of each of timm's model files.
        size: Height and width of the images; rounded where a network needs it.
        exports: What to export to, which takes most of the time.
        output: Folder for encoders.json and encoders.md.
    """
    warnings.simplefilter("ignore")
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    logging.getLogger("cflow_plugin").setLevel(logging.ERROR)
    output.mkdir(parents=True, exist_ok=True)
    file = output / "encoders.json"
    rows: list[dict[str, Any]] = json.loads(file.read_text()) if file.is_file() else []
    done = {row["encoder"] for row in rows}
    wanted = names or smallest_of_each_file()
    for number, name in enumerate(wanted, 1):
        if name in done:
            continue
        row = examine(name, size, exports)
        print(f"{number}/{len(wanted)} " + ", ".join(f"{key} {value}" for key, value in row.items()), flush=True)
        rows.append(row)
        with atomic_file(file) as partial:
            partial.write_text(json.dumps(rows, indent=1))
        gc.collect()
    report = summary(rows)
    (output / "encoders.md").write_text(report)
    print(report)


def smallest_of_each_file() -> list[str]:
    """Names of the networks with the fewest parameters of each of timm's model files, in the files' order."""
    names = []
    for module in timm.list_modules():
        found = {}
        for name in timm.list_models(module=module):
            assert is_model_in_modules(name, [module])
            try:
                with torch.device("meta"):
                    network = timm.create_model(name)
            except Exception:
                continue
            found[name] = sum(parameter.numel() for parameter in network.parameters())
        names += [min(found, key=found.__getitem__)] if found else []
    return names


def examine(name: str, size: int, exports: Sequence[Export] = ()) -> dict[str, Any]:
    """Build a model around a network, train it for two steps, export it.

    Args:
        name: timm name.
        size: Height and width of the images.
        exports: What to export to.

    Returns:
        What came out; under ``refused`` the sentence it was refused in, under ``wrong`` what is not as it should be.
    """
    row: dict[str, Any] = {"encoder": name, "file": timm.models.model_entrypoint(name).__module__.rpartition(".")[2]}
    wrong: list[str] = []
    stage = "built"
    try:
        torch.manual_seed(0)
        model: Any = get_model(
            "CflowPlugin",
            backbone=name,
            image_size=(size, size),
            pre_trained=False,
            coupling_blocks=2,
            target_false_alarm_rate=None,
            visualizer=False,
        )
        encoder = model.model.encoder
        row |= {"size": f"{encoder.image_size[0]}×{encoder.image_size[1]}", "layers": encoder.layers}
        row["channels"] = encoder.channels
        wrong += differences_from_timm(model)
        row["built"] = True
        stage = "trained"
        train(model)
        row["trained"] = True
        images = torch.randn(2, 3, *encoder.image_size, generator=torch.Generator().manual_seed(1))
        with torch.no_grad():
            spread(model.model, model.pre_processor(images))
            expected = model.eval()(images).anomaly_map.numpy()
        for stage in exports:
            run = {"OpenVINO": run_openvino, "ONNX": run_onnx, "INT8": run_int8}[stage]
            with tempfile.TemporaryDirectory() as folder:
                found = run(model, encoder.image_size, folder, images.numpy())
            difference = np.abs(found - expected) / np.ptp(expected)
            row[stage] = float(difference.mean() if stage == "INT8" else difference.max())
            if not row[stage] < TOLERANCES[stage]:
                wrong.append(f"{stage} differs by {row[stage]:.1e}")
    except Exception as error:
        row["refused"] = f"not {stage}: {type(error).__name__}: {first_line(error, 200)}"
    return row | ({"wrong": "; ".join(wrong)} if wrong else {})


def differences_from_timm(model: Any) -> list[str]:
    """Compare an encoder's features with those of timm's own wrapper around the same network."""
    encoder = model.model.encoder
    numbers = encoder._numbers  # noqa: SLF001
    if not numbers:
        return []  # it was traced
    ordered = sorted(numbers, key=numbers.__getitem__)
    size = encoder.image_size
    other = None
    for arguments in ({"img_size": size}, {}):
        torch.manual_seed(0)
        try:
            # As the encoder has come to its weights: of a size that does not fit, it was built twice.
            other = timm.create_model(
                encoder.backbone,
                features_only=True,
                out_indices=tuple(numbers[layer] for layer in ordered),
                **arguments,
            ).eval()
            images = torch.rand(1, 3, *size)
            with torch.no_grad():
                theirs = other(images)
            break
        except Exception:
            continue
    if other is None:
        return ["timm's own wrapper cannot be built"]
    channels = dict(zip(ordered, other.feature_info.channels(), strict=True))
    if [channels[layer] for layer in encoder.layers] != encoder.channels:
        return [f"channels {encoder.channels} instead of {channels}"]
    names = {
        key.removeprefix("model.").removeprefix("body.").replace("_", "."): value
        for key, value in other.state_dict().items()
    }
    weights = {key: names.get(key.replace("_", ".")) for key in encoder.network.state_dict()}
    lacking = [key for key, value in weights.items() if value is None]
    if lacking:
        return [f"timm's own wrapper lacks {lacking[0]}"]
    encoder.network.load_state_dict(weights)
    ours = encoder._pyramid(encoder._features(images))  # noqa: SLF001
    maps = dict(zip(ordered, theirs, strict=True))
    for layer, part in zip(encoder.layers, ours, strict=True):
        expected = maps[layer]
        if "NHWC" in str(getattr(other, "output_fmt", "")):
            expected = expected.permute(0, 3, 1, 2)
        if expected.shape != part.shape or not torch.allclose(expected, part, rtol=1e-3, atol=1e-4):
            return [f"{layer} differs from timm's own features"]
    return []


def train(model: Any) -> None:
    """Two steps of training on random images, and the scoring constants."""
    network = model.model.train()
    optimizer = torch.optim.Adam(network.decoders.parameters(), lr=1e-3)
    images = torch.randn(2, 3, *network.encoder.image_size)
    network.fit_whitening([part.flatten(2).transpose(1, 2).flatten(0, 1) for part in network.encoder(images)])
    for _ in range(2):
        optimizer.zero_grad()
        loss = -sum(likelihood.mean() for likelihood in network.log_likelihoods(images))
        if not torch.isfinite(loss):
            message = f"the loss is {loss.item()}"
            raise ValueError(message)
        loss.backward()
        optimizer.step()


def spread(network: Any, images: torch.Tensor) -> None:
    """Scoring constants with which these images' map takes all values: one that is constant agrees with anything."""
    network.eval()
    likelihoods = network.log_likelihoods(images)
    network.scoring.log_maximum.copy_(torch.stack([part.max() for part in likelihoods]))
    network.scoring.temperature.copy_(torch.stack([2 * part.std() for part in likelihoods]))
    network.drop_folded()


def run_openvino(model: Any, size: tuple[int, int], folder: str, images: np.ndarray) -> np.ndarray:
    """Export to OpenVINO, and run that."""
    path = model.to_openvino(folder, input_size=size, ov_kwargs={"batch": None})
    compiled = ov.Core().compile_model(path, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    return compiled(images)["anomaly_map"]


def run_onnx(model: Any, size: tuple[int, int], folder: str, images: np.ndarray) -> np.ndarray:
    """Export to ONNX, and run that."""
    import onnxruntime

    session = onnxruntime.InferenceSession(
        model.to_onnx(folder, input_size=size, batch=None), providers=["CPUExecutionProvider"]
    )
    names = [output.name for output in session.get_outputs()]
    return session.run(names, {session.get_inputs()[0].name: images})[names.index("anomaly_map")]


def run_int8(model: Any, size: tuple[int, int], folder: str, images: np.ndarray) -> np.ndarray:
    """Quantize the model, and run that in OpenVINO."""
    path = Path(folder) / "int8.xml"
    ov.save_model(quantize(convert_to_openvino(model, size), [image[None] for image in images]), path)
    return ov.Core().compile_model(path, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})(images)["anomaly_map"]


def summary(rows: list[dict[str, Any]]) -> str:
    """The rows as a table, and how many of each there are."""
    lines = [
        "| file | encoder | size | layers | channels | built | trained | OpenVINO | ONNX | INT8 |",
        "|" + "---|" * 10,
    ]
    for row in rows:
        marks = ["yes" if row.get(key) else "no" for key in ("built", "trained")]
        marks += [f"{row[key]:.0e}" if key in row else "no" for key in ("OpenVINO", "ONNX", "INT8")]
        cells = [row["file"], row["encoder"], row.get("size", ""), ", ".join(row.get("layers", []))]
        cells += [", ".join(map(str, row.get("channels", []))), *marks]
        lines.append(f"| {' | '.join(cells)} |")
    counts = [f"{sum(key in row for row in rows)} {key}" for key in ("built", "trained", "OpenVINO", "ONNX", "INT8")]
    lines += ["", f"Of {len(rows)}: {', '.join(counts)}.", ""]
    lines += [f"- `{row['encoder']}`: {row[key]}" for row in rows for key in ("refused", "wrong") if key in row]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    auto_cli(main, as_positional=False)
