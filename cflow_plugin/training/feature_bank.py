"""Feature vectors of the training images, kept in memory so that a training step need not run the encoder."""

__all__ = ["FeatureBank", "VectorBatch"]

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch

from cflow_plugin.model.scoring import means_inside
from cflow_plugin.model.whole import WholeImage

# Vectors of one position in several images share their condition, so a step takes a grid of images × positions; with
# this many images a step is still varied and the condition's part of the first layer nearly free.
_IMAGES_PER_STEP = 16
_MAXIMUM_BYTES = 2 * 1024**3


@dataclass
class VectorBatch:
    """One step's vectors at each scale.

    Attributes:
        vectors: For each scale ``(N, P_k, D_k)``: P_k positions in N images.
        positions: For each scale ``(P_k,)``: row-major index of each position in the scale's feature map.
        noise: For each scale standard normal noise, shaped as the vectors, or ``None``.
        sizes: For each scale the height and width of its feature map.
        weight: What a mean over these vectors counts, where several processes share a batch; the mean weight is 1.
        image: Always ``None``: anomalib's pre-processor transforms the image and mask of whatever batch it is given.
        gt_mask: Always ``None``.
    """

    vectors: list[torch.Tensor]
    positions: list[torch.Tensor]
    noise: list[torch.Tensor | None]
    sizes: list[tuple[int, int]]
    weight: float = 1.0
    image: None = None
    gt_mask: None = None

    def to(self, device: torch.device, **_: object) -> "VectorBatch":
        """Move the tensors; Lightning calls this."""
        return VectorBatch(
            [part.to(device) for part in self.vectors],
            [part.to(device) for part in self.positions],
            [None if part is None else part.to(device) for part in self.noise],
            self.sizes,
            self.weight,
        )


class FeatureBank:
    """Features of good images at every scale, or at a part of the positions where memory asks for it.

    Which part depends on whose turn it is: from turn to turn it moves on through all positions in random order.

    Some images vouch for the others: they are not trained on, and their likelihood says what a new good image's is.

    Args:
        sizes: Height and width of each scale's feature map, fine to coarse.
        images: Number of images the bank will hold in the end: memory is taken for so many at once, since putting
            batches together afterwards would take twice as much.
        unseen: How many of them are not trained on.
        generator: Source of all choices, on the CPU; the same in each turn.
        turn_of: Given how many vectors of the finest scale are there to train on, tells whose turn it is.
        cells: For each scale which cells are looked at, ``(H_k, W_k)`` bool; ``None`` for all.

    Attributes:
        turn: Whose turn it is.
    """

    def __init__(
        self,
        sizes: Sequence[tuple[int, int]],
        images: int,
        unseen: int,
        generator: torch.Generator,
        turn_of: Callable[[int], int],
        cells: Sequence[torch.Tensor] | None = None,
    ) -> None:
        self.sizes = list(sizes)
        self._cells = [torch.ones(size, dtype=torch.bool) for size in sizes] if cells is None else cells
        self._allowed = [part.flatten().nonzero()[:, 0].cpu() for part in self._cells]
        self._expected = images
        self._trained_on = images - unseen
        # In which row each image is kept, in the order of their coming; the last rows are not trained on.
        self._rows = torch.randperm(images, generator=generator)
        self._generator = generator
        self._turn_of = turn_of
        self.turn = 0
        self._features: list[torch.Tensor] = []
        self._positions: list[torch.Tensor] = []
        self._means: list[torch.Tensor] = []
        self._images = 0

    def add(self, pyramid: Sequence[torch.Tensor]) -> None:
        """Add the features of a batch of images.

        Args:
            pyramid: For each scale ``(B, D_k, H_k, W_k)``.
        """
        if not self._positions:
            total = self._expected * sum(features[0].numel() * features.element_size() for features in pyramid)
            share = min(1.0, _MAXIMUM_BYTES / max(1, total))
            for allowed in self._allowed:
                count = max(1, int(share * len(allowed)))
                order = allowed[torch.randperm(len(allowed), generator=self._generator)]
                if not self._positions:
                    self.turn = self._turn_of(self._trained_on * count)
                self._positions.append(order.roll(-self.turn * count)[:count].sort().values)
            self._features = [
                features.new_empty(self._expected, len(positions), features.shape[1])
                for features, positions in zip(pyramid, self._positions, strict=True)
            ]
        self._means.append(WholeImage.means(means_inside(pyramid, self._cells)))
        rows = self._rows[self._images : self._images + len(pyramid[0])]
        for kept, features, positions in zip(self._features, pyramid, self._positions, strict=True):
            vectors = features.flatten(2).transpose(1, 2)
            kept[rows.to(kept.device)] = vectors[:, positions.to(vectors.device)]
        self._images += len(rows)

    @property
    def share(self) -> float:
        """Share of the finest scale's positions that is kept, of those looked at."""
        return len(self._positions[0]) / len(self._allowed[0])

    @property
    def is_due(self) -> bool:
        """Whether it is the turn of other positions."""
        return self.share < 1 and self.turn != self._turn_of(self._trained_on * len(self._positions[0]))

    @property
    def features(self) -> list[torch.Tensor]:
        """For each scale ``(I, P_k, D_k)`` over the I images that are trained on."""
        return [kept[: self._trained_on] for kept in self._features]

    @property
    def unseen_features(self) -> list[torch.Tensor]:
        """For each scale ``(I, P_k, D_k)`` over the I images that are not trained on."""
        return [kept[self._trained_on :] for kept in self._features]

    @property
    def means(self) -> torch.Tensor:
        """Means of the features over each image, of all scales, ``(I, D)``, over all images."""
        return torch.cat(self._means)

    @property
    def positions(self) -> list[torch.Tensor]:
        """For each scale ``(P_k,)``: the positions kept, as row-major indices into the feature map."""
        return self._positions

    def batches(
        self, steps: int, vectors: Sequence[int], generator: torch.Generator, with_noise: bool = False
    ) -> Iterator[VectorBatch]:
        """Draw random batches.

        Images and positions are dealt from shuffled decks, so that all are used before any is used again.

        Args:
            steps: Number of batches.
            vectors: Vectors in a batch for each scale.
            generator: Source of the random choices, on the CPU.
            with_noise: Draw noise as well.

        Yields:
            One batch a step.
        """
        images = len(self.features[0])
        rows = min(_IMAGES_PER_STEP, images)
        image_deck = _Deck(images, generator)
        position_decks = [_Deck(len(positions), generator) for positions in self._positions]
        for _ in range(steps):
            chosen = image_deck.deal(rows)
            batch, where = [], []
            for scale, count in enumerate(vectors):
                picked = position_decks[scale].deal(max(1, min(count // rows, len(self._positions[scale]))))
                features = self.features[scale]
                batch.append(features[chosen.to(features.device)[:, None], picked.to(features.device)])
                where.append(self._positions[scale][picked])
            # Drawn here, where the generator is: the same seed then gives the same training on any device.
            noise = [torch.randn(part.shape, generator=generator) if with_noise else None for part in batch]
            yield VectorBatch(batch, where, noise, self.sizes)


class _Deck:
    """Deals the numbers 0 to n - 1 in random order, shuffling anew when too few are left."""

    def __init__(self, size: int, generator: torch.Generator) -> None:
        self._size = size
        self._generator = generator
        self._rest = torch.empty(0, dtype=torch.long)

    def deal(self, count: int) -> torch.Tensor:
        if len(self._rest) < count:
            self._rest = torch.randperm(self._size, generator=self._generator)
        dealt, self._rest = self._rest[:count], self._rest[count:]
        return dealt
