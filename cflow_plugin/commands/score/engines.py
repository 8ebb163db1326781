"""Where batches are scored: in this process, or by the workers of a Ray cluster."""

__all__ = ["Done", "score_here", "score_on_ray"]

import logging
from collections.abc import Iterator
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
import pyarrow.parquet as pq

from cflow_plugin.commands.cluster import cluster_slots, connected, why_failed
from cflow_plugin.commands.score.parts import ScoreTable
from cflow_plugin.commands.score.scorer import Scorer, Settings
from cflow_plugin.errors import CflowError

_MOST_BLOCKS = 5000


class Done(NamedTuple):
    """A batch whose part is written: its number of images, and how many of them have an error."""

    images: int
    errors: int


def score_here(batches: list[list[str]], parts: ScoreTable, settings: Settings) -> Iterator[Done]:
    """Score batches in this process.

    Args:
        batches: Paths.
        parts: Where rows go.
        settings: How images are scored.
    """
    scorer = Scorer(settings)
    try:
        for batch in batches:
            rows = scorer(batch)
            parts.write(batch, rows)
            yield Done(len(rows), sum(row.error is not None for row in rows))
    finally:
        scorer.close()


class _Worker:
    """A process of the cluster that holds the compiled model."""

    def __init__(self, parts: ScoreTable, settings: Settings) -> None:
        self.parts = parts
        self.score = Scorer(settings)

    def __call__(self, rows: dict[str, Any]) -> dict[str, Any]:
        """Score one batch and write its part, unless this task is a repetition and the part is there."""
        batch = list(rows["paths"][0])
        file = self.parts.file(batch)
        if file.exists():
            errors = len(batch) - pq.read_table(file, columns=["error"]).column("error").null_count
        else:
            scored = self.score(batch)
            self.parts.write(batch, scored)
            errors = sum(row.error is not None for row in scored)
        return {"images": np.array([len(batch)]), "errors": np.array([errors])}


def score_on_ray(
    batches: list[list[str]], parts: ScoreTable, settings: Settings, address: str | None, workers: int | None
) -> Iterator[Done]:
    """Score batches in a pool of Ray actors.

    A batch travels as its paths alone; its images are read and its part is written by the worker, so all machines must
    see the same files. What a lost machine had begun is done again by another one, and since a part's name depends on
    nothing but its paths, that duplicates nothing.

    Args:
        batches: Paths.
        parts: Where rows go.
        settings: How images are scored; ``threads`` is of a worker.
        address: The cluster, see :func:`cflow_plugin.commands.cluster.connected`.
        workers: Most workers; by default as many as there are CPUs for.

    Raises:
        CflowError: If Ray or the cluster is absent, or workers fail for another reason than an image.
    """
    threads = settings.threads or 1
    with connected(address, cpus=None if workers is None else workers * threads) as ray:
        context = ray.data.DataContext.get_current()
        context.enable_progress_bars = False
        logging.getLogger("ray.data").setLevel(logging.CRITICAL)
        fit = cluster_slots(ray, threads)
        most = fit if workers is None else workers
        blocks = min(len(batches), _MOST_BLOCKS)
        items = ray.data.from_items([{"paths": batch} for batch in batches], override_num_blocks=blocks)
        # The pool may shrink to one worker: a machine that is lost takes its share of workers with it.
        scored = items.map_batches(
            _Worker,
            fn_constructor_args=(parts, replace(settings, threads=threads)),
            batch_size=1,
            num_cpus=threads,
            compute=ray.data.ActorPoolStrategy(min_size=1, max_size=most),
        )
        try:
            for row in scored.iter_rows():
                yield Done(row["images"], row["errors"])
        except (ray.exceptions.RayError, RuntimeError) as error:
            raise CflowError(why_failed(error)) from error
