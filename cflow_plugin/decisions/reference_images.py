"""Which good images are held out of training as a reference for decisions."""

__all__ = ["ReferenceImages", "choose_reference"]

import logging
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from anomalib.data import AnomalibDataModule, PredictDataset
from anomalib.data.utils import ValSplitMode
from anomalib.post_processing import PostProcessor
from lightning import Trainer
from pandas import DataFrame
from torch import nn
from torch.utils.data import ConcatDataset, DataLoader, Dataset, Subset
from torchvision.transforms.v2 import Compose, Identity, Resize, Transform

from cflow_plugin.decisions.conformal import check_enough, images_needed
from cflow_plugin.decisions.post_processing import ConformalPostProcessor
from cflow_plugin.errors import CflowError
from cflow_plugin.images.listing import IMAGES
from cflow_plugin.images.loading import (
    augmentations_in_use,
    data_module_of,
    described,
    images_in,
    loader_of,
    loader_of_part,
    rebuilt,
    with_augmentations,
)
from cflow_plugin.images.reading import check_images

if TYPE_CHECKING:
    from collections.abc import Sized

logger = logging.getLogger(__name__)

_AUTOMATIC_RATE = 0.05


class ReferenceImages:
    """The good images that set a model's thresholds, and where they come from.

    These are the images of a folder, where one is given; or else the validation images, where all of them are good and
    they are enough; or else a random part of the training images.

    Args:
        share: Share of the training images to hold out where the rate does not need more.
        folder: Folder of other good images.
        may_choose_rate: Take a rate where none is asked for and other thresholds would not be sound.

    Attributes:
        loader: Loader of the images, or ``None`` where thresholds do not come from any.
        chosen: Which training images are held out (``indices``), of how many (``images``); a resumed run needs it.
        files: The images' files, as far as they are files.
        steps: What they pass through before the model, as :func:`~cflow_plugin.images.loading.described` says it.

    Raises:
        CflowError: If the share is out of range.
    """

    def __init__(self, share: float, folder: str | None, may_choose_rate: bool) -> None:
        if not 0 < share <= 0.5:
            msg = f"held_out_share must lie above 0 and not above 0.5, got {share}."
            raise CflowError(msg)
        self._share = share
        self._folder = folder
        self._may_choose_rate = may_choose_rate
        self.loader: DataLoader[Any] | None = None
        self.chosen: dict[str, Any] | None = None
        self.files: list[str] = []
        self.steps: list[dict[str, Any]] = []

    def hold_out(
        self,
        images: DataLoader[Any],
        post_processor: nn.Module | None,
        trainer: Trainer,
        seed: int,
        training_has_begun: bool,
    ) -> DataLoader[Any]:
        """Set good images aside for the thresholds, if a false-alarm rate is to be kept.

        Args:
            images: Loader of training images.
            post_processor: The model's; takes a rate where :meth:`choose_rate` chooses one.
            trainer: The trainer, with the data.
            seed: Seed of the choice.
            training_has_begun: Whether the model may have seen all images already.

        Returns:
            Loader of the images to train on.

        Raises:
            CflowError: If there are too few images for the rate, or a resumed run would hold out what it has seen.
        """
        if isinstance(post_processor, PostProcessor):
            self.choose_rate(post_processor, trainer, images_in(images), training_has_begun)
        if not (isinstance(post_processor, ConformalPostProcessor) and post_processor.is_conformal):
            return images
        return self.take_from(images, data_module_of(trainer), post_processor.rate, seed, training_has_begun)

    def choose_rate(
        self, post_processor: PostProcessor, trainer: Trainer, images: int, training_has_begun: bool
    ) -> None:
        """Take a false-alarm rate where thresholds that maximise F1 on the validation images would not be sound.

        Args:
            post_processor: Takes the rate, unless it has one.
            trainer: Its data are judged; where their validation is switched off, nothing is done.
            images: Number of training images.
            training_has_begun: Whether the model may have seen all of them already.
        """
        data = data_module_of(trainer)
        validation_is_off = not trainer.limit_val_batches and hasattr(data, "val_data")
        takes_rate = isinstance(post_processor, ConformalPostProcessor)
        if validation_is_off or (takes_rate and post_processor.is_conformal):
            return
        reason = None if data is None else _why_not_f1(data)
        needed = images_needed(_AUTOMATIC_RATE)
        enough = _good_validation_images(data) >= needed or (images >= 2 * needed and not training_has_begun)
        if takes_rate and self._may_choose_rate and (self._folder is not None or (reason and enough)):
            logger.info(
                "%s; thresholds are set for a false-alarm rate of %g (--model.target_false_alarm_rate).",
                reason or "Good images to set thresholds by are given",
                _AUTOMATIC_RATE,
            )
            post_processor.target_false_alarm_rate = _AUTOMATIC_RATE
        elif reason:
            logger.warning(
                "%s; decision thresholds that maximise F1 on validation images cannot be trusted here. With at least "
                "%d good training images and --model.target_false_alarm_rate %g they come from good images alone.",
                reason,
                2 * needed,
                _AUTOMATIC_RATE,
            )

    def take_from(
        self, images: DataLoader[Any], data: AnomalibDataModule | None, rate: float, seed: int, training_has_begun: bool
    ) -> DataLoader[Any]:
        """Set images aside.

        Args:
            images: Loader of training images.
            data: Where they are from, or ``None``.
            rate: False-alarm rate to be kept.
            seed: Seed of the choice.
            training_has_begun: Whether the model may have seen all of them already, where none was held out.

        Returns:
            Loader of the images to train on.

        Raises:
            CflowError: If there are too few images for the rate, or a resumed run would hold out what it has seen.
        """
        total = images_in(images)
        in_use = augmentations_in_use(data)
        _warn_of_augmentations(in_use)
        self.steps = described(getattr(data, "test_augmentations", None))
        if self._folder is not None:
            given = given_images(self._folder, in_use)
            check_enough(len(given), rate)
            trained = {os.path.realpath(file) for file in _files(_table(images.dataset))}
            if both := [file for file in given.image_filenames if os.path.realpath(file) in trained]:
                msg = (
                    f"{len(both)} images of {self._folder} are trained on, too, for example {both[0]}: thresholds by "
                    "them would keep no rate. Take them out of the training images, or leave held_out_images out."
                )
                raise CflowError(msg)
            self.loader, self.files = _one_by_one(given), list(map(str, given.image_filenames))
            return images
        if self.chosen is None and data is not None and _good_validation_images(data) >= images_needed(rate):
            logger.info("The thresholds come from the %d validation images, all good.", _good_validation_images(data))
            _warn_of_few_videos(_table(data.val_data), _table(data.train_data), rate)
            self.loader = _one_by_one(with_augmentations(data.val_data, in_use), like=images)
            self.files = _files(_table(data.val_data))
            return images
        if self.chosen is None:
            if training_has_begun:
                msg = (
                    "This model has been trained on all training images, so none is left for a false-alarm rate. Train "
                    "anew with target_false_alarm_rate, or name other good images with --model.held_out_images."
                )
                raise CflowError(msg)
            indices = choose_reference(total, rate, self._share, seed)
            self.chosen = {"images": total, "indices": indices}
            logger.info("%d of %d training images are held out for the thresholds.", len(indices), total)
        elif self.chosen["images"] != total:
            msg = (
                f"Images were held out of {self.chosen['images']} training images, and now there are {total}: some "
                "that were trained on would count as held out. Train anew, or go on with the same images."
            )
            raise CflowError(msg)
        indices = self.chosen["indices"]
        check_enough(len(indices), rate)
        table = _table(images.dataset)
        files = _files(table.iloc[indices])
        if self.files and list(map(_name, files)) != list(map(_name, self.files)):
            msg = (
                "The data are split into training and other images in another way than when training began, and some "
                "that were trained on would count as held out. Set the same --seed_everything and --data.seed."
            )
            raise CflowError(msg)
        self.files = files
        _warn_of_few_videos(table.iloc[indices], table.drop(table.index[indices]), rate)
        self.loader = _one_by_one(Subset(with_augmentations(images.dataset, in_use), indices), like=images)
        return loader_of_part(images, sorted(set(range(total)) - set(indices)))

    def find_again(self, data: AnomalibDataModule | None, images: int) -> Dataset[Any]:
        """The images that a trained model's thresholds come from, with what tested images pass through but resizing.

        Args:
            data: The data the model was trained on; where the files lie where they did, it is not needed.
            images: How many they are.

        Raises:
            CflowError: If they are not at hand.
        """
        transform = rebuilt(self.steps) if data is None else getattr(data, "test_augmentations", None)
        found = _find_files(self.files, data)
        if found is not None and len(found) == images:
            return ConcatDataset([PredictDataset(file, transform) for file in found])
        if data is not None and not self.files:  # frames of videos, say
            if self.chosen is not None and len(data.train_data) == self.chosen["images"]:
                return with_augmentations(Subset(data.train_data, self.chosen["indices"]), transform)
            if self.chosen is None and _good_validation_images(data) == images:
                return with_augmentations(data.val_data, transform)
        where = f" (the first of them is {self.files[0]})" if self.files else ""
        msg = (
            f"A compressed model has other scores, so its thresholds are set anew, by the {images} good images that "
            f"set those of the trained one. They are not at hand{where}: pass the data it was trained on with --data."
        )
        raise CflowError(msg)


def choose_reference(images: int, rate: float, share: float, seed: int) -> list[int]:
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


def _why_not_f1(data: AnomalibDataModule) -> str | None:
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


def _good_validation_images(data: AnomalibDataModule | None) -> int:
    """How many validation images can set thresholds: all, if none shows a defect and none is tested on.

    Args:
        data: What is trained on, after its set-up.
    """
    validation = getattr(data, "val_data", None)
    if data is None or validation is None or data.val_split_mode == ValSplitMode.SAME_AS_TEST:
        return 0
    return 0 if getattr(validation, "has_anomalous", True) else len(validation)


def _warn_of_few_videos(held_out: DataFrame, trained_on: DataFrame, rate: float) -> None:
    """Say so where too few videos are held out: frames of one are alike, so not frames but videos are exchangeable.

    Args:
        held_out: The held-out images' rows in their data set's table.
        trained_on: The other images' rows.
        rate: False-alarm rate to be kept.
    """
    if "video" not in held_out:
        return
    videos, needed = len(set(held_out.video) - set(trained_on.video)), images_needed(rate)
    if videos < needed:
        logger.warning(
            "Frames of one video are alike, and the %d good frames that set the thresholds are of %d video(s) not "
            "trained on. A false-alarm rate of %g needs at least %d of them; it can be far higher in new videos.",
            len(held_out),
            videos,
            rate,
            needed,
        )


def _table(images: Dataset[Any]) -> DataFrame:
    """A data set's rows, without columns where it is none of anomalib's."""
    samples = getattr(images, "samples", None)
    return samples if isinstance(samples, DataFrame) else DataFrame(index=range(len(cast("Sized", images))))


def _files(table: DataFrame) -> list[str]:
    """The files of a data set's images; none, where they are not all image files."""
    files = [str(path) for path in table.get("image_path", ())]
    return files if all(Path(file).suffix.lower() in IMAGES for file in files) else []


def _name(file: str) -> tuple[str, ...]:
    """What a file is known by where the data lie somewhere else."""
    return Path(file).parts[-3:]


def _find_files(files: list[str], data: AnomalibDataModule | None) -> list[Path] | None:
    """Where files are now: where they were, or among a data module's images.

    Returns:
        Their paths, or ``None`` where one is not found or cannot be told from another.
    """
    if not files:
        return None
    if all(Path(file).is_file() for file in files):
        return list(map(Path, files))
    known: dict[tuple[str, ...], set[str]] = {}
    for subset in (getattr(data, name, None) for name in ("train_data", "val_data", "test_data")):
        for path in _files(_table(subset)) if subset is not None else ():
            known.setdefault(_name(path), set()).add(path)
    found = [known.get(_name(file), set()) for file in files]
    return [Path(*paths) for paths in found] if all(len(paths) == 1 for paths in found) else None


def given_images(folder: str, transform: Transform | None = None) -> PredictDataset:
    """A folder's images.

    Args:
        folder: Folder of good images.
        transform: What is done to each.

    Raises:
        CflowError: If there is no image, or one that cannot be used.
    """
    try:
        images = PredictDataset(Path(folder), transform)
    except (OSError, ValueError) as error:
        msg = f"There is no image in {folder} to calibrate decisions on; name a folder with --model.held_out_images."
        raise CflowError(msg) from error
    check_images(images.image_filenames)
    return images


def _one_by_one(images: Dataset[Any], like: DataLoader[Any] | None = None) -> DataLoader[Any]:
    """A loader of one image at a time: in a batch anomalib would resize all to the largest of them.

    Args:
        images: The images.
        like: A loader whose processes and settings are taken over.
    """
    if like is None:
        return DataLoader(images, batch_size=1, collate_fn=cast("PredictDataset", images).collate_fn)
    return loader_of(images, like, batch_size=1)


def _warn_of_augmentations(in_use: Transform | None) -> None:
    """Say so where tested images pass through more than a file's or a folder's will.

    Args:
        in_use: What is done to an image that is tested.
    """
    parts = in_use.transforms if isinstance(in_use, Compose) else [in_use]
    others = [type(part).__name__ for part in parts if part is not None and not isinstance(part, Identity | Resize)]
    if others:
        logger.warning(
            "Images that are tested pass through %s of the data module, and so do those that set the thresholds. What "
            "`anomalib predict` and exported files are given has to pass through it, too, before; or make it a part of "
            "the model's pre_processor.",
            ", ".join(others),
        )
