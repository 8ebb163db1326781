"""How anomalib reads images, and which files of a folder it takes for images and masks.

- What: replaces functions of anomalib's in every module of anomalib that has imported them: ``read_image``,
  ``get_image_filenames_from_dir``, ``_prepare_files_labels``, and the functions that make tables of samples; and the
  ``Image.open`` of ``anomalib.visualization.image.item_visualizer``.
- Why: anomalib 2.7 clips grey values of 16 bits to white. It trains on hidden files, such as the copies in
  ``.ipynb_checkpoints``. It pairs images with masks by their places in two sorted lists; where these do not match it
  names no file, or gives an image another one's mask.
- Since: anomalib 1.0.
- Upstream: to be reported. No report is known.
- Can go: when anomalib reads 16 bits, passes over hidden files and pairs by names.
"""

__all__ = ["replace", "use_for_pictures", "wrap"]

import sys
from collections.abc import Callable
from functools import wraps
from types import SimpleNamespace
from typing import Any

from anomalib.visualization.image import item_visualizer
from PIL import Image


def replace(original: Callable[..., Any], new: Callable[..., Any]) -> None:
    """Put a function in another one's place, in every module of anomalib that has imported it.

    Args:
        original: anomalib's function.
        new: Ours.
    """
    for name, module in list(sys.modules.items()):
        if name == "anomalib" or name.startswith("anomalib."):
            for attribute, value in list(vars(module).items()):
                if value is original:
                    setattr(module, attribute, new)


def wrap(original: Callable[..., Any], around: Callable[..., Any]) -> None:
    """Let a function be called by another one, which gets it as its first argument; once, however often this is asked.

    Args:
        original: anomalib's function.
        around: Called as ``around(original, *args, **kwargs)``.
    """
    if getattr(original, "around", None) is not None:
        return

    @wraps(original)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        return around(original, *args, **kwargs)

    vars(wrapped)["around"] = around
    replace(original, wrapped)


def use_for_pictures(read: Callable[[Any], Image.Image]) -> None:
    """Let anomalib's pictures of results show images as they are read here.

    Args:
        read: Takes a path and returns the image with 8 bits.
    """
    setattr(item_visualizer, "Image", SimpleNamespace(Image=Image.Image, open=read))  # noqa: B010  no such type
