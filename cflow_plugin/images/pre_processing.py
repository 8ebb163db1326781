"""What happens to an image before the encoder sees it."""

__all__ = ["CflowPreProcessor"]

from collections.abc import Sequence
from typing import Any, TypeVar

import torch
from anomalib.data import Batch
from anomalib.pre_processing import PreProcessor
from lightning import LightningModule, Trainer
from torchvision.transforms.v2 import Compose, InterpolationMode, Normalize, Resize, Transform

from cflow_plugin.errors import CflowError

_ROUNDING = 1 + 1e-6

AnyBatch = TypeVar("AnyBatch", bound=Batch)


class CflowPreProcessor(PreProcessor):
    """anomalib's pre-processing, done the same way wherever a model is used.

    anomalib's own leaves the smoothing of a reduction out behind training and testing, so that an image gets another
    score from its inferencers than from its engine.

    Grey cameras deliver 10, 12 or 14 bits in files of 16. Images come with values between 0 and 1, where 1 is the
    highest that the *file* can hold; here the highest that the *camera* can give becomes 1.

    Args:
        transform: What is done to images ``(B, 3, H, W)``.
        bits: Bits of a value: 8, or 9 to 16 where images are grey and have 16-bit files. ``None`` until the images
            are known; then as 8.

    Raises:
        CflowError: If the number of bits is out of range.

    Example:
        >>> CflowPreProcessor(bits=12)(torch.full((1, 3, 2, 2), 4095 / 65535)).max().round(decimals=4)
        tensor(1.)
    """

    def __init__(self, transform: Transform | None = None, bits: int | None = None) -> None:
        super().__init__(transform)
        if bits is not None and not 8 <= bits <= 16:
            message = f"bits must lie between 8 and 16, got {bits}."
            raise CflowError(message)
        self.bits: int | None = bits

    @property
    def gain(self) -> float:
        """What values are multiplied by."""
        bits = self.bits or 8
        return 1.0 if bits == 8 else (2**16 - 1) / (2**bits - 1)

    def to_full_range(self, images: torch.Tensor, names: Any = None) -> torch.Tensor:
        """Bring images to values between 0 and 1.

        Args:
            images: Shape ``(B, 3, H, W)``, 1 being the highest value that the file can hold.
            names: The images' paths, for an error.

        Raises:
            CflowError: If a value has more bits than the model was trained on.
        """
        if self.gain == 1:
            return images
        images = images * self.gain
        if not torch.compiler.is_compiling() and images.numel() and images.max() > _ROUNDING:
            peaks = images.amax(dim=(-3, -2, -1)).reshape(-1)
            which = f"{names[int(peaks.argmax())]} has" if names else "An image has"
            limit = round((2**16 - 1) / self.gain)
            message = (
                f"{which} values up to {round(float(peaks.max()) * limit)}, but the model was trained on images of "
                f"{self.bits} bits, which end at {limit}: give images as the camera delivered them then, or train with "
                "--model.bits 16."
            )
            raise CflowError(message)
        return images

    @classmethod
    def of(
        cls, size: tuple[int, int], mean: Sequence[float], std: Sequence[float], interpolation: str = "bilinear"
    ) -> "CflowPreProcessor":
        """Resize and normalise.

        Args:
            size: Height and width in pixels.
            mean: Mean of each colour, of values between 0 and 1.
            std: Standard deviation of each colour.
            interpolation: ``bilinear`` or ``bicubic``; both smooth what they reduce.
        """
        resize = Resize(size, InterpolationMode(interpolation), antialias=True)
        return cls(Compose([resize, Normalize(list(mean), list(std))]))

    def forward(self, batch: torch.Tensor) -> torch.Tensor:
        """Transform images ``(B, 3, H, W)``."""
        batch = self.to_full_range(batch)
        return self.transform(batch) if self.transform else batch

    # What Lightning calls before the model sees a batch

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Batch, *args: Any, **kwargs: Any
    ) -> None:
        """Bring images to the full range, and transform them."""
        super().on_train_batch_start(trainer, pl_module, self._in_full_range(batch), *args, **kwargs)

    def on_validation_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Batch, *args: Any, **kwargs: Any
    ) -> None:
        """Bring images to the full range, and transform them."""
        super().on_validation_batch_start(trainer, pl_module, self._in_full_range(batch), *args, **kwargs)

    def on_test_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Batch, *args: Any, **kwargs: Any
    ) -> None:
        """Bring images to the full range, and transform them."""
        super().on_test_batch_start(trainer, pl_module, self._in_full_range(batch), *args, **kwargs)

    def on_predict_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Batch, *args: Any, **kwargs: Any
    ) -> None:
        """Bring images to the full range, and transform them."""
        super().on_predict_batch_start(trainer, pl_module, self._in_full_range(batch), *args, **kwargs)

    def _in_full_range(self, batch: AnyBatch) -> AnyBatch:
        if isinstance(batch.image, torch.Tensor):  # feature vectors come in batches without
            batch.image = self.to_full_range(batch.image, getattr(batch, "image_path", None))
        return batch

    # Checkpoints

    def checkpoint_config(self) -> dict[str, Any]:
        """Settings to keep in a checkpoint, the number of bits among them."""
        return {**super().checkpoint_config(), "bits": self.bits}

    def load_checkpoint_config(self, config: dict[str, Any]) -> None:
        """Take over a checkpoint's settings.

        Args:
            config: What :meth:`checkpoint_config` returned.
        """
        super().load_checkpoint_config(config)
        self.bits = config.get("bits")
