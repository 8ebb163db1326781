"""An epoch's batches of feature vectors, in the place of the loader of images."""

__all__ = ["TrainOnVectors", "VectorLoader", "is_random", "unseen_images"]

import logging
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from lightning import LightningModule, Trainer
from torch.utils.data import DataLoader
from torchvision.transforms.v2 import Compose, Identity, Normalize, Resize, Transform

from cflow_plugin.errors import CflowError
from cflow_plugin.images.loading import data_module_of, images_in, loader_of
from cflow_plugin.model.scoring import cells_inside
from cflow_plugin.training.camera import feature_changes
from cflow_plugin.training.distributed import share_of_batch
from cflow_plugin.training.feature_bank import FeatureBank, VectorBatch
from cflow_plugin.training.loader_replacement import LoaderReplacement

logger = logging.getLogger(__name__)

# With fewer images, a whole one that is not trained on costs more than it tells.
_FEWEST_IMAGES = 8
# Tens of thousands of cells: the rarest of a thousand is known well.
_ENOUGH_UNSEEN = 32


class TrainOnVectors(LoaderReplacement):
    """Lets a trainer iterate over feature vectors where the data module gives images.

    Args:
        make_loader: Makes the loader of vectors out of the data module's loader of images, once a run.
    """

    def __init__(self, make_loader: Callable[[DataLoader[Any]], "VectorLoader"]) -> None:
        super().__init__()
        self._make_loader = make_loader
        self._loader: VectorLoader | None = None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Replace the data module's training loader.

        Raises:
            CflowError: If there is no data module.
        """
        if stage != "fit":
            return
        data = data_module_of(trainer)
        if data is None:
            msg = (
                f"{type(pl_module).__name__} trains on a data module's images, and no other loader: pass "
                "datamodule=..., for example anomalib.data.Folder(...)."
            )
            raise CflowError(msg)
        self._loader = None
        self.replace(data, "train_dataloader", self._once)

    def _once(self, images: DataLoader[Any]) -> "VectorLoader":
        if self._loader is None:
            self._loader = self._make_loader(images)
        return self._loader


class VectorLoader:
    """Batches of feature vectors of a loader's images.

    The features are computed in the first epoch, and again in each if the images are augmented at random. Where memory
    does not hold all, they are computed again, at other positions, when about all that are there have been taken.

    Args:
        images: Loader of the images to train on.
        extract: Images ``(B, 3, H, W)`` as they are loaded to features ``(B, D_k, H_k, W_k)`` at every scale.
        prepare: Is shown the features before the first batch is drawn from them.
        epoch: Tells the number of the epoch.
        steps: Batches in an epoch; ``None`` for as many as one pass over all feature vectors takes.
        vectors_per_step: Vectors of the finest scale in a batch; coarser ones have their share.
        with_noise: Draw noise as well.
        seed: The same seed and epoch give the same batches.
        unseen_share: Share of the images that are not trained on, see :func:`unseen_images`.
        rank: Number of this process.
        processes: How many there are; each gets its part of every batch.
        interest: Which pixels are looked at, ``(H, W)`` bool.
        one_by_one: Whether images are so large that no two should be in memory.
    """

    def __init__(
        self,
        images: DataLoader[Any],
        extract: Callable[[torch.Tensor], Sequence[torch.Tensor]],
        prepare: Callable[[FeatureBank], None],
        epoch: Callable[[], int],
        *,
        steps: int | None,
        vectors_per_step: int,
        with_noise: bool,
        seed: int,
        unseen_share: float = 0.0,
        rank: int = 0,
        processes: int = 1,
        interest: torch.Tensor | None = None,
        one_by_one: bool = False,
    ) -> None:
        self.images = loader_of(images.dataset, like=images, batch_size=1) if one_by_one else images
        self._interest = torch.ones(1, 1, dtype=torch.bool) if interest is None else interest
        self.seed = seed
        self.bank: FeatureBank | None = None
        self._extract = extract
        self._prepare = prepare
        self._epoch = epoch
        self._steps = steps
        self._vectors_per_step = vectors_per_step
        self._with_noise = with_noise
        self._unseen = unseen_images(images_in(images), unseen_share)
        self._rank = rank
        self._processes = processes

    def __len__(self) -> int:
        """Number of batches in an epoch."""
        if self._steps is None:
            first = next(iter(loader_of(self.images.dataset, like=self.images, sampler=[0], batch_size=1)))
            cells = self._extract(first.image)[0].shape[-2:].numel()
            self._steps = max(1, (images_in(self.images) - self._unseen) * cells // self._vectors_per_step)
        return self._steps

    def __iter__(self) -> Iterator[VectorBatch]:
        """Draw one epoch's batches."""
        changes = is_random(getattr(self.images.dataset, "augmentations", None))
        if self.bank is None or self.bank.is_due or changes:
            self.bank = None  # two at once may be more than the memory holds
            generator = torch.Generator().manual_seed(self.seed)
            with torch.random.fork_rng(devices=[]):
                # Augmentations draw from torch's own generator, whose state a checkpoint does not hold.
                torch.default_generator.manual_seed(self.seed + self._epoch())
                self.bank = fill_bank(
                    self.images, self._extract, self._unseen, generator, self._turn_of, self._interest
                )
        self._prepare(self.bank)
        cells = [height * width for height, width in self.bank.sizes]
        vectors = [max(1, self._vectors_per_step * count // cells[0]) for count in cells]
        generator = torch.Generator().manual_seed(self.seed + 1 + self._epoch())
        for batch in self.bank.batches(len(self), vectors, generator, self._with_noise):
            yield share_of_batch(batch, self._rank, self._processes)

    def changes(self, size: tuple[int, int], strength: float, gain: float) -> list[torch.Tensor] | None:
        """What a worse camera changes in the features, see :func:`~cflow_plugin.training.camera.feature_changes`.

        Args:
            size: Height and width that the model resizes images to.
            strength: The changes are multiplied by it; 0 gives none.
            gain: What images are multiplied by.
        """
        if not strength:
            return None
        return [strength * part for part in feature_changes(self.images, self._extract, size, self.seed, gain)]

    def _turn_of(self, vectors_kept: int) -> int:
        """Whose turn it is in this epoch, for a resumed run as well."""
        return int(self._epoch() * min(1.0, len(self) * self._vectors_per_step / vectors_kept))


@torch.no_grad()
def fill_bank(
    images: DataLoader[Any],
    extract: Callable[[torch.Tensor], Sequence[torch.Tensor]],
    unseen: int,
    generator: torch.Generator,
    turn_of: Callable[[int], int],
    interest: torch.Tensor,
) -> FeatureBank:
    """Compute the features of all images.

    Args:
        images: Loader of images.
        extract: See :class:`VectorLoader`.
        unseen: How many of the images are not to be trained on.
        generator: Chooses them, and positions where memory does not hold all.
        turn_of: See :class:`FeatureBank`.
        interest: Which pixels are looked at, ``(H, W)`` bool.

    Raises:
        CflowError: If there is no image, or a feature is not finite.
    """
    count = images_in(images)
    logger.info("Extracting the features of %d training images.", count)
    if unseen:
        logger.info("%d of them are not trained on: they say how likely good cells are.", unseen)
    bank = None
    # The loader anew, unshuffled: the bank's order, and with it a resumed run, must not depend on earlier draws.
    for batch in loader_of(images.dataset, like=images):
        pyramid = extract(batch.image)
        if any(not torch.isfinite(features).all() for features in pyramid):
            msg = "The training features hold NaN or infinite values: check the training images and encoder weights."
            raise CflowError(msg)
        if bank is None:
            sizes = [(part.shape[-2], part.shape[-1]) for part in pyramid]
            cells = [cells_inside(interest, size) for size in sizes]
            bank = FeatureBank(sizes, count, unseen, generator, turn_of, cells)
        bank.add(pyramid)
    if bank is None:
        msg = "There is no training image; check --data.root and --data.category."
        raise CflowError(msg)
    if bank.share < 1:
        logger.info("Memory holds %.2g %% of the positions; others will have their turn.", 100 * bank.share)
    return bank


def unseen_images(images: int, share: float) -> int:
    """How many images vouch for the others, which are trained on.

    None of a few, where each is needed; and never more than say enough.

    Args:
        images: How many there are.
        share: Share that is asked for.

    Example:
        >>> [unseen_images(images, 0.1) for images in (4, 8, 30, 1000)]
        [0, 1, 3, 32]
    """
    if images < _FEWEST_IMAGES or not share:
        return 0
    return min(_ENOUGH_UNSEEN, images // 2, max(1, round(share * images)))


def is_random(augmentations: Transform | Any | None) -> bool:
    """Whether the same image may come out differently in another epoch.

    Args:
        augmentations: A data set's augmentations, or ``None``.

    Example:
        >>> from torchvision.transforms.v2 import RandomRotation
        >>> is_random(Compose([Resize((64, 64)), RandomRotation(5)]))
        True
    """
    if augmentations is None:
        return False
    parts = augmentations.transforms if isinstance(augmentations, Compose) else [augmentations]
    return not all(isinstance(part, Resize | Normalize | Identity) for part in parts)
