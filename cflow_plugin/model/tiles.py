"""Large images piece by piece: the same features and likelihoods as of the whole, with memory for a piece."""

__all__ = ["SEAMS", "Span", "Tiles", "measure"]

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch

from cflow_plugin.errors import CflowError
from cflow_plugin.model.encoder import Encoder

SEAMS = 1e-3
"""By so much, in standard deviations, may features differ from those of the whole image."""

_STRIDE = 32  # of the coarsest layer there is: tiles begin where its cells do
_MARGINS = (64, 128, 192, 256, 320)  # pixels


class Span(NamedTuple):
    """A piece of a side of an image, in pixels.

    Attributes:
        start: Where it begins.
        stop: Where it ends.
        first: Where what the encoder sees begins.
        last: Where that ends.
    """

    start: int
    stop: int
    first: int
    last: int

    def cells(self, stride: int) -> slice:
        """The piece's own cells, among those of what the encoder sees."""
        skipped = (self.start - self.first) // stride
        return slice(skipped, skipped - (self.start - self.stop) // stride)


class Tiles:
    """How an image is cut: into tiles of about one size, each seen with a margin of its surroundings.

    Cells count from the image's corner, so a tile's cells are the whole image's, and their positions, too.

    Args:
        size: Height and width of the image.
        tile: Height and width of a tile at most.
        margin: Pixels around it that the encoder sees as well.

    Example:
        >>> Tiles((3000, 4000), 1024, 128).rows[0]
        Span(start=0, stop=1024, first=0, last=1152)
    """

    def __init__(self, size: tuple[int, int], tile: int, margin: int) -> None:
        self.rows, self.columns = (_spans(length, tile, margin) for length in size)

    def __call__(
        self, images: torch.Tensor, run: Callable[[torch.Tensor, Span, Span], Sequence[torch.Tensor]]
    ) -> list[torch.Tensor]:
        """Do something tile by tile.

        Args:
            images: ``(B, 3, H, W)``.
            run: Is given a tile with its margin, and where it lies; its results ``(…, h, w)`` are of its own cells.

        Returns:
            The results, put together.
        """
        lines = []
        for row in self.rows:
            line = [
                run(images[..., row.first : row.last, column.first : column.last], row, column)
                for column in self.columns
            ]
            lines.append([torch.cat(parts, -1) for parts in zip(*line, strict=True)])
        return [torch.cat(parts, -2) for parts in zip(*lines, strict=True)]


def _spans(length: int, tile: int, margin: int) -> list[Span]:
    pieces = -(-length // tile)
    step = -(-length // (pieces * _STRIDE)) * _STRIDE  # all of about one size, and none a sliver
    starts = range(0, length, step)
    return [
        Span(start, min(start + step, length), max(0, start - margin), min(start + step + margin, length))
        for start in starts
    ]


@torch.no_grad()
def measure(encoder: Encoder) -> tuple[int, list[int]]:
    """How much of its surroundings a tile has to be seen with, so that its features are those of the whole image.

    Args:
        encoder: The encoder; its weights do not matter.

    Returns:
        The margin in pixels, and pixels from cell to cell of each layer.

    Raises:
        CflowError: If none is enough, as for transformers and networks that average over the whole image.
    """
    like = next(encoder.parameters(), torch.empty(0))
    for margin in _MARGINS:
        images = torch.rand(1, 3, 4 * margin, 4 * margin, generator=torch.Generator().manual_seed(0)).to(like)
        tile = Span(2 * margin, 3 * margin, margin, 4 * margin)
        try:
            whole, part = encoder(images), encoder(images[..., margin:, margin:])
        except (RuntimeError, ValueError, AssertionError):
            break  # it takes images of one size
        strides = [images.shape[-1] // features.shape[-1] for features in whole]
        pairs = zip(whole, part, strides, strict=True)
        if all(_agree(expected, found, tile, stride) for expected, found, stride in pairs):
            return margin, strides
    msg = (
        "tile_size takes a convolutional encoder, whose features see their surroundings alone; "
        f"{encoder.backbone!r} is none, or sees more than {_MARGINS[-1]} pixels. Choose another --model.backbone, "
        "finer layers, or no tile_size."
    )
    raise CflowError(msg)


def _agree(whole: torch.Tensor, part: torch.Tensor, tile: Span, stride: int) -> bool:
    """Whether a square tile's cells are the same among features of the whole image and of the tile with its margin."""
    there, here = slice(tile.start // stride, tile.stop // stride), tile.cells(stride)
    return bool((whole[..., there, there] - part[..., here, here]).abs().max() <= SEAMS * whole.std())
