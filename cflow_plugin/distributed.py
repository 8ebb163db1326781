"""What several processes (Lightning's DDP) have to agree on: one folder and log, and each test image scored once."""

__all__ = ["let_first_process_speak", "score_every_image_once", "share_of_batch", "share_results_folder"]

import logging
import os
from contextlib import suppress
from copy import copy
from pathlib import Path

from lightning import Trainer
from lightning.pytorch.overrides.distributed import UnrepeatedDistributedSampler
from torch.utils.data import DataLoader

from cflow_plugin.feature_bank import VectorBatch


def let_first_process_speak(trainer: Trainer) -> None:
    """Keep the other processes from logging the same once more; their errors end the run as before.

    Args:
        trainer: The trainer, being set up.
    """
    if not trainer.is_global_zero:
        logging.getLogger(__package__).setLevel(logging.ERROR)


def share_results_folder(trainer: Trainer) -> None:
    """Let all processes write where the first one does.

    anomalib numbers a run's folder in each process by itself, so the second process would write into a folder of its
    own, and `latest` would point to it.

    Args:
        trainer: The trainer; every process has to call this.
    """
    if trainer.world_size == 1:
        return
    own = Path(trainer.default_root_dir).resolve()
    shared = Path(trainer.strategy.broadcast(str(own)))
    trainer.strategy.barrier()
    if own != shared:
        with suppress(OSError):  # not empty, or not there
            own.rmdir()
        trainer._default_root_dir = str(shared)  # noqa: SLF001  what every later folder is derived from
    trainer.strategy.barrier()
    latest = shared.parent / "latest"
    if trainer.is_global_zero and latest.is_symlink() and latest.resolve() != shared:
        partial = latest.with_name(".latest")
        partial.unlink(missing_ok=True)
        partial.symlink_to(shared.name, target_is_directory=True)
        os.replace(partial, latest)


def score_every_image_once(trainer: Trainer, stage: str) -> None:
    """Split the images of validation and test among the processes without repeating any.

    Lightning fills up the last process's share with images that others have as well, which would count twice in every
    threshold and metric.

    Args:
        trainer: The trainer, being set up.
        stage: ``fit``, ``validate`` or ``test``.
    """
    loops = {"fit": trainer.fit_loop.epoch_loop.val_loop, "validate": trainer.validate_loop, "test": trainer.test_loop}
    if trainer.world_size == 1 or stage not in loops:
        return
    # Shares may differ by an image. DistributedDataParallel would wait for the missing one to broadcast its buffers,
    # which nobody needs: each process computes the same ones.
    getattr(trainer.strategy, "_ddp_kwargs", {}).setdefault("broadcast_buffers", False)
    loop = loops[stage]
    loader = copy(loop._data_source).dataloader()  # noqa: SLF001
    if not isinstance(loader, DataLoader) or len(loader.dataset) < trainer.world_size:
        return
    sampler = UnrepeatedDistributedSampler(
        loader.dataset, num_replicas=trainer.world_size, rank=trainer.global_rank, shuffle=False
    )
    loop._data_source = copy(loop._data_source)  # noqa: SLF001
    loop._data_source.instance = DataLoader(  # noqa: SLF001
        loader.dataset,
        batch_size=loader.batch_size,
        sampler=sampler,
        num_workers=loader.num_workers,
        collate_fn=loader.collate_fn,
    )


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
        weight=len(range(rank, images, processes)) * processes / images,
    )
