"""Cells of a comparison as tasks of a Ray cluster."""

__all__ = ["run_on_ray"]

import logging
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from cflow_plugin.commands.cluster import cluster_slots, connected, why_failed
from cflow_plugin.commands.compare.cell import Cell, Job, run_cell

logger = logging.getLogger(__name__)

_RETRIES = 3  # of a cell whose worker or machine died


def run_on_ray(cells: list[Cell], job: Job, address: str | None) -> Iterator[tuple[Cell, dict[str, Any] | str]]:
    """Run as many cells at once as the cluster has CPUs for, each in a process of its own.

    A cell whose worker or machine dies is run again elsewhere; a cell that fails is not. Results are gathered here, so
    a cell that ran twice has one row all the same.

    Args:
        cells: What to run.
        job: Where and how.
        address: The cluster, see :func:`cflow_plugin.commands.cluster.connected`.

    Yields:
        Each cell as it ends, in any order, with its row of results, or why there is none.

    Raises:
        CflowError: If Ray or the cluster is absent.
    """
    with connected(address) as ray:
        cluster_slots(ray, job.threads)
        # A worker ends with its task: the next cell's peak memory is its own.
        task = ray.remote(num_cpus=job.threads, max_retries=_RETRIES, max_calls=1)(_run)
        running = {task.remote(cell, job, Path.cwd()): cell for cell in cells}
        while running:
            [finished], _ = ray.wait(list(running), num_returns=1)
            cell = running.pop(finished)
            try:
                yield cell, ray.get(finished)
            except ray.exceptions.RayError as error:  # one cell's failure must not cost the others
                logger.debug("A cell failed.", exc_info=True)
                yield cell, why_failed(error)


def _run(cell: Cell, job: Job, directory: Path) -> dict[str, Any]:
    from cflow_plugin.commands.machine import describe_machine

    os.chdir(directory)  # what relative paths of data and weights are relative to
    row = run_cell(cell, job)
    machine = describe_machine(job.threads)
    return {**row, "processor": machine["processor"], "versions": ", ".join(machine["versions"].values())}
