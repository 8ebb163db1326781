"""Which normal images are held out of training, to calibrate decisions on."""

__all__ = ["choose_held_out", "given_images", "good_validation_images", "part_of", "why_not_f1"]

from collections.abc import Sequence
from copy import copy
from pathlib import Path

import torch
from anomalib.data import AnomalibDataModule, PredictDataset
from anomalib.data.utils import ValSplitMode
from torch.utils.data import DataLoader, Subset

from cflow_plugin.decisions.conformal import images_needed
from cflow_plugin.errors import CflowError
from cflow_plugin.image_files import check_images


def why_not_f1(data: AnomalibDataModule) -> str | None:
    """Why thresholds that maximise F1 on the validation images would not be sound, if that is so.

    Args:
        data: What is trained on, after its set-up.

    Returns:
        Half a sentence, or ``None``.
    """
    if getattr(data, "val_split_mode", None) == ValSplitMode.SAME_AS_TEST:
        return "The validation images of these data are the test images"
    validation = getattr(data, "val_data", None)
    if validation is None:
        return "There is no validation image"
    # Data sets of videos do not say.
    return None if getattr(validation, "has_anomalous", True) else "No validation image shows a defect"


def good_validation_images(data: AnomalibDataModule) -> int:
    """How many validation images can set thresholds: all, if none shows a defect and none is tested on.

    Args:
        data: What is trained on, after its set-up.
    """
    validation = getattr(data, "val_data", None)
    if validation is None or data.val_split_mode == ValSplitMode.SAME_AS_TEST:
        return 0
    return 0 if getattr(validation, "has_anomalous", True) else len(validation)


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
