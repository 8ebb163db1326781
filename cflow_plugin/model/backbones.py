"""timm's networks: how they are built for a size of images, their layers, and the input they were trained on."""

__all__ = [
    "BACKBONES",
    "IMAGENET",
    "Backbone",
    "Feature",
    "InputSettings",
    "build",
    "choose_layers",
    "create",
    "features_of",
    "input_settings",
    "named",
    "weights_name",
]

import inspect
import logging
import math
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any, NamedTuple, cast

import timm
from timm.data.config import resolve_data_config
from torch import nn

from cflow_plugin.errors import CflowError, first_line

logger = logging.getLogger(__name__)

STRIDES = (8, 16, 32)  # of the paper's pyramid, in pixels
_FRACTIONS = (1 / 3, 7 / 12, 5 / 6)  # of a plain transformer's depth
_SMALL = 64  # pixels, for every layer of every network that takes images of any size


@dataclass(frozen=True)
class Backbone:
    """What the paper takes from one backbone.

    Attributes:
        weights: timm's name of the weights the paper's figures rest on.
        layers: Layers of the three-scale pyramid, fine to coarse (the paper's pooling layers 1, 2 and 3).
        channels: Length of a feature vector in each of the layers.
        strides: Input pixels to a step in each layer's feature map.
    """

    weights: str
    layers: tuple[str, ...]
    channels: tuple[int, ...]
    strides: tuple[int, ...]


BACKBONES: Mapping[str, Backbone] = {
    "resnet18": Backbone(
        weights="resnet18.tv_in1k", layers=("layer2", "layer3", "layer4"), channels=(128, 256, 512), strides=(8, 16, 32)
    ),
    "wide_resnet50_2": Backbone(
        weights="wide_resnet50_2.tv_in1k",
        layers=("layer2", "layer3", "layer4"),
        channels=(512, 1024, 2048),
        strides=(8, 16, 32),
    ),
    # The original code hooks the projections that end these stages; the last one lies before timm's own 960 channels.
    "mobilenetv3_large_100": Backbone(
        weights="mobilenetv3_large_100.ra_in1k",
        layers=("blocks.2", "blocks.4", "blocks.5"),
        channels=(40, 112, 160),
        strides=(8, 16, 32),
    ),
}
"""The paper's backbones (Table 2)."""


class InputSettings(NamedTuple):
    """What the weights of a network were trained on.

    Attributes:
        mean: Mean of each colour, of values between 0 and 1.
        std: Standard deviation of each colour.
        interpolation: How images were resized, ``bilinear`` or ``bicubic`` for example.
    """

    mean: tuple[float, ...]
    std: tuple[float, ...]
    interpolation: str


IMAGENET = InputSettings((0.485, 0.456, 0.406), (0.229, 0.224, 0.225), "bilinear")
"""What all models of release 0.1 take, and most CNNs."""


class Feature(NamedTuple):
    """A layer that timm offers features of.

    Attributes:
        name: Name of the module; where several have the same, its number among the features stands behind a colon.
        channels: Length of a feature vector.
        stride: Input pixels to a step.
    """

    name: str
    channels: int
    stride: int


def features_of(network: nn.Module) -> list[Feature]:
    """List the layers that timm offers features of, fine to coarse.

    Args:
        network: A timm model.
    """
    found = [(info["module"], info["num_chs"], info["reduction"]) for info in _feature_info(network)]
    names = Counter(name for name, *_ in found)
    return [
        Feature(name if name and names[name] == 1 else f"{name}:{index}", channels, stride)
        for index, (name, channels, stride) in enumerate(found)
    ]


def _feature_info(network: nn.Module) -> Sequence[Mapping[str, Any]]:
    info = getattr(network, "feature_info", [])
    return getattr(info, "info", info)  # a list, or timm's own class around one


def weights_name(backbone: str) -> str:
    """Name of the weights that a backbone stands for: the paper's, or else timm's default."""
    return BACKBONES[backbone].weights if backbone in BACKBONES else backbone


def input_settings(backbone: str) -> InputSettings:
    """What the weights of a backbone were trained on.

    Args:
        backbone: Name of a timm model.
    """
    config = timm.get_pretrained_cfg(weights_name(backbone))
    if config is None:
        return IMAGENET
    found = resolve_data_config(pretrained_cfg=config.to_dict())
    return InputSettings(tuple(found["mean"]), tuple(found["std"]), found["interpolation"])


def create(backbone: str, **arguments: Any) -> nn.Module:
    """Create a network without weights.

    Args:
        backbone: Name of a timm model.
        **arguments: More arguments of the model's own, ``img_size`` for example.

    Raises:
        CflowError: If timm has none of that name.
    """
    if not timm.is_model(backbone):
        raise CflowError(_no_such(backbone))
    try:
        return timm.create_model(backbone, pretrained=False, **arguments).eval()
    except RuntimeError as error:
        tags = ", ".join(timm.list_pretrained(f"{backbone.partition('.')[0]}.*"))
        msg = f"timm cannot build {backbone!r} ({first_line(error)}).{f' With weights there are {tags}.' * bool(tags)}"
        raise CflowError(msg) from error


def _no_such(backbone: str) -> str:
    """What to say of a name that timm does not know."""
    repository, _, name = backbone.strip().lower().rpartition("/")
    names = timm.list_models(include_tags=True) + timm.list_models()
    if name in names:
        return f"timm knows no backbone named {backbone!r}; take --model.backbone {name}."
    part = re.split(r"[._-]", name)[0]
    similar = get_close_matches(name, names, 8, cutoff=0.85) or (timm.list_models(f"*{part}*")[:8] if part else [])
    hint = (
        f" Similar names: {', '.join(similar)}."
        if similar
        else " `cflow-plugin encoders --search` lists what there is."
    )
    if repository:
        hint += " Of another repository, name the network in timm's words, and its file with --model.weights."
    return f"timm knows no backbone named {backbone!r}.{hint}"


def build(
    backbone: str, size: tuple[int, int] | None, run: Callable[[nn.Module, tuple[int, int]], object]
) -> tuple[nn.Module, tuple[int, int] | None]:
    """Create a network that takes images of a size, or else of the nearest size that its patches or windows allow.

    Args:
        backbone: Name of a timm model.
        size: Height and width in pixels; ``None`` takes the size that the network was made for where it has one.
        run: Makes an encoder of the network and runs it on an image of that size.

    Returns:
        The network, and the size; ``None`` where none was asked for, and the network takes any.

    Raises:
        CflowError: If timm has no such model, ``run`` raises one, or no size can be found.
    """
    network = create(backbone)
    config = getattr(network, "pretrained_cfg", {})
    native = cast("tuple[int, int]", tuple(config.get("input_size", (3, 224, 224))[1:]))
    fixed = bool(config.get("fixed_input_size", False))
    if not fixed and (size is None or min(size) < _SMALL):  # whether they are too small is said when training begins
        try:
            run(network, (_SMALL, _SMALL))
        except ValueError:
            network = create(backbone)
        else:
            return network, size
    asked = size or native
    first: Exception | None = None
    # Position embeddings that are made for the size need not be resampled for each image.
    parameters = {name for kind in type(network).__mro__ for name in inspect.signature(kind.__init__).parameters}
    still = {"dynamic_img_size": False} if "dynamic_img_size" in parameters else {}
    for other in (asked, *_near(asked, network), native):
        for arguments in [{"img_size": other, **still}, {}] if "img_size" in parameters else [{}]:
            try:
                if first is not None or arguments:
                    network = create(backbone, **arguments)
                run(network, other)
            except CflowError:
                raise
            except Exception as error:  # what does not fit a network raises in any way
                first = first or error
            else:
                if other != asked:
                    logger.warning(
                        "%s takes images of %d×%d pixels instead of %d×%d, which its patches or windows do not divide.",
                        backbone, *other, *asked,
                    )  # fmt: skip
                return network, other
    assert first is not None
    msg = f"{backbone!r} cannot serve as an encoder: it does not run on images ({first_line(first)})."
    raise CflowError(msg) from first


def _near(size: tuple[int, int], network: nn.Module) -> list[tuple[int, int]]:
    """Sizes that patches and windows may divide, nearest first."""
    strides = [feature.stride for feature in features_of(network)] or [32]
    steps = {max(strides), math.lcm(max(strides), 32), 2 * max(strides), 14, 16, 32, 28, 56, 64, 112, 224}
    found = {tuple(max(1, round(side / step)) * step for side in size) for step in steps} - {size}
    return cast(
        "list[tuple[int, int]]",
        sorted(found, key=lambda other: (sum(abs(a - b) for a, b in zip(size, other, strict=True)), other)),
    )


def choose_layers(backbone: str, features: Sequence[Feature]) -> list[str]:
    """Layers to take where none is named.

    The paper's for its own backbones. Of any other network the last layer at each of the strides nearest to 8, 16 and
    32 pixels; of a plain one, whose stride is the same throughout, three blocks over the middle of its depth. What is
    anomalous shows there rather than in the last blocks, which describe the image as a whole: FastFlow takes block 7 of
    12 of DeiT and 40 of 48 of CaiT, Dinomaly and INP-Former blocks 3 to 10 of 12.

    Args:
        backbone: Name of a timm model.
        features: Its layers.

    Returns:
        Their names, fine to coarse.

    References:
        Yu and others: FastFlow. arXiv:2111.07677, 2021. Guo and others: Dinomaly. CVPR 2025. Luo and others:
        INP-Former. CVPR 2025.
    """
    if backbone in BACKBONES:
        return list(BACKBONES[backbone].layers)
    strides = {feature.stride: index for index, feature in enumerate(features)}  # the last of each
    if len(strides) == 1 and len(features) > len(_FRACTIONS):
        chosen = [round(len(features) * fraction) - 1 for fraction in _FRACTIONS]
    else:
        near = {min(strides, key=lambda stride: abs(math.log2(stride / wanted))) for wanted in STRIDES}
        chosen = sorted(strides[stride] for stride in near)
    return [features[index].name for index in chosen]


def named(layers: Sequence[str | int], backbone: str, features: Sequence[Feature]) -> list[str]:
    """Names of layers that are asked for by name, by number or by stride.

    Args:
        layers: A layer's name; its number among timm's features, from the end if negative; or ``stride8`` for the last
            one of that stride.
        backbone: Name of the network, for messages.
        features: Its layers.

    Raises:
        CflowError: If there is no layer of that number or stride.
    """
    names = []
    for layer in layers:
        text = str(layer)
        if text.lstrip("-").isdigit():
            found = [features[int(text)].name] if -len(features) <= int(text) < len(features) else []
        elif text.startswith("stride") and text[6:].isdigit():
            found = [feature.name for feature in features if feature.stride == int(text[6:])][-1:]
        else:
            found = [text]
        if not found:
            there = ", ".join(f"{index} {name} (stride {stride})" for index, (name, _, stride) in enumerate(features))
            msg = f"{backbone!r} has no layer {text!r}; choose from {there}."
            raise CflowError(msg)
        names += found
    return names
