"""A data module's resizing, brought in line with a model that has changed its image size.

- What: calls ``AnomalibDataModule._update_augmentations``.
- Why: anomalib 2.7 lets a data module resize images as the model's pre-processor does, and reads the size when the
  data are set up. A checkpoint that is restored afterwards may bring another size.
- Since: anomalib 2.1.
- Upstream: to be asked for: a public name for the method. No report is known.
- Can go: when there is one, or when ``setup`` may be called again.
"""

__all__ = ["resize_as_model_does"]

from anomalib.data import AnomalibDataModule


def resize_as_model_does(data: AnomalibDataModule) -> None:
    """Let a data module that is set up resize to the size that its trainer's model has now.

    Args:
        data: The data module, attached to a trainer.
    """
    data._update_augmentations()  # noqa: SLF001
