"""One folder of results for all processes of a run.

- What: sets Lightning's ``Trainer._default_root_dir`` in all processes but the first.
- Why: anomalib 2.7 numbers a run's folder (``v0``, ``v1``, …) in each process by itself, so under DDP the second
  process writes into a folder of its own, and ``latest`` points to it. ``default_root_dir`` has no setter.
- Since: anomalib 1.0, Lightning 2.0.
- Upstream: to be reported to anomalib: number the folder in the first process. No report is known.
- Can go: when anomalib's ``Engine`` gives all processes the same folder.
"""

__all__ = ["share_results_folder"]

from contextlib import suppress
from pathlib import Path

from lightning import Trainer


def share_results_folder(trainer: Trainer) -> None:
    """Let all processes write where the first one does.

    Args:
        trainer: The trainer, being set up; every process has to call this.
    """
    if trainer.world_size == 1:
        return
    own = Path(trainer.default_root_dir).resolve()
    shared = Path(trainer.strategy.broadcast(str(own)))
    trainer.strategy.barrier()
    if own != shared:
        with suppress(OSError):  # not empty, or not there
            own.rmdir()
        # What every later folder is derived from.
        trainer._default_root_dir = str(shared)  # noqa: SLF001  # pyright: ignore[reportAttributeAccessIssue]
    trainer.strategy.barrier()
    latest = shared.parent / "latest"
    if trainer.is_global_zero and latest.is_symlink() and latest.resolve() != shared:
        partial = latest.with_name(".latest")
        partial.unlink(missing_ok=True)
        partial.symlink_to(shared.name, target_is_directory=True)
        partial.replace(latest)
