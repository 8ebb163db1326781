"""A trained model rewritten for inference: the same function with everything constant computed beforehand."""

__all__ = ["FoldedFlow", "FoldedModel", "in_full_precision"]

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from copy import deepcopy
from functools import partial, reduce
from itertools import chain
from typing import Any, cast

import torch
from anomalib.data import InferenceBatch
from torch import nn
from torch.nn import functional
from torch.nn.utils import fuse_conv_bn_eval

from cflow_plugin.model.encoder import Encoder
from cflow_plugin.model.flow import ConditionalFlow, CouplingBlock
from cflow_plugin.model.position import positional_encoding_2d
from cflow_plugin.model.quantized import CONVOLUTIONS, QuantizedConvolution, in_floating_point
from cflow_plugin.model.scoring import AnomalyScoring, cells_inside
from cflow_plugin.model.tiles import Span, Tiles
from cflow_plugin.model.whole import WholeImage
from cflow_plugin.modules import ModuleListOf, as_on, in_double

_CONVOLUTIONS = (*CONVOLUTIONS, QuantizedConvolution)
_KINDS = (*_CONVOLUTIONS, nn.BatchNorm2d)


class FoldedModel(nn.Module):
    """From images of a fixed size to anomaly maps and scores, by fewer operations than in training.

    A model in half precision is computed with in single precision, so that its decisions do not depend on how it was
    trained.

    Args:
        encoder: The encoder.
        decoders: A decoder for each of its layers; they are copied, not referred to.
        scoring: The calibrated scoring.
        whole: What an image says as a whole; it is copied.
        size: Height and width of the images.
        tiles: How large images are cut.
    """

    @torch.no_grad()
    def __init__(
        self,
        encoder: Encoder,
        decoders: Iterable[ConditionalFlow],
        scoring: AnomalyScoring,
        whole: WholeImage,
        size: tuple[int, int],
        tiles: Tiles | None = None,
    ) -> None:
        super().__init__()
        like = next(chain(encoder.parameters(), encoder.buffers()))
        self.dtype = torch.promote_types(like.dtype, torch.float32)
        encoder = encoder if like.dtype == self.dtype else deepcopy(encoder).to(self.dtype)
        self.tiles = tiles
        image_size = size
        if tiles is not None:
            size = (tiles.rows[0].last, tiles.columns[0].last)
        images = torch.linspace(-1, 1, 3 * size[0] * size[1], dtype=self.dtype, device=like.device).view(1, 3, *size)
        self.encoder = _fold_batch_norm(encoder, images)
        sizes = [(features.shape[-2], features.shape[-1]) for features in self.encoder(images)]
        self.strides = [round(size[1] / width) for _, width in sizes]
        if tiles is not None:
            sizes = [(-(-image_size[0] // stride), -(-image_size[1] // stride)) for stride in self.strides]
        self.flows = ModuleListOf[FoldedFlow](
            FoldedFlow(in_full_precision(decoder), *map_size, in_parts=tiles is not None)
            for decoder, map_size in zip(decoders, sizes, strict=True)
        )
        # Asked once: a look at a tensor makes a GPU wait, and cannot be part of a compiled graph.
        self.is_calibrated = scoring.is_calibrated
        self.scoring = scoring.folded(sizes, image_size)
        self.whole = deepcopy(whole).to(self.dtype) if whole.is_fitted else None
        for scale, map_size in enumerate(sizes):  # what a cell counts in a mean over the image
            cells = cells_inside(scoring.interest, map_size)
            share = None if tiles is None and cells.all() else (cells / cells.sum()).to(self.dtype)
            self.register_buffer(f"share_{scale}", share)
        self.eval()

    def log_likelihoods(self, images: torch.Tensor) -> list[torch.Tensor]:
        """Compute what :meth:`CflowModel.log_likelihoods` computes."""
        return self._run(images)[0]

    def _run(self, images: torch.Tensor) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        """Log-likelihoods ``(B, H_k, W_k)``, and of each scale what has its mean over what is looked at."""
        if images.dtype != self.dtype:
            images = images.to(self.dtype)
        if self.tiles is None:
            pyramid = self.encoder(images)
            found = [flow(features) for flow, features in zip(self.flows, pyramid, strict=True)]
            return found, [
                part if share is None else (part * share).sum((2, 3), keepdim=True)
                for part, share in zip(pyramid, self._shares(), strict=True)
            ]
        found = self.tiles(images, self._of_tile)
        scales = len(self.flows)
        return found[:scales], [part.sum((2, 3), keepdim=True) for part in found[scales:]]

    def _shares(self) -> list[torch.Tensor | None]:
        return [getattr(self, f"share_{scale}") for scale in range(len(self.flows))]

    def _of_tile(self, images: torch.Tensor, row: Span, column: Span) -> list[torch.Tensor]:
        likelihoods, sums = [], []
        for flow, features, stride, share in zip(
            self.flows, self.encoder(images), self.strides, self._shares(), strict=True
        ):
            part = features[..., row.cells(stride), column.cells(stride)]
            top, left, height, width = row.start // stride, column.start // stride, *part.shape[-2:]
            likelihoods.append(flow(part, (top, left)))
            if share is not None:
                part = part * share[top : top + height, left : left + width]
            sums.append(part.sum((2, 3), keepdim=True))
        return [*likelihoods, *sums]

    def forward(self, images: torch.Tensor) -> InferenceBatch:
        """Compute what :meth:`CflowModel.forward` computes."""
        likelihoods, means = self._run(images)
        anomaly_map, score = self.scoring(likelihoods)
        if self.whole is not None:
            score = self.whole(means, score)
        return InferenceBatch(pred_score=score, anomaly_map=anomaly_map)


def in_full_precision(decoder: ConditionalFlow) -> ConditionalFlow:
    """A decoder that computes at least in single precision: itself, or a copy where its weights have half.

    Args:
        decoder: The decoder.
    """
    dtype = next(decoder.parameters()).dtype
    wanted = torch.promote_types(dtype, torch.float32)
    return decoder if dtype == wanted else deepcopy(decoder).to(wanted)


class FoldedFlow(nn.Module):
    r"""Log-likelihoods of one feature map of a fixed size, by fewer operations than :class:`ConditionalFlow`.

    A coupling block maps :math:`x = [x_1, x_2]` to :math:`y = P(\Psi \odot [x_1, x_2 \odot e^{s} + t] + b)`. Walking
    from the last block to the first, let :math:`z = G \odot y + O` be the affine function of a block's output that the
    rest of the folded flow works on; at the end :math:`z = u`. Before the permutation and the global affine that is

    .. math:: z_1 = G_1 x_1 + O_1, \qquad z_2 = G_2 (x_2 \odot e^s + t) + O_2 ,

    so on :math:`z` the block is :math:`z_1 \mapsto z_1`, :math:`z_2 \mapsto z_2 \odot e^s + t'` with
    :math:`t' = G_2 t + O_2` out of rescaled second-layer weights, and :math:`s, t` from :math:`z_1` by rescaled
    first-layer weights. No global scale or offset is left; they have moved into the linear layers and, for the first
    block, into the whitening. The condition's part of the first layer is a constant of each position, the logarithms of
    all scales are one number, and where the halves merely swap no permutation is left either. The last block needs none
    of any kind: the likelihood depends on the norm of :math:`u` alone.

    A soft permutation does not let an affine function of each element through. There the block works on :math:`x`
    itself, and what stands between it and the next one is a single linear map,
    :math:`x \mapsto G \odot R (\Psi \odot x + b) + O`.

    Args:
        flow: The decoder; it is copied, not referred to.
        height: Rows of the feature map.
        width: Columns of the feature map.
        in_parts: It will be given parts of the feature map; what is constant of each position is not kept.
    """

    @torch.no_grad()
    def __init__(self, flow: ConditionalFlow, height: int, width: int, in_parts: bool = False) -> None:
        super().__init__()
        whitening, blocks = flow.whitening, flow.blocks
        # All constants are computed in float64 and rounded once.
        like, kept = whitening.mean, whitening.kept
        gain = torch.ones_like(in_double(like[:kept]))
        offset = torch.zeros_like(gain)
        log_det = in_double(whitening.log_det)
        folded, exchanges = [], []
        for block in reversed(blocks):
            scale = 0.1 * functional.softplus(in_double(block.global_scale[0]), beta=0.5)
            shift = in_double(block.global_offset[0])
            log_det = log_det + scale.log().sum()
            if not folded:
                gain, offset = scale, shift
            elif block.permutation is not None:
                inverse = block.permutation.cpu().argsort()
                gain, offset = gain[inverse], offset[inverse]
                gain, offset = gain * scale, gain * shift + offset
                exchanges.insert(0, _Exchange(block))
            elif block.rotation is not None:
                rotation = gain[:, None] * in_double(block.rotation)
                exchanges.insert(
                    0, _Rotation(_linear(rotation * scale, rotation @ shift + offset, like), block.passive)
                )
                gain, offset = torch.ones_like(gain), torch.zeros_like(offset)
            folded.insert(0, _FoldedBlock(block, gain, offset, height, width, in_parts))
            offset = torch.cat([offset[: block.passive], torch.zeros_like(offset[block.passive :])])
        self.dimensions = len(like)
        weight = in_double(whitening.matrix).clone()
        weight[:kept] *= gain[:, None]
        bias = -weight @ in_double(whitening.mean)
        bias[:kept] += offset
        half = blocks[0].passive
        # Where all is kept, the first half of the whitened vector is made of the first half of the features alone.
        reads = half if kept == len(like) else len(like)
        self.whitening_first = _linear(weight[:half, :reads], bias[:half], like)
        self.whitening_second = _linear(weight[half:kept], bias[half:kept], like)
        self.whitening_rest = _linear(weight[kept:], bias[kept:], like) if kept < len(like) else None
        self.blocks = ModuleListOf[_FoldedBlock](folded)
        self.exchanges = nn.ModuleList(exchanges)
        self.constant = float(log_det) / self.dimensions - 0.5 * math.log(2 * math.pi)

    def forward(self, features: torch.Tensor, place: tuple[int, int] | None = None) -> torch.Tensor:
        """Compute the log-likelihood per dimension (Eq. 8 divided by D) at each position.

        Args:
            features: ``(B, D, H, W)`` of the size the flow was folded for, or a part of them.
            place: Row and column at which the part begins.

        Returns:
            Nats per dimension, ``(B, H, W)``.
        """
        size = features.shape[-2:]
        vectors = features.flatten(2).transpose(1, 2)
        first = self.whitening_first(vectors[..., : self.whitening_first.in_features])
        second = self.whitening_second(vectors)
        total = torch.empty(0)
        for index, block in enumerate(self.blocks):
            log_scale, second = block(first, second, None if place is None else (*place, *size))
            total = total.add_(log_scale) if index else log_scale.clone()
            if index < len(self.exchanges):
                first, second = self.exchanges[index](first, second)
        squares = [first, second]
        if self.whitening_rest is not None:
            squares.append(self.whitening_rest(vectors))
        if total.dtype.itemsize < torch.float32.itemsize:
            # autocast: a sum of hundreds of squares would keep two digits
            total, squares = total.float(), [part.float() for part in squares]
        energy = total.sum(-1) - 0.5 * reduce(torch.add, [part.square().sum(-1) for part in squares])
        return (energy / self.dimensions + self.constant).unflatten(1, size)


class _FoldedBlock(nn.Module):
    """A coupling block on the folded flow's own coordinates."""

    def __init__(
        self, block: CouplingBlock, gain: torch.Tensor, offset: torch.Tensor, height: int, width: int, in_parts: bool
    ) -> None:
        super().__init__()
        like = block.global_scale
        self.passive, self.active, self.clamp = block.passive, block.active, block.clamp
        first, second = block.linear_layers
        weight, bias = in_double(first.weight), in_double(first.bias)
        from_state = weight[:, : self.passive] / gain[: self.passive]
        bias = bias - from_state @ offset[: self.passive]
        self.first = _linear(from_state, None, like)
        # What the condition adds is a sum of a part for the row and one for the column.
        rows, columns = weight.new_zeros(height, 1, len(weight)), bias.expand(1, width, -1)
        if block.condition_dims:
            half = block.condition_dims // 2
            condition = positional_encoding_2d(block.condition_dims, height, width).to(weight)
            condition = condition.unflatten(0, (height, width))
            from_columns, from_rows = weight[:, self.passive :].split(half, dim=1)
            columns = columns + condition[:1, :, :half] @ from_columns.T
            rows = rows + condition[:, :1, half:] @ from_rows.T
        self.rows: torch.Tensor
        self.columns: torch.Tensor
        self.position: torch.Tensor | None
        self.register_buffer("rows", as_on(rows, like))
        self.register_buffer("columns", as_on(columns, like).contiguous())
        self.register_buffer("position", None if in_parts else as_on((rows + columns).flatten(0, 1), like))
        weight, bias = 0.1 * in_double(second.weight), 0.1 * in_double(second.bias)
        weight[self.active :] *= gain[self.passive :, None]
        bias[self.active :] = bias[self.active :] * gain[self.passive :] + offset[self.passive :]
        self.second = _linear(weight, bias, like)

    def forward(
        self, first: torch.Tensor, second: torch.Tensor, part: tuple[int, int, int, int] | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Transform the active half; return its log-scale and itself, both ``(B, P, active)``."""
        position = self.position
        if part is not None:
            top, left, height, width = part
            rows = self.rows[top : top + height]
            if torch.compiler.is_exporting():
                # What is 0 of the input, lest a runtime add up beforehand, for all tiles, what takes a gigabyte.
                rows = rows + 0 * first[:1, :1, :1]
            position = (rows + self.columns[:, left : left + width]).flatten(0, 1)
        elif position is None or torch.compiler.is_exporting():
            # A file keeps the two parts, which are small; whatever runs it adds them up when it loads the file.
            position = (self.rows + self.columns).flatten(0, 1)
        hidden = self.first(first).add_(position).relu_()
        log_scale, shift = self.second(hidden).split(self.active, dim=-1)
        log_scale = torch.tanh(log_scale).mul_(self.clamp)
        return log_scale, torch.addcmul(shift, second, torch.exp(log_scale))


class _Exchange(nn.Module):
    """What a permutation leaves: the halves get the roles they have in the next block."""

    def __init__(self, block: CouplingBlock) -> None:
        super().__init__()
        self.sizes = [block.passive, block.active]
        swaps = block.swaps and block.passive == block.active
        self.permutation: torch.Tensor | None
        self.register_buffer("permutation", None if swaps else block.permutation)

    def forward(self, first: torch.Tensor, second: torch.Tensor) -> tuple[torch.Tensor, ...]:
        if self.permutation is None:
            return second, first
        return torch.cat([first, second], -1).index_select(-1, self.permutation).split(self.sizes, dim=-1)


class _Rotation(nn.Module):
    """A soft permutation between two blocks, with the affine functions on either side of it."""

    def __init__(self, linear: nn.Linear, passive: int) -> None:
        super().__init__()
        self.linear = linear
        self.sizes = [passive, linear.out_features - passive]

    def forward(self, first: torch.Tensor, second: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return self.linear(torch.cat([first, second], -1)).split(self.sizes, dim=-1)


@torch.no_grad()
def _fold_batch_norm(encoder: Encoder, images: torch.Tensor) -> Encoder:
    """A copy of the encoder whose batch norms, constant in eval mode, are part of the convolutions before them."""
    folded = deepcopy(encoder)
    pairs = _norms_behind_convolutions(folded, images)
    for convolution, norm in pairs:
        before, behind = folded.get_submodule(convolution), folded.get_submodule(norm)
        folded.set_submodule(convolution, fuse_conv_bn_eval(cast("nn.Conv2d", before), cast("nn.BatchNorm2d", behind)))
        # timm's own kind has an activation in it.
        folded.set_submodule(norm, getattr(behind, "act", nn.Identity()))
    with in_floating_point(encoder, folded):  # a value next to the middle of two may be rounded to either
        is_same = not pairs or _agree(encoder(images), folded(images))
    if not is_same:
        # Something that is no module takes a convolution's output, too, or the network looks into its layers.
        folded = deepcopy(encoder)
    for module in folded.modules():
        if isinstance(module, QuantizedConvolution):
            module.fix()
    # Torch's convolutions run faster on channels that lie side by side, and the decoders want their vectors that way.
    return folded.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]  a keyword it documents


def _norms_behind_convolutions(network: nn.Module, images: torch.Tensor) -> list[tuple[str, str]]:
    """Names of convolutions and of the batch norms that alone of all modules take their outputs."""
    outputs: dict[int, tuple[str, torch.Tensor]] = {}
    takers: dict[str, set[str]] = {}
    calls: Counter[str] = Counter()

    def note(name: str, module: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
        calls[name] += 1
        found = outputs.get(id(inputs[0])) if inputs else None
        if found is not None:
            takers.setdefault(found[0], set()).add(name)
        if type(module) in _CONVOLUTIONS:
            outputs[id(output)] = name, output  # kept, so that no other tensor gets its number

    leaves = {name: module for name, module in network.named_modules() if isinstance(module, _KINDS)}
    others = {name: module for name, module in network.named_modules() if not any(module.children())}
    handles = [
        module.register_forward_hook(partial(note, name)) for name, module in {**others, **leaves}.items() if name
    ]
    network(images)
    for handle in handles:
        handle.remove()
    return [
        (convolution, norm)
        for convolution, names in takers.items()
        for norm in names
        if len(names) == 1 and isinstance(leaves.get(norm), nn.BatchNorm2d) and calls[convolution] == calls[norm] == 1
    ]


def _agree(expected: Sequence[torch.Tensor], found: Sequence[torch.Tensor]) -> bool:
    """Whether features are the same but for rounding."""
    rounding = 1e3 * torch.finfo(expected[0].dtype).eps
    return all(
        (a - b).abs().max() <= rounding * a.abs().max().clamp(min=1e-6) for a, b in zip(expected, found, strict=True)
    )


def _linear(weight: torch.Tensor, bias: torch.Tensor | None, like: torch.Tensor) -> nn.Linear:
    """A linear layer with these constants, in the dtype and on the device of the decoder's own."""
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, device="meta")
    layer.weight = nn.Parameter(as_on(weight, like), requires_grad=False)
    if bias is not None:
        layer.bias = nn.Parameter(as_on(bias, like), requires_grad=False)
    return layer
