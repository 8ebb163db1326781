"""Loaders of a part of another loader's images, alike in everything else; and what images pass through."""

__all__ = [
    "augmentations_in_use",
    "data_module_of",
    "described",
    "images_in",
    "loader_of",
    "loader_of_part",
    "rebuilt",
    "steps_of",
    "with_augmentations",
]

import inspect
from collections.abc import Iterable, Sequence, Sized
from copy import copy
from typing import Any, cast

from anomalib.data import AnomalibDataModule
from lightning import Trainer
from torch import nn
from torch.utils.data import DataLoader, Dataset, Sampler, Subset
from torchvision.transforms import v2
from torchvision.transforms.v2 import Compose, InterpolationMode, Transform

from cflow_plugin.errors import CflowError


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


def steps_of(transform: Any) -> list[Any]:
    """A transform's steps, whatever they are packed in.

    Args:
        transform: A transform, or ``None``.
    """
    if transform is None:
        return []
    if isinstance(transform, Compose | nn.Sequential):
        parts = transform.transforms if isinstance(transform, Compose) else transform
        return [step for part in parts for step in steps_of(part)]
    return [transform]


def described(transform: Transform | None) -> list[dict[str, Any]]:
    """A transform as plain values, for a checkpoint.

    Args:
        transform: What is done to images.

    Returns:
        For each step the ``name`` of torchvision's class, and its ``settings``, where these are plain values.

    Example:
        >>> from torchvision.transforms.v2 import CenterCrop
        >>> described(CenterCrop(30))
        [{'name': 'CenterCrop', 'settings': {'size': [30, 30]}}]
    """
    found = []
    for step in steps_of(transform):
        names = inspect.signature(type(step)).parameters
        settings = {name: _plain(getattr(step, name, ...)) for name in names}
        found.append({"name": type(step).__name__, "settings": None if ... in settings.values() else settings})
    return found


def _plain(value: Any) -> Any:
    """A value that a checkpoint may hold; an ellipsis for any other."""
    value = list(value) if isinstance(value, tuple) else value
    if isinstance(value, InterpolationMode):
        return value.value
    return value if isinstance(value, bool | int | float | str | list | None) else ...


def rebuilt(steps: Sequence[dict[str, Any]]) -> Transform | None:
    """A transform from what :func:`described` returned.

    Args:
        steps: Its steps.

    Raises:
        CflowError: If a step is not torchvision's, or its settings are no plain values.
    """
    parts = []
    for step in steps:
        kind, settings = getattr(v2, step["name"], None), step["settings"]
        if kind is None or settings is None:
            message = (
                f"Images pass through {step['name']} of the data module first, which the checkpoint does not hold: "
                "pass the data it was trained on with --data."
            )
            raise CflowError(message)
        if "interpolation" in settings:
            settings = {**settings, "interpolation": InterpolationMode(settings["interpolation"])}
        parts.append(kind(**settings))
    return v2.Compose(parts) if parts else None
