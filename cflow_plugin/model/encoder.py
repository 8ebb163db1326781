"""The encoder of section 4.1: a pretrained, frozen network and the layers its feature pyramid is taken from."""

__all__ = ["Encoder", "Padding", "Precision"]

from collections.abc import Mapping, Sequence
from itertools import chain
from typing import Any, Literal, cast

import torch
from timm.models import create_feature_extractor
from torch import fx, nn
from torch.nn import functional

from cflow_plugin.anomalib_patches.traced_checks import is_shape_check
from cflow_plugin.errors import CflowError, first_line
from cflow_plugin.model.backbones import IMAGENET, Feature, build, choose_layers, features_of, input_settings, named
from cflow_plugin.model.filter_bank import FilterBank
from cflow_plugin.model.quantized import MEASURED, quantize_convolutions

_LARGE_ENOUGH = 64  # pixels, for every layer of every backbone

_OVERLAPPING = 4  # pixels: up to this stride a network begins with convolutions that overlap or lose next to nothing
_NO_WEIGHTS = ("num_batches_tracked", *MEASURED)  # ends of the names of what no file of weights need have

Padding = Literal["zeros", "reflect"]
Precision = Literal["float32", "int8"]


class Encoder(nn.Module):
    """A frozen timm backbone, cut off after the last layer that is needed.

    It has random weights until :func:`cflow_plugin.model.weights.load` is called or a checkpoint is restored: a trained
    model brings its encoder's weights with it. It is in eval mode always, whatever ``train()`` says, and
    none of its parameters takes a gradient. What timm offers as features is taken by its own interface, which leaves
    out class token and registers; a layer inside a stage is cut out of the network by tracing it.

    Args:
        backbone: Name of a timm model, or ``gabor`` for a fixed filter bank that needs no weights.
        layers: Layers to take features from, fine to coarse: by name, by number among timm's features, or by stride
            (``stride8``). ``None`` takes the paper's three, or of other networks what
            :func:`~cflow_plugin.model.backbones.choose_layers` says.
        neighbourhood: Features are averaged over this many cells in either direction, one number for all layers or
            one for each; 1 takes them as they are. ``None`` takes those of the finest layer as they are, and averages
            the others over 3: coarse evidence says whether something is wrong, fine evidence where.
        padding: What the backbone's convolutions see beyond the border: zeros, as when it was trained, or their
            mirrored input, as in the original code's ResNets.
        image_size: Height and width of the images, in pixels. A size that the backbone's patches or windows do not
            divide is rounded, with a word. Without it images may have any size, if the backbone takes any.
        precision: ``int8`` lets convolutions compute with 8-bit numbers, once
            :func:`~cflow_plugin.model.quantized.measure_ranges` has seen images.

    Attributes:
        layers: Names of the layers.
        channels: Length D_k of a feature vector of each layer.
        image_size: Height and width of the images, rounded where it had to be.
        input: Mean, deviation and interpolation that the weights were trained with.
        source: Where the weights come from.

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
        layers: Sequence[str | int] | None = None,
        neighbourhood: int | Sequence[int] | None = 1,
        padding: Padding = "zeros",
        image_size: Sequence[int] | None = None,
        precision: Precision = "float32",
    ) -> None:
        super().__init__()
        self.backbone = backbone
        self.source: str | None = None
        self._neighbourhood = neighbourhood
        self._numbers: dict[str, int] = {}  # of the layers among timm's features, unless they are traced
        is_size = isinstance(image_size, Sequence) and [type(side) for side in image_size] == [int, int]
        if image_size is not None and not (is_size and min(image_size) > 0):
            msg = f"image_size is a height and a width, for example (256, 256); got {image_size!r}."
            raise CflowError(msg)
        size = None if image_size is None else (image_size[0], image_size[1])
        if backbone == "gabor":
            self._build_filter_bank(layers, padding)
            self.image_size, self.input = size, IMAGENET
        else:
            self._asked = layers, padding
            _, self.image_size = build(backbone, size, self._cut)
            self.input = input_settings(backbone)
        if precision == "int8":
            quantize_convolutions(self.network, backbone)
        self.network.requires_grad_(False)
        self.register_load_state_dict_pre_hook(_add_counters)
        self.eval()

    def _cut(self, network: nn.Module, size: tuple[int, int]) -> None:
        """Take what is needed of a network, and see what comes out for images of a size."""
        asked, padding = self._asked
        features = features_of(network)
        if features and features[0].stride > _OVERLAPPING and any(side % features[0].stride for side in size):
            msg = f"patches of {features[0].stride} pixels do not divide {size[0]}×{size[1]}"
            raise ValueError(msg)  # they would leave pixels out: another size is tried
        self.layers = choose_layers(self.backbone, features) if asked is None else named(asked, self.backbone, features)
        self._check_neighbourhood()
        offered = [feature.name for feature in features]
        unknown = [
            layer for layer in self.layers if layer not in offered and layer not in dict(network.named_modules())
        ]
        if unknown or not self.layers or len(set(self.layers)) < len(self.layers):
            msg = (
                f"{self.backbone!r} has no layer {', '.join(map(repr, unknown)) or 'named, or one twice'}; "
                f"choose from {', '.join(offered)}, or a module inside one of them."
            )
            raise CflowError(msg)
        if padding == "reflect":
            _reflect(network, self.backbone)
        if hasattr(network, "forward_intermediates") and set(self.layers) <= set(offered):
            self._numbers = {layer: offered.index(layer) for layer in self.layers}
            cast("Any", network).prune_intermediate_layers(sorted(self._numbers.values()), prune_norm=True)
            self.network = network
        else:
            try:
                self.network = _truncate(network, self.layers)
            except Exception as error:  # tracing runs the model's own code, which may refuse in any way
                msg = (
                    f"{self.backbone!r} cannot be cut at {', '.join(self.layers)} ({first_line(error)}); "
                    f"choose from {', '.join(offered)}."
                )
                raise CflowError(msg) from error
        self.channels = self._look(size, dict(zip(offered, features, strict=True)))

    def _look(self, size: tuple[int, int], features: Mapping[str, Feature]) -> list[int]:
        """Channels of what comes out; what is not a map of them is refused."""
        self._channels_last: set[str] = set()
        found = self._features(torch.zeros(1, 3, *size))
        wide = None
        for layer, part in found.items():
            if part.ndim == 4 and layer not in features:
                # timm says what it offers to be; what a traced layer puts last shows by what grows with the image.
                wide = wide or self._features(torch.zeros(1, 3, size[0], 2 * size[1]))
                if wide[layer].shape[2] > part.shape[2]:
                    self._channels_last.add(layer)
        pyramid = self._pyramid(found)
        for layer, part in zip(self.layers, pyramid, strict=True):
            expected = features[layer].channels if layer in features else None
            if part.ndim != 4 or expected not in (None, part.shape[1]):
                of = "" if expected is None else f"{expected} "
                msg = (
                    f"Layer {layer!r} of {self.backbone!r} gives a tensor of shape {tuple(part.shape)}, not a feature "
                    f"map (batch, {of}channels, height, width); choose from {', '.join(features)}."
                )
                raise CflowError(msg)
        return [part.shape[1] for part in pyramid]

    def _build_filter_bank(self, layers: Sequence[str | int] | None, padding: Padding) -> None:
        if padding != "zeros":
            msg = "The filter bank has a padding of its own: leave padding out, or choose another backbone."
            raise CflowError(msg)
        self.layers = [str(layer) for layer in layers or FilterBank.layers[:3]]
        unknown = [layer for layer in self.layers if layer not in FilterBank.layers]
        if unknown:
            msg = f"'gabor' has no layer {', '.join(map(repr, unknown))}; choose from {', '.join(FilterBank.layers)}."
            raise CflowError(msg)
        self._check_neighbourhood()
        self.network = FilterBank(self.layers)
        self.channels = self._look((_LARGE_ENOUGH, _LARGE_ENOUGH), {})

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
        return [
            part if cells == 1 else functional.avg_pool2d(part, cells, 1, cells // 2, count_include_pad=False)
            for part, cells in zip(self._pyramid(self._features(images)), self.neighbourhood, strict=True)
        ]

    @torch.no_grad()
    def _features(self, images: torch.Tensor) -> Mapping[str, torch.Tensor]:
        """What the layers put out, as the network has it."""
        if not self._numbers:
            return self.network(images)
        ordered = sorted(self._numbers, key=self._numbers.__getitem__)
        numbers = [self._numbers[layer] for layer in ordered]
        network = cast("Any", self.network)
        found = network.forward_intermediates(images, indices=numbers, output_fmt="NCHW", intermediates_only=True)
        return dict(zip(ordered, found, strict=True))

    def _pyramid(self, features: Mapping[str, torch.Tensor]) -> list[torch.Tensor]:
        """The same in the order of the layers, channels in front."""
        maps = [features[layer] for layer in self.layers]
        return [
            part.permute(0, 3, 1, 2) if layer in self._channels_last else part
            for layer, part in zip(self.layers, maps, strict=True)
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
            like = next(chain(self.parameters(), self.buffers()))
            pyramid = self(torch.zeros(1, 3, *size, dtype=like.dtype, device=like.device))
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

    def fits(self, weights: Mapping[str, torch.Tensor]) -> bool:
        """Whether all that is needed is among weights, in the right shape.

        Args:
            weights: Tensors by their names.
        """
        return all(
            name.endswith(_NO_WEIGHTS) or (name in weights and weights[name].shape == tensor.shape)
            for name, tensor in self.network.state_dict().items()
        )

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
        missing = [name for name in needed if name not in weights and not name.endswith(_NO_WEIGHTS)]
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


def _add_counters(encoder: Encoder, state: dict[str, torch.Tensor], prefix: str, *_: object) -> None:
    """Let checkpoints lack batch norm's counters of training batches: how a network was traced decides on them."""
    for name, tensor in encoder.network.state_dict(prefix=f"{prefix}network.").items():
        if name.endswith("num_batches_tracked"):
            state.setdefault(name, tensor)


def _reflect(network: nn.Module, backbone: str) -> None:
    """Let all convolutions that pad mirror their input."""
    convolutions = [module for module in network.modules() if isinstance(module, nn.Conv2d)]
    padded = [module for module in convolutions if module.padding not in ("valid", 0, (0, 0))]
    if not padded or any(type(module) is not nn.Conv2d for module in convolutions):
        msg = f"The padding of {backbone!r} cannot be changed: it pads by other means than torch's convolutions."
        raise CflowError(msg)
    for module in padded:
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


def _enumerate(names: Sequence[str], limit: int = 5) -> str:
    shown = ", ".join(names[:limit])
    return shown if len(names) <= limit else f"{shown} and {len(names) - limit} more"
