"""Which normal images are held out of training, to calibrate decisions on."""

__all__ = ["choose_held_out", "given_images", "part_of"]

from collections.abc import Sequence
from copy import copy
from pathlib import Path

import torch
from anomalib.data import PredictDataset
from torch.utils.data import DataLoader, Subset

from cflow_plugin.decisions.conformal import images_needed
from cflow_plugin.errors import CflowError
from cflow_plugin.image_files import check_images


def choose_held_out(images: int, rate: float, share: float, seed: int) -> list[int]:
    """Choose at random which training images are held out.

    At least as many as the rate needs, and never more than half.

    Args:
        images: Number of training images.
        rate: False-alarm rate that is asked for.
        share: Share of the images to hold out where the rate does not need more.
        seed: Seed of the choice.

    Returns:
        Their indices, ascending.

    Raises:
        CflowError: If there are too few images.
    """
    needed = images_needed(rate)
    count = max(needed, min(round(share * images), images // 2))
    if count > images // 2:
        msg = (
            f"A false-alarm rate of {rate:g} needs {needed} good images held out and at least as many to train on, "
            f"{2 * needed} in all; there are {images}. Ask for a rate of {1 / (images // 2 + 1):.3g} or more, or name "
            f"a folder of {needed} other good images with --model.held_out_images."
        )
        raise CflowError(msg)
    order = torch.randperm(images, generator=torch.Generator().manual_seed(seed))
    return sorted(order[:count].tolist())


def part_of(loader: DataLoader, indices: Sequence[int], augmented: bool = True) -> DataLoader:
    """A loader, in order, of a part of another loader's images.

    Args:
        loader: Loader of images.
        indices: Which images.
        augmented: Keep the data set's augmentations.
    """
    images = Subset(loader.dataset, indices)
    images.augmentations = getattr(loader.dataset, "augmentations", None)
    if not augmented and images.augmentations is not None:
        images.dataset = copy(loader.dataset)
        images.dataset.augmentations = images.augmentations = None
    return DataLoader(
        images, batch_size=loader.batch_size, num_workers=loader.num_workers, collate_fn=loader.collate_fn
    )


def given_images(folder: str) -> DataLoader:
    """A loader of a folder's images, one by one in their own sizes.

    Args:
        folder: Folder of good images.

    Raises:
        CflowError: If there is no image, or one that cannot be used.
    """
    try:
        images = PredictDataset(Path(folder))
    except (OSError, ValueError) as error:
        msg = f"There is no image in {folder} to calibrate decisions on; name a folder with --model.held_out_images."
        raise CflowError(msg) from error
    check_images(images.image_filenames)
    return DataLoader(images, batch_size=1, collate_fn=images.collate_fn)
