"""The encoder of section 4.1: a pretrained, frozen CNN and the layers its feature pyramid is taken from."""

__all__ = ["BACKBONES", "Backbone", "Encoder", "Padding"]

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, cast

import timm
import torch
from torch import fx, nn
from torch.nn import functional
from torchvision.models.feature_extraction import create_feature_extractor

from cflow_plugin.anomalib_patches.traced_checks import is_shape_check
from cflow_plugin.errors import CflowError, first_line
from cflow_plugin.model.filter_bank import FilterBank

_LARGE_ENOUGH = 64  # pixels, for every layer of every backbone

Padding = Literal["zeros", "reflect"]


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
"""The paper's backbones (Table 2). Any other timm CNN works too, with its layers named."""


class Encoder(nn.Module):
    """A frozen timm backbone, cut off after the last layer that is needed.

    It has random weights until :func:`cflow_plugin.model.weights.load` is called or a checkpoint is restored: a trained
    model brings its encoder's weights with it. It is in eval mode always, whatever ``train()`` says, and
    none of its parameters takes a gradient.

    Args:
        backbone: Name of a timm model, or ``gabor`` for a fixed filter bank that needs no weights.
        layers: Names of the layers to take features from, fine to coarse. ``None`` takes the paper's three.
        neighbourhood: Features are averaged over this many cells in either direction, one number for all layers or
            one for each; 1 takes them as they are. ``None`` takes those of the finest layer as they are, and averages
            the others over 3: coarse evidence says whether something is wrong, fine evidence where.
        padding: What the backbone's convolutions see beyond the border: zeros, as when it was trained, or their
            mirrored input, as in the original code's ResNets.

    Attributes:
        channels: Length D_k of a feature vector of each layer.

    Raises:
        CflowError: If backbone or layer is unknown, a layer's output is not a feature map, ``neighbourhood`` is not
            odd or not one number a layer, or the backbone's padding cannot be changed.

    Example:
        >>> encoder = Encoder("resnet18", ["layer2", "layer3"])
        >>> [tuple(features.shape) for features in encoder(torch.zeros(1, 3, 64, 64))]
        [(1, 128, 8, 8), (1, 256, 4, 4)]
    """

    def __init__(
        self,
        backbone: str,
        layers: Sequence[str] | None = None,
        neighbourhood: int | Sequence[int] | None = 1,
        padding: Padding = "zeros",
    ) -> None:
        super().__init__()
        self.backbone = backbone
        self._neighbourhood = neighbourhood
        if backbone == "gabor":
            if padding != "zeros":
                msg = "The filter bank has a padding of its own: leave padding out, or choose another backbone."
                raise CflowError(msg)
            self._build_filter_bank(layers)
            return
        try:
            network = timm.create_model(backbone, pretrained=False).eval()
        except RuntimeError as error:
            similar = ", ".join(timm.list_models(f"*{backbone.split('.')[0].split('_')[0]}*")[:8])
            hint = f" Similar names: {similar}." if similar else ""
            msg = f"timm knows no backbone named {backbone!r}.{hint}"
            raise CflowError(msg) from error
        if layers is None:
            if backbone not in BACKBONES:
                msg = (
                    f"The paper names no layers for {backbone!r}; name the ones to take features from, for example "
                    f"layers=[...] out of {', '.join(_module_names(network))}."
                )
                raise CflowError(msg)
            layers = BACKBONES[backbone].layers
        self.layers = list(layers)
        self._check_neighbourhood()
        unknown = [layer for layer in self.layers if layer not in dict(network.named_modules())]
        if unknown or not self.layers:
            msg = (
                f"{backbone!r} has no layer {', '.join(map(repr, unknown)) or 'named'}; "
                f"choose from {', '.join(_module_names(network))}."
            )
            raise CflowError(msg)
        if padding == "reflect":
            _reflect(network)
        try:
            self.network = _truncate(network, self.layers)
            pyramid = self(torch.zeros(1, 3, _LARGE_ENOUGH, _LARGE_ENOUGH))
        except Exception as error:  # tracing runs the model's own code, which may refuse in any way
            msg = f"{backbone!r} cannot serve as an encoder: cutting it at its layers failed ({first_line(error)})."
            raise CflowError(msg) from error
        self.network.requires_grad_(False)
        self.eval()
        for layer, features in zip(self.layers, pyramid, strict=True):
            if features.ndim != 4:
                msg = (
                    f"Layer {layer!r} of {self.backbone!r} gives a tensor of shape {tuple(features.shape)}, not a "
                    "feature map (batch, channels, height, width); choose a layer of a convolutional backbone."
                )
                raise CflowError(msg)
        self.channels = [features.shape[1] for features in pyramid]

    def _build_filter_bank(self, layers: Sequence[str] | None) -> None:
        self.layers = list(layers or FilterBank.layers[:3])
        unknown = [layer for layer in self.layers if layer not in FilterBank.layers]
        if unknown:
            msg = f"'gabor' has no layer {', '.join(map(repr, unknown))}; choose from {', '.join(FilterBank.layers)}."
            raise CflowError(msg)
        self._check_neighbourhood()
        self.network = FilterBank(self.layers)
        self.eval()
        self.channels = [features.shape[1] for features in self(torch.zeros(1, 3, _LARGE_ENOUGH, _LARGE_ENOUGH))]

    def _check_neighbourhood(self) -> None:
        cells = self.neighbourhood
        if len(cells) != len(self.layers) or any(number < 1 or number % 2 == 0 for number in cells):
            msg = (
                f"neighbourhood must be a positive odd number of cells, or one for each of the {len(self.layers)} "
                f"layers, got {self._neighbourhood}."
            )
            raise CflowError(msg)

    def train(self, mode: bool = True) -> "Encoder":
        """Stay in eval mode: batch norm must never see a training batch."""
        del mode
        return super().train(False)

    @torch.no_grad()
    def forward(self, images: torch.Tensor) -> list[torch.Tensor]:
        """Extract the feature pyramid.

        Args:
            images: Normalised images, ``(B, 3, H, W)``.

        Returns:
            One feature map ``(B, D_k, H_k, W_k)`` for each layer, in the order of ``layers``.
        """
        features = self.network(images)
        pyramid = [features[layer] for layer in self.layers]
        return [
            part if cells == 1 else functional.avg_pool2d(part, cells, 1, cells // 2, count_include_pad=False)
            for part, cells in zip(pyramid, self.neighbourhood, strict=True)
        ]

    @property
    def neighbourhood(self) -> list[int]:
        """Over how many cells in either direction the features of each layer are averaged."""
        asked, layers = self._neighbourhood, len(self.layers)
        if asked is None:
            return [1] + [3] * (layers - 1)
        return [asked] * layers if isinstance(asked, int) else list(asked)

    def check_size(self, size: Sequence[int]) -> None:
        """Raise if images are too small for the coarsest layer.

        Args:
            size: Height and width in pixels.

        Raises:
            CflowError: If no feature map comes out.
        """
        if min(size) >= _LARGE_ENOUGH:  # what the encoder was built with
            return
        try:
            pyramid = self(torch.zeros(1, 3, *size))
        except (RuntimeError, ValueError) as error:
            pyramid, reason = [], error
        else:
            reason = None
        if not pyramid or any(features.numel() == 0 for features in pyramid):
            msg = (
                f"Images of {size[0]}×{size[1]} pixels are too small for {', '.join(self.layers)} of "
                f"{self.backbone!r}; choose a larger --model.image_size, or finer layers."
            )
            raise CflowError(msg) from reason

    def load_weights(self, weights: Mapping[str, torch.Tensor], source: str) -> None:
        """Take over weights in timm's parameter names.

        They may lack layers above the last one that is used, and may hold more than is needed.

        Args:
            weights: What the backbone needs, and maybe more.
            source: Where they come from, for messages.

        Raises:
            CflowError: If a needed tensor is missing, not finite or of another shape.
        """
        needed = self.network.state_dict()
        missing = [name for name in needed if name not in weights and not name.endswith("num_batches_tracked")]
        if missing:
            msg = (
                f"{source} lacks {_enumerate(missing)}, which {self.backbone!r} needs for {', '.join(self.layers)}; "
                "take another file, or name layers that this one has."
            )
            raise CflowError(msg)
        wrong = [
            f"{name} {tuple(weights[name].shape)} instead of {tuple(tensor.shape)}"
            for name, tensor in needed.items()
            if name in weights and weights[name].shape != tensor.shape
        ]
        if wrong:
            msg = f"{source} does not fit {self.backbone!r}: {_enumerate(wrong)}."
            raise CflowError(msg)
        bad = [name for name in needed if name in weights and not torch.isfinite(weights[name].float()).all()]
        if bad:
            msg = f"{source} holds NaN or infinite values in {_enumerate(bad)}."
            raise CflowError(msg)
        self.network.load_state_dict({name: weights.get(name, tensor) for name, tensor in needed.items()})


def _reflect(network: nn.Module) -> None:
    """Let all convolutions that pad mirror their input."""
    for module in network.modules():
        if isinstance(module, nn.Conv2d) and any(module.padding):
            module.padding_mode = "reflect"


def _truncate(network: nn.Module, layers: Sequence[str]) -> nn.Module:
    """Cut the network after the last of the layers, and drop what is not needed to compute them."""
    extractor = create_feature_extractor(network, {layer: layer for layer in layers})
    # A graph module copies only what its graph calls, so the layers above the last tapped one do not come along.
    graph = cast("fx.Graph", extractor.eval_graph)
    for node in list(graph.nodes):
        if is_shape_check(node):  # it would keep the module whose output it checks alive
            graph.erase_node(node)
    graph.eliminate_dead_code()
    return fx.GraphModule(network, graph).eval()


def _module_names(network: nn.Module) -> list[str]:
    """Layers a user may want: blocks one or two levels deep."""
    names = [name for name, _ in network.named_modules() if name and name.count(".") <= 1]
    stages = [name for name in names if any(part in name for part in ("layer", "block", "stage", "features"))]
    return [name for name in stages or names if name.count(".") == 0 or name.split(".")[-1].isdigit()][:40]


def _enumerate(names: Sequence[str], limit: int = 5) -> str:
    shown = ", ".join(names[:limit])
    return shown if len(names) <= limit else f"{shown} and {len(names) - limit} more"
