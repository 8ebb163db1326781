"""Loaders of a part of another loader's images, alike in everything else."""

__all__ = [
    "augmentations_in_use",
    "data_module_of",
    "images_in",
    "loader_of",
    "loader_of_part",
    "with_augmentations",
]

from collections.abc import Iterable, Sequence, Sized
from copy import copy
from typing import Any, cast

from anomalib.data import AnomalibDataModule
from lightning import Trainer
from torch.utils.data import DataLoader, Dataset, Sampler, Subset
from torchvision.transforms.v2 import Transform


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


def loader_of_part(loader: DataLoader[Any], indices: Sequence[int]) -> DataLoader[Any]:
    """A loader, in order, of a part of another loader's images.

    Args:
        loader: Loader of images.
        indices: Which images.
    """
    return loader_of(Subset(loader.dataset, indices), like=loader)


def with_augmentations(images: Dataset[Any], augmentations: Transform | None) -> Dataset[Any]:
    """A data set with other augmentations.

    Args:
        images: The data set; it is copied, and its images are not. One that knows none is left as it is.
        augmentations: What is done to each image when it is loaded.
    """
    if not hasattr(images, "augmentations"):
        return images
    changed: Any = copy(images)
    changed.augmentations = augmentations
    return changed


def augmentations_in_use(data: AnomalibDataModule | None) -> Transform | None:
    """What a data module does to an image that is tested; resizing as the model does is among it once it is attached.

    Args:
        data: The data module, after its set-up.
    """
    subset = getattr(data, "test_data", None)
    if subset is not None and len(subset):
        return getattr(subset, "augmentations", None)
    return getattr(data, "test_augmentations", None)
