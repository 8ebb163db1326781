"""What several processes (Lightning's DDP) have to agree on: who speaks, and who trains on and scores which images."""

__all__ = ["ScoreEveryImageOnce", "join_processes", "share_of_batch"]

import logging
from itertools import count
from typing import Any

from lightning import LightningModule, Trainer
from lightning.pytorch.overrides.distributed import UnrepeatedDistributedSampler
from torch.utils.data import DataLoader

from cflow_plugin.anomalib_patches.results_folder import share_results_folder
from cflow_plugin.images.loading import data_module_of, images_in, loader_of
from cflow_plugin.training.feature_bank import VectorBatch
from cflow_plugin.training.loader_replacement import LoaderReplacement


def join_processes(trainer: Trainer) -> None:
    """Let all processes write into one folder, and only the first one log; errors of others end the run as before.

    Args:
        trainer: The trainer, being set up; every process has to call this.
    """
    share_results_folder(trainer)
    if not trainer.is_global_zero:
        logging.getLogger("cflow_plugin").setLevel(logging.ERROR)


class ScoreEveryImageOnce(LoaderReplacement):
    """Splits the images of validation and test among the processes without repeating any.

    An image that two processes have would count twice in every threshold and metric.
    """

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Replace the data module's loaders."""
        del pl_module
        data = data_module_of(trainer)
        name = {"fit": "val_dataloader", "validate": "val_dataloader", "test": "test_dataloader"}.get(stage)
        if data is None or name is None or trainer.world_size == 1:
            return
        self.replace(data, name, lambda loader: _share_of(loader, trainer.global_rank, trainer.world_size))


def _share_of(loader: Any, rank: int, processes: int) -> Any:
    if not isinstance(loader, DataLoader) or images_in(loader) < processes:
        return loader
    batch_size = equal_batches(images_in(loader), processes, loader.batch_size or 1)
    share = UnrepeatedDistributedSampler(loader.dataset, processes, rank, shuffle=False)
    return loader_of(loader.dataset, loader, share, batch_size)


def equal_batches(images: int, processes: int, batch_size: int) -> int:
    """A batch size, not below the one asked for, with which all processes have equally many batches.

    Shares may differ by an image. A process with a batch more than the others would wait for them for ever.

    Args:
        images: Number of images.
        processes: Number of processes, at most as many.
        batch_size: Batch size asked for.

    Example:
        >>> equal_batches(33, 2, 16)
        17
    """
    smaller = images // processes
    if images % processes == 0:
        return batch_size
    return next(size for size in count(batch_size) if smaller % size)


def share_of_batch(batch: VectorBatch, rank: int, processes: int) -> VectorBatch:
    """The part of a batch that one process trains on.

    All processes draw the same batch. The mean of their gradients is then that of a single process, once each has
    multiplied its own by the weight of its part: parts of 7 images in 2 processes are not of one size.

    Args:
        batch: Vectors of N images, ``(N, P_k, D_k)`` for each scale.
        rank: Number of the process.
        processes: How many there are.
    """
    images = len(batch.vectors[0])
    if processes == 1 or images < processes:
        return batch
    return VectorBatch(
        [vectors[rank::processes] for vectors in batch.vectors],
        batch.positions,
        [None if noise is None else noise[rank::processes] for noise in batch.noise],
        batch.sizes,
        weight=len(range(rank, images, processes)) * processes / images,
    )
