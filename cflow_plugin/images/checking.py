"""Unusable image files, said before training starts, or by name where reading one fails."""

__all__ = ["ImageFileCheck", "image_files"]

import logging
import sys
import traceback
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from anomalib.data import PredictDataset
from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback
from torch.utils.data import ConcatDataset, DataLoader, Subset

from cflow_plugin.errors import CflowError
from cflow_plugin.images.in_anomalib import install
from cflow_plugin.images.listing import IMAGES
from cflow_plugin.images.loading import data_module_of
from cflow_plugin.images.pre_processing import CflowPreProcessor
from cflow_plugin.images.reading import ImageFileError, bits_in, check_images, unreadable

logger = logging.getLogger(__name__)

_SPLITS = ("train_data", "val_data", "test_data")

install()  # a model must not train on images that are read in another way than checked here


class ImageFileCheck(Callback):
    """Looks into the headers of all images before a run, and names the files when reading one fails later.

    Pixels are read when they are needed and not before, which would take as long again.
    """

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Check what will be trained on, and what the model will be tested on when that is done."""
        pre_processor = getattr(pl_module, "pre_processor", None)
        settled = getattr(pre_processor, "bits", None)
        images, masks = _files(trainer)
        check_images(images, masks, settled)
        if settled is not None:
            return
        bits = bits_in(images)
        if isinstance(pre_processor, CflowPreProcessor):
            pre_processor.bits = bits
            if bits > 8:
                logger.info("The images have %d bits a value. If the camera has more, set --model.bits.", bits)
        elif bits > 8:
            message = (
                f"The images have {bits} bits a value, which this pre-processor knows nothing of: give it as "
                "anomalib's PreProcessor(transform), or save the images with 8 bits."
            )
            raise CflowError(message)

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Check what a trained model is to score."""
        pre_processor = getattr(pl_module, "pre_processor", None)
        check_images(*_files(trainer), getattr(pre_processor, "bits", None) or 8)

    on_predict_start = on_test_start

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Find out which files an error is about, if it came from reading images."""
        del pl_module
        if not isinstance(exception, Exception) or not (
            isinstance(exception, ImageFileError) or _is_of_pillow(exception)
        ):
            return
        # The exception is left as it is: the run still has to be wound up by others.
        explanation = unreadable(*_files(trainer))
        vars(exception)["explanation"] = explanation
        if explanation and sys.version_info >= (3, 11):
            exception.add_note(explanation)


def _is_of_pillow(error: BaseException) -> bool:
    frames = traceback.extract_tb(error.__traceback__)
    # An error of a loader's process comes as text.
    names = [frame.filename for frame in frames] + [str(error)]
    return any(f"{separator}PIL{separator}" in name for name in names for separator in "/\\")


def _files(trainer: Trainer) -> tuple[list[str], list[str]]:
    """Image files and mask files of a run."""
    data = data_module_of(trainer)
    datasets = [getattr(data, name) for name in _SPLITS if getattr(data, name, None) is not None]
    for loaders in (trainer.test_dataloaders, trainer.predict_dataloaders):
        datasets.extend(_datasets(loaders))
    images: dict[str, None] = {}
    masks: dict[str, None] = {}
    for dataset in datasets:
        _collect(dataset, images, masks)
    return list(images), list(masks)


def image_files(loaders: Any) -> list[str]:
    """The image files that loaders load, each once, in their order.

    Args:
        loaders: A loader, or a list of them.
    """
    images: dict[str, None] = {}
    for dataset in _datasets(loaders):
        _collect(dataset, images, {})
    return list(images)


def _datasets(loaders: Any) -> list[Any]:
    every = loaders if isinstance(loaders, list) else [loaders]
    return [loader.dataset for loader in every if isinstance(loader, DataLoader)]


def _collect(dataset: Any, images: dict[str, None], masks: dict[str, None]) -> None:
    if isinstance(dataset, Subset):
        _collect(dataset.dataset, images, masks)
    elif isinstance(dataset, ConcatDataset):
        for part in dataset.datasets:
            _collect(part, images, masks)
    elif isinstance(dataset, PredictDataset):
        images.update(dict.fromkeys(map(str, dataset.image_filenames)))
    elif hasattr(dataset, "samples"):
        images.update(_paths(dataset.samples.get("image_path", ())))
        masks.update(_paths(dataset.samples.get("mask_path", ())))


def _paths(column: Iterable[Any]) -> dict[str, None]:
    """The image files among them: cells may be empty, and ShanghaiTech's masks are arrays."""
    return dict.fromkeys(path for path in map(str, column) if Path(path).suffix.lower() in IMAGES)
