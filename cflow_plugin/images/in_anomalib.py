"""Our way of reading and listing images, made anomalib's."""

__all__ = ["install"]

import os
import re
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import anomalib.data  # noqa: F401  its modules must have imported what is replaced in them
import numpy as np
import torch
from anomalib.data.datasets import image as data_sets
from anomalib.data.datasets.image import folder, tabular
from anomalib.data.errors import MisMatchError
from anomalib.data.utils import image as anomalib_images
from anomalib.data.utils import path as anomalib_paths
from pandas import DataFrame
from PIL import Image
from torchvision.tv_tensors import Image as ImageTensor

from cflow_plugin.anomalib_patches.image_files import use_for_pictures, wrap
from cflow_plugin.errors import CflowError
from cflow_plugin.images.listing import IMAGES, visible
from cflow_plugin.images.pairing import check_pairs, check_roles, check_table, match_beside, match_folders, pair_masks
from cflow_plugin.images.reading import load_pixels

_EIGHT_BITS = 255


def install() -> None:
    """Let anomalib read 16-bit images with their full range, pass over hidden files, and pair masks by name."""
    wrap(anomalib_images.read_image, _read)
    wrap(anomalib_images.get_image_filenames_from_dir, _list_images)
    wrap(anomalib_paths._prepare_files_labels, _list_role)  # noqa: SLF001
    wrap(folder.make_folder_dataset, _make_folder)
    wrap(tabular.make_tabular_dataset, _make_table)
    for name, module in list(sys.modules.items()):
        if name.startswith(data_sets.__name__) and hasattr(module, "validate_path"):
            vars(module)["validate_path"] = _Root.of
            for key, function in list(vars(module).items()):
                if re.fullmatch(r"make_(\w+_)?dataset", key):
                    wrap(function, _make_published)
    use_for_pictures(_picture)


def _read(original: Any, path: str | os.PathLike, as_tensor: bool = False) -> torch.Tensor | np.ndarray:
    """An image, 1 being the highest value that the file can hold: a tensor ``(3, H, W)`` or an array ``(H, W, 3)``."""
    del original
    pixels = load_pixels(path)
    highest = np.iinfo(pixels.dtype).max
    if not as_tensor:
        return pixels / highest
    values = np.empty((3, *pixels.shape[:2]), np.float32)  # of a large image there is no room for more than one
    np.divide(pixels.transpose(2, 0, 1), np.float32(highest), out=values, dtype=np.float32)
    return ImageTensor(torch.from_numpy(values))


def _picture(path: str | os.PathLike) -> Image.Image:
    """An image to look at: of more than 8 bits, what its values reach becomes white."""
    pixels = load_pixels(path)
    if pixels.dtype == np.uint8:
        return Image.fromarray(pixels)
    highest = max(1, int(pixels.max()))
    return Image.fromarray((pixels.astype(np.float32) * (_EIGHT_BITS / highest)).round().astype(np.uint8))


# Files


def _list_images(original: Any, path: str | os.PathLike) -> list[Path]:
    return _not_none(visible(original(path), Path(path)), path)


def _not_none(files: list[Path], path: str | os.PathLike) -> list[Path]:
    if not files:
        message = f"There is no image in {path} but hidden ones."
        raise CflowError(message)
    return files


def _list_role(
    original: Any, path: str | os.PathLike, path_type: str, extensions: tuple[str, ...] | None = None
) -> tuple[list[Path], list[str]]:
    files = _not_none(visible(original(path, path_type, extensions)[0], Path(path)), path)
    return files, [path_type] * len(files)


class _Root(type(Path())):
    """The folder of a published data set, in which nothing hidden is found."""

    @classmethod
    def of(cls, path: str | Path, *args: Any, **kwargs: Any) -> Path:
        return cls(anomalib_paths.validate_path(path, *args, **kwargs))

    def glob(self, pattern: str, **kwargs: Any) -> Iterator[Path]:  # pyright: ignore[reportIncompatibleMethodOverride]
        return iter(visible([file for file in super().glob(pattern, **kwargs) if file.suffix.lower() in IMAGES], self))


# Samples


def _make_folder(
    original: Any,
    normal_dir: str | Path | Sequence[str | Path],
    root: str | Path | None = None,
    abnormal_dir: str | Path | Sequence[str | Path] | None = None,
    normal_test_dir: str | Path | Sequence[str | Path] | None = None,
    mask_dir: str | Path | Sequence[str | Path] | None = None,
    split: Any = None,
    extensions: tuple[str, ...] | None = None,
) -> DataFrame:
    """Anomalib's table of a folder, with each image's mask found by its name."""
    samples = original(normal_dir, root, abnormal_dir, normal_test_dir, None, split, extensions)
    roles = {"normal_dir": normal_dir, "normal_test_dir": normal_test_dir, "abnormal_dir": abnormal_dir}
    files = {name: _files(given, root, extensions) for name, given in {**roles, "mask_dir": mask_dir}.items()}
    check_roles(files)
    if files["mask_dir"]:
        masks = pair_masks(files["abnormal_dir"], files["mask_dir"])
        by_path = {str(image): str(mask) for image, mask in masks.items()}
        samples["mask_path"] = [by_path.get(path, "") for path in samples["image_path"]]
        samples.attrs["task"] = "segmentation"
    return samples


def _files(
    given: str | Path | Sequence[str | Path] | None, root: str | Path | None, extensions: tuple[str, ...] | None
) -> list[Path]:
    folders = [] if given is None else [given] if isinstance(given, str | Path) else given
    every = [anomalib_paths.validate_and_resolve_path(one, root) for one in folders]
    return [file for one in every for file in anomalib_paths._prepare_files_labels(one, "", extensions)[0]]  # noqa: SLF001


def _make_published(original: Any, *args: Any, **kwargs: Any) -> DataFrame:
    """Anomalib's table of a published data set; where its masks do not match, a sentence that names them."""
    root = Path(str(args[0] if args else kwargs.get("root", kwargs.get("path"))))
    suffixes = getattr(sys.modules[original.__module__], "IMG_EXTENSIONS", IMAGES)
    match_folders(root, {suffix.lower() for suffix in suffixes})
    try:
        samples = original(*args, **kwargs)
    except (MisMatchError, TypeError, ValueError):
        match_beside(root)
        raise
    check_pairs(samples)
    return samples


def _make_table(original: Any, samples: Any, root: str | Path | None = None, split: Any = None) -> DataFrame:
    table = samples if isinstance(samples, DataFrame) else DataFrame(samples)
    check_table(table, None if root is None else Path(root))
    # anomalib puts paths into these columns, which pandas 3 refuses where they hold text.
    texts = {name: object for name in ("image_path", "mask_path") if name in table}
    return original(table.astype(texts), root, split)
