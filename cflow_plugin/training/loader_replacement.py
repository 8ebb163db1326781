"""Other loaders than the data module's own, for as long as a run lasts."""

__all__ = ["LoaderReplacement"]

from collections.abc import Callable
from typing import Any

from lightning import LightningDataModule, LightningModule, Trainer
from lightning.pytorch.callbacks import Callback


class LoaderReplacement(Callback):
    """A callback that exchanges what a data module's ``train_dataloader()`` and the like return.

    Lightning asks the data module by these names whenever it needs a loader. An attribute of the object hides the
    method of its class, and is taken away when the run ends, however it ends.
    """

    def __init__(self) -> None:
        self._replaced: list[tuple[LightningDataModule, str, Any]] = []

    def replace(self, data: LightningDataModule, name: str, change: Callable[[Any], Any]) -> None:
        """Let a data module return something else.

        Args:
            data: The data module.
            name: Name of its method.
            change: Makes, of what the method returns, what is to be returned instead.
        """
        own = vars(data).get(name)  # an attribute that hides the method already, of the user's
        original = getattr(data, name)

        def changed() -> Any:
            return change(original())

        setattr(data, name, changed)
        self._replaced.append((data, name, own))

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Give the data module its own loaders back."""
        del trainer, pl_module, stage
        while self._replaced:
            data, name, own = self._replaced.pop()
            if own is None:
                delattr(data, name)
            else:
                setattr(data, name, own)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Give them back, too, where the run ends in an error."""
        del exception
        self.teardown(trainer, pl_module, "")
