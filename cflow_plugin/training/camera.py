"""What a camera changes in the features of one and the same part: noise, focus, compression, light."""

__all__ = ["CAMERA", "feature_changes"]

import io
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from PIL import Image
from torch.utils.data import DataLoader
from torchvision.transforms.v2 import ColorJitter, GaussianBlur, GaussianNoise, Resize
from torchvision.transforms.v2.functional import pil_to_tensor, to_pil_image

from cflow_plugin.images.loading import images_in, loader_of

_WORST_QUALITY, _BEST_QUALITY = 15, 70


def _compressed(image: torch.Tensor) -> torch.Tensor:
    file = io.BytesIO()
    quality = int(torch.randint(_WORST_QUALITY, _BEST_QUALITY + 1, ()))
    to_pil_image(image[0].cpu()).save(file, "JPEG", quality=quality)
    return pil_to_tensor(Image.open(file))[None].to(image) / 255


# Each image is changed in one of these ways, in turn. They are what a line's camera does from one day to another; how
# often it does so does not matter, only in which directions features move.
CAMERA: tuple[Callable[[torch.Tensor], torch.Tensor], ...] = (
    GaussianNoise(sigma=0.07),
    GaussianBlur(kernel_size=11, sigma=(0.5, 2.5)),
    _compressed,
    ColorJitter(brightness=0.3, contrast=0.3),
)
# Changed images that are looked at: a thousand cells of each say in which directions features move.
_CHANGED_IMAGES = 32
_LARGE = 2**20  # pixels, from which so many fewer are enough:
_CHANGED_LARGE_IMAGES = 8
_CELLS = 4096


@torch.no_grad()
def feature_changes(
    images: DataLoader[Any],
    extract: Callable[[torch.Tensor], Sequence[torch.Tensor]],
    size: tuple[int, int],
    seed: int,
    gain: float = 1.0,
) -> list[torch.Tensor]:
    """By how much features differ when the same images are taken once more, by a worse camera.

    Args:
        images: Loader of good images.
        extract: Images ``(B, 3, H, W)`` as they are loaded to features ``(B, D_k, H_k, W_k)`` at every scale.
        size: Height and width that the model resizes images to: they are changed at that size, where it counts.
        seed: The same seed gives the same changes.
        gain: What values are multiplied by to have the highest that the camera can give at 1.

    Returns:
        For each scale ``(N, D_k)``, differences.
    """
    count = images_in(images)
    wanted = _CHANGED_IMAGES if size[0] * size[1] < _LARGE else _CHANGED_LARGE_IMAGES
    chosen = list(range(0, count, math.ceil(count / wanted)))
    copies = math.ceil(wanted / len(chosen))
    resize = Resize(size, antialias=True)
    found: list[list[torch.Tensor]] = []
    # The transforms draw from torch's own generator, which training must find as it was.
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        for number, batch in enumerate(loader_of(images.dataset, like=images, sampler=chosen, batch_size=1)):
            image = resize(gain * batch.image).clamp(0, 1)
            before = extract(image / gain)
            for copy in range(copies):
                changed = CAMERA[(number * copies + copy) % len(CAMERA)](image)
                after = extract(changed.clamp(0, 1) / gain)
                differences = [(b - a)[0].flatten(1).T for a, b in zip(before, after, strict=True)]
                found.append([part[:: math.ceil(len(part) / _CELLS)] for part in differences])
    return [torch.cat(parts) for parts in zip(*found, strict=True)]
