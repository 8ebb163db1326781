"""Loaders of a part of another loader's images, alike in everything else."""

__all__ = ["loader_of", "loader_of_part"]

from collections.abc import Iterable, Sequence
from copy import copy
from typing import Any

from torch.utils.data import DataLoader, Dataset, Sampler, Subset


def loader_of(
    images: Dataset, like: DataLoader, sampler: Sampler | Iterable[int] | None = None, batch_size: int | None = None
) -> DataLoader:
    """A loader, in order, with another one's settings.

    Args:
        images: What is loaded.
        like: The loader whose settings are taken over.
        sampler: Which of the images, in which order; all by default.
        batch_size: Another batch size.
    """
    settings: dict[str, Any] = {
        name: getattr(like, name)
        for name in ("collate_fn", "num_workers", "pin_memory", "timeout", "worker_init_fn", "multiprocessing_context")
    }
    if like.num_workers:
        settings |= {"prefetch_factor": like.prefetch_factor, "persistent_workers": like.persistent_workers}
    return DataLoader(images, batch_size=batch_size or like.batch_size, sampler=sampler, **settings)


def loader_of_part(loader: DataLoader, indices: Sequence[int], augmented: bool = True) -> DataLoader:
    """A loader, in order, of a part of another loader's images.

    Args:
        loader: Loader of images.
        indices: Which images.
        augmented: Keep the data set's augmentations.
    """
    images = loader.dataset
    if not augmented and getattr(images, "augmentations", None) is not None:
        images = copy(images)
        images.augmentations = None
    return loader_of(Subset(images, indices), like=loader)
