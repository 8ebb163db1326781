"""The training images' features, and what is nearest among them."""

__all__ = ["Gallery"]

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import nn

from cflow_plugin.errors import CflowError
from cflow_plugin.modules import take_shapes_from_checkpoints

# Distances computed at once: few enough for a processor's cache, enough to keep a GPU busy.
_CHUNK_VALUES = 2 * 1024**2


class Gallery(nn.Module):
    r"""Features of the training images: one pooled vector an image, and its pyramid at every scale.

    A position of the finest scale is described by its own vector and by those of the coarser cells it lies in (nearest
    neighbour upsampling, from each scale to the next finer one), concatenated. The concatenation is never made. The
    gallery keeps each scale at its own resolution, which takes a quarter of the memory, and since

    .. math:: \|q - g\|^2 = \sum_k \|q_k - g_k\|^2,

    coarse scales are compared once for each pair of their cells instead of once for each pair of fine positions. Among
    the fine positions of one coarse cell the nearest is found before the coarse part is added, which they share.

    FAISS and scikit-learn would need the concatenated vectors, six times the multiplications at ResNet-18's first three
    stages, and an index serves no second image: each is compared with the neighbours it has retrieved. ``torch.cdist``
    would write and take the root of every distance before the smallest are chosen. It does serve for whole images.

    Args:
        scales: Number of scales.
        half_precision: Keep the pyramids in float16. Distances are computed in float32 all the same, and pooled vectors
            are kept in it.
    """

    def __init__(self, scales: int, half_precision: bool = False) -> None:
        super().__init__()
        self.scales = scales
        self.half_precision = half_precision
        self.pooled: torch.Tensor
        self.sizes: torch.Tensor
        self.scale_0: torch.Tensor  # and so on, of the coarser scales
        # How many images there are and how large their maps is not known before training.
        self.register_buffer("pooled", torch.empty(0, 0))
        self.register_buffer("sizes", torch.zeros(scales, 2, dtype=torch.long))
        for scale in range(scales):
            self.register_buffer(f"scale_{scale}", torch.empty(0, 0, 0))
        take_shapes_from_checkpoints(self, with_dtypes=True)
        self._collected: list[tuple[torch.Tensor, ...]] = []

    def __len__(self) -> int:
        """Number of images."""
        return len(self.pooled)

    @property
    def megabytes(self) -> float:
        """Memory of everything kept, in MiB."""
        return sum(buffer.numel() * buffer.element_size() for buffer in self.buffers()) / 1024**2

    def vectors(self, image: int) -> list[torch.Tensor]:
        """An image's vectors at each scale, ``(P_k, D_k)`` in row-major order of positions."""
        return [getattr(self, f"scale_{scale}")[image] for scale in range(self.scales)]

    # Filling

    @torch.no_grad()
    def add(self, pooled: torch.Tensor, pyramid: Sequence[torch.Tensor]) -> None:
        """Add a batch of images; :meth:`finish` makes them part of the gallery.

        Args:
            pooled: ``(B, D)``.
            pyramid: For each scale ``(B, D_k, H_k, W_k)``, fine to coarse.

        Raises:
            CflowError: If a value is not finite, in float16 where that is asked for.
        """
        if not all(torch.isfinite(part).all() for part in (pooled, *pyramid)):
            msg = "The training features hold NaN or infinite values: check the training images and encoder weights."
            raise CflowError(msg)
        kept = [features.flatten(2).transpose(1, 2).contiguous() for features in pyramid]
        if self.half_precision:
            kept = [part.half() for part in kept]
            if not all(torch.isfinite(part).all() for part in kept):
                msg = "The training features are too large for float16; leave out --model.half_precision."
                raise CflowError(msg)
        self.sizes.copy_(torch.tensor([features.shape[-2:] for features in pyramid]))
        self._collected.append((pooled, *kept))

    def clear(self) -> None:
        """Forget what was added and not finished."""
        self._collected = []

    def finish(self) -> None:
        """Take the images added as the gallery.

        Raises:
            CflowError: If there is none.
        """
        if not self._collected:
            msg = (
                "There is no training image; check --data.root and --data.category, or give a checkpoint: --ckpt_path."
            )
            raise CflowError(msg)
        parts = [list(column) for column in zip(*self._collected, strict=True)]
        self._collected = []
        for name in ("pooled", *(f"scale_{scale}" for scale in range(self.scales))):
            # One scale after the other, each one's parts let go before the next: they are large.
            setattr(self, name, torch.cat(parts.pop(0)))

    # Searching

    def nearest_images(self, pooled: torch.Tensor, count: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Find the nearest images by their pooled vectors.

        Args:
            pooled: ``(B, D)``.
            count: How many; all are taken where there are fewer.

        Returns:
            Euclidean distances, ascending, and indices, both ``(B, min(count, N))``.
        """
        gallery = self.pooled.to(pooled.dtype)
        # Few enough to take differences themselves, which loses no digits.
        distances = torch.cdist(pooled, gallery, compute_mode="donot_use_mm_for_euclid_dist")
        nearest = distances.topk(min(count, len(self)), largest=False)
        return nearest.values, nearest.indices

    def nearest_positions(
        self,
        vectors: Sequence[torch.Tensor],
        sizes: Sequence[tuple[int, int]],
        images: Sequence[int],
        count: int,
    ) -> torch.Tensor:
        """Find the nearest positions of some of the images, for each position of another image.

        Args:
            vectors: The other image's vectors at each scale, ``(P_k, D_k)``.
            sizes: Height and width of its feature map at each scale.
            images: Indices of the images to search.
            count: How many nearest positions; all are taken where there are fewer.

        Returns:
            Euclidean distances, ascending, ``(P_0, min(count, N * P_0'))``.
        """
        own_sizes = [tuple(size) for size in self.sizes.tolist()]
        device = vectors[0].device
        parents = [_cells_above(*pair) for pair in pairwise(sizes)]
        own_parents = [_cells_above(*pair).to(device) for pair in pairwise(own_sizes)]
        groups = _grouped(own_parents[0]) if own_parents else torch.arange(self.scale_0.shape[1], device=device)[None]
        count = min(count, len(images) * self.scale_0.shape[1])
        width = sizes[0][1]
        chunk = max(1, _CHUNK_VALUES // (groups.numel() * width)) * width  # whole rows: their coarse cells are shared

        # One matrix product gives -2 q.g + |g|^2: the gallery's vectors bring their squared norms as a last component.
        queries = [torch.cat([-2 * part, part.new_ones(len(part), 1)], dim=1) for part in vectors]
        best = vectors[0].new_full((len(vectors[0]), count), float("inf"))
        for image in images:
            own = [part.to(device, vectors[0].dtype) for part in self.vectors(image)]
            own = [torch.cat([part, part.square().sum(1, keepdim=True)], dim=1) for part in own]
            # In the order of groups, and never nearest where a group has no further member.
            own[0] = own[0].index_select(0, groups.clamp(min=0).flatten())
            own[0][groups.flatten() < 0, -1] = float("inf")
            search = _Search(queries, parents, own, own_parents)
            for start in range(0, len(best), chunk):
                rows = slice(start, min(start + chunk, len(best)))
                found = search.finest(rows, len(groups), count)
                best[rows] = torch.cat([best[rows], found], dim=1).topk(count, largest=False).values
        norm = vectors[-1].square().sum(1)
        for part, cells in zip(vectors[-2::-1], parents[::-1], strict=True):
            norm = part.square().sum(1) + norm[cells.to(device)]
        # Rounding may take the square of a distance near zero below it.
        return (best + norm[:, None]).clamp(min=0).sqrt().sort(dim=1).values


class _Search:
    r"""One image's positions against one gallery image's, by :math:`\|q - g\|^2 - \|q\|^2`, which ranks them alike."""

    def __init__(
        self,
        queries: Sequence[torch.Tensor],
        parents: Sequence[torch.Tensor],
        own: Sequence[torch.Tensor],
        own_parents: Sequence[torch.Tensor],
    ) -> None:
        self._queries = queries
        self._parents = parents
        self._own = own
        self._own_parents = own_parents

    def finest(self, rows: slice, group: int, count: int) -> torch.Tensor:
        """The ``count`` smallest for each of these rows, or so many of them that none of the smallest is missing."""
        values = self._product(0, rows).unflatten(1, (group, -1))
        if count == 1:
            values = values.amin(1, keepdim=True)
        if self._parents:
            values += self._above(0, rows)[:, None]
        values = values.flatten(1)
        return (
            values.amin(1, keepdim=True) if count == 1 else values.topk(min(count, values.shape[1]), largest=False)[0]
        )

    def _product(self, scale: int, rows: slice) -> torch.Tensor:
        return self._queries[scale][rows] @ self._own[scale].T

    def _above(self, scale: int, rows: slice) -> torch.Tensor:
        """What the coarser scales add for these rows of a scale and each gallery cell of the next coarser one."""
        cells = self._parents[scale][rows]
        low, high = int(cells.min()), int(cells.max()) + 1
        values = self._product(scale + 1, slice(low, high))
        if scale + 1 < len(self._parents):
            values += self._above(scale + 1, slice(low, high)).index_select(1, self._own_parents[scale + 1])
        return values.index_select(0, (cells - low).to(values.device))


def _cells_above(fine: tuple[int, int], coarse: tuple[int, int]) -> torch.Tensor:
    """The coarse cell that each fine position lies in, ``(P,)``, both in row-major order."""
    rows, columns = (torch.arange(many) * few // many for many, few in zip(fine, coarse, strict=True))
    return (rows[:, None] * coarse[1] + columns).flatten()


def _grouped(parents: torch.Tensor) -> torch.Tensor:
    """Positions grouped by their cells: ``(G, C)``, the g-th position of each of C cells; -1 where there is none."""
    sizes = parents.bincount()
    order = parents.argsort(stable=True)
    rank = torch.arange(len(parents), device=parents.device) - (sizes.cumsum(0) - sizes)[parents[order]]
    groups = parents.new_full((int(sizes.max()), len(sizes)), -1)
    groups[rank, parents[order]] = order
    return groups
