"""Loaders of a part of another loader's images, alike in everything else."""

__all__ = ["data_module_of", "images_in", "loader_of", "loader_of_part"]

from collections.abc import Iterable, Sequence, Sized
from copy import copy
from typing import Any, cast

from anomalib.data import AnomalibDataModule
from lightning import Trainer
from torch.utils.data import DataLoader, Dataset, Sampler, Subset


def data_module_of(trainer: Trainer) -> AnomalibDataModule | None:
    """The data module that a trainer was given, if it was.

    Args:
        trainer: The trainer, which has no such attribute in Lightning's annotations.
    """
    return getattr(trainer, "datamodule", None)


def images_in(loader: DataLoader[Any]) -> int:
    """Number of images that a loader loads.

    Args:
        loader: Loader of images, whose data set knows its length.
    """
    return len(cast("Sized", loader.dataset))


def loader_of(
    images: Dataset[Any],
    like: DataLoader[Any],
    sampler: Sampler | Iterable[int] | None = None,
    batch_size: int | None = None,
) -> DataLoader[Any]:
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


def loader_of_part(loader: DataLoader[Any], indices: Sequence[int], augmented: bool = True) -> DataLoader[Any]:
    """A loader, in order, of a part of another loader's images.

    Args:
        loader: Loader of images.
        indices: Which images.
        augmented: Keep the data set's augmentations.
    """
    images: Any = loader.dataset
    if not augmented and getattr(images, "augmentations", None) is not None:
        images = copy(images)
        images.augmentations = None
    return loader_of(Subset(images, indices), like=loader)
