"""Time candidates in alternating rounds, and weigh them."""

__all__ = ["benchmark"]

import itertools
import logging
import multiprocessing
import statistics
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from anomalib.models.components import AnomalibModule
from rich.console import Console
from rich.progress import track

from cflow_plugin.commands.benchmark.candidates import (
    Candidate,
    EncoderAlone,
    Model,
    Precision,
    Runtime,
    UnavailableError,
    build_model,
    export_model,
    load,
    unavailable,
)
from cflow_plugin.commands.benchmark.report import left_out, print_fast_enough, print_table, write_report
from cflow_plugin.commands.machine import describe_machine, peak_resident_bytes
from cflow_plugin.errors import CflowError


def benchmark(
    models: list[Model] = ["CflowPlugin", "encoder", "Cflow", "Padim"],  # noqa: B006  shown in --help
    backbones: list[str] = ["resnet18"],  # noqa: B006
    sizes: list[int] = [256],  # noqa: B006
    batch_sizes: list[int] = [1],  # noqa: B006
    runtimes: list[Runtime] = ["torch", "openvino"],  # noqa: B006
    precisions: list[Precision] = ["f32"],  # noqa: B006
    threads: int = 2,
    rounds: int = 5,
    seconds: float = 2.0,
    for_fps: float | None = None,
    output: Path = Path("results/benchmarks/speed"),
) -> None:
    """Measure latency, throughput, memory, size and export time of models on this machine.

    All combinations of what is named are timed. They take turns in every round, so that a machine that slows down
    slows all of them. Models have random weights: speed does not depend on their values. Images are given to the whole
    model, pre- and post-processing included, at the model's own size. Results go to the screen and, as Markdown, CSV,
    JSON and a plot, to the output folder, with the paper's Table 6 beside them.

    Args:
        models: CflowPlugin; the encoder alone; anomalib's Cflow and Padim; Spade.
        backbones: timm names of encoders; the paper's are resnet18, wide_resnet50_2 and mobilenetv3_large_100.
        sizes: Heights (and widths) of the images in pixels.
        batch_sizes: Images at once.
        runtimes: What executes the model. Devices that are not there are named and left out.
        precisions: What to compute in; int8-bf16 is INT8 with the rest in bf16 instead of f32. What was executed in the
            end is shown; a runtime may know better.
        threads: Threads on a CPU.
        rounds: How often each combination has its turn.
        seconds: Length of a turn; a turn is at least three runs.
        for_fps: Also say which of the settings of CflowPlugin are fast enough for so many images a second, the most
            accurate first.
        output: Folder for the results.
    """
    if threads < 1 or rounds < 1 or not seconds > 0:
        message = "threads, rounds and seconds must be above 0."
        raise CflowError(message)
    torch.set_num_threads(threads)
    console = Console()
    machine = describe_machine(threads)
    console.print(f"{machine['processor']}, {threads} threads; " + ", ".join(machine["versions"].values()))
    wanted = [
        Candidate(*values) for values in itertools.product(models, backbones, sizes, batch_sizes, runtimes, precisions)
    ]
    skipped: dict[str, list[str]] = {}
    with tempfile.TemporaryDirectory(prefix="cflow-plugin-") as folder:
        prepared = _prepare(wanted, Path(folder), threads, skipped)
        rows = _measure(prepared, threads, rounds, seconds)
    for line in left_out(skipped):
        console.print(line, soft_wrap=True)
    if not rows:
        message = "Nothing of what was asked for can be timed on this machine."
        raise CflowError(message)
    report = {"machine": machine, "rounds": rounds, "seconds": seconds, "rows": rows, "left_out": skipped}
    print_table(rows, console)
    if for_fps is not None:
        print_fast_enough(rows, for_fps, console)
    write_report(report, output)
    console.print(f"Results are in {output.resolve()}.", soft_wrap=True)


def _prepare(
    wanted: list[Candidate], folder: Path, threads: int, skipped: dict[str, list[str]]
) -> list[tuple[Candidate, dict]]:
    """Export what is needed, and find each candidate's size and peak memory."""
    files: dict[tuple, tuple[Path, float]] = {}
    prepared = []
    build = lru_cache(maxsize=1)(build_model)  # the next candidate is mostly of the same
    for candidate in track(wanted, description="Preparing", transient=True):
        reason = unavailable(candidate)
        if reason is None:
            try:
                model = build(candidate.model, candidate.backbone, candidate.size)
                facts = _export_once(candidate, model, folder, files)
                facts |= _in_own_process(_alone, candidate, facts.pop("source"), threads)
                prepared.append((candidate, facts))
            except (UnavailableError, CflowError, BrokenProcessPool) as error:
                reason = str(error) or "its process died, probably for lack of memory"
        if reason is not None:
            skipped.setdefault(reason, []).append(str(candidate))
    return [(candidate, {**facts, "source": _source(candidate, files)}) for candidate, facts in prepared]


def _source(candidate: Candidate, files: dict[tuple, tuple[Path, float]]) -> Path | None:
    """The candidate's file, or nothing where torch runs the model itself."""
    return None if candidate.runtime.startswith("torch") else files[candidate.file_key][0]


def _export_once(
    candidate: Candidate, model: AnomalibModule | EncoderAlone, folder: Path, files: dict[tuple, tuple[Path, float]]
) -> dict:
    """Export unless another candidate has done so; size in parameters and on disk, in MB."""
    # Batch norm's statistics and Padim's covariances are parameters, too, by the paper's count.
    tensors = [tensor for tensor in (*model.parameters(), *model.buffers()) if tensor.is_floating_point()]
    facts: dict = {"parameters_mb": sum(tensor.numel() for tensor in tensors) * 4 / 1e6, "source": None}
    if not candidate.runtime.startswith("torch"):
        if candidate.file_key not in files:
            # Of a name of its own: a failed export leaves its folder behind.
            files[candidate.file_key] = export_model(model, candidate, Path(tempfile.mkdtemp(dir=folder)))
        path, seconds = files[candidate.file_key]
        facts["file_mb"] = sum(part.stat().st_size for part in path.parent.glob(f"{path.stem}*")) / 1e6
        facts["export_seconds"] = seconds
        facts["source"] = path
    return facts


def _in_own_process(function: Callable[..., dict], *arguments: object) -> dict:
    # A server imports everything once, and does nothing else that could be in its copies' memory.
    ways = multiprocessing.get_all_start_methods()
    context = multiprocessing.get_context("forkserver" if "forkserver" in ways else "spawn")
    context.set_forkserver_preload([__name__])
    with ProcessPoolExecutor(max_workers=1, mp_context=context) as executor:
        return executor.submit(function, *arguments).result()


def _alone(candidate: Candidate, source: Path | None, threads: int) -> dict:
    """Peak resident memory in MB of a process that only loads and runs the candidate, and how long that compiled."""
    torch.set_num_threads(threads)
    logging.disable(logging.WARNING)
    loaded = load(candidate, source or build_model(candidate.model, candidate.backbone, candidate.size), threads)
    for _ in range(3):
        loaded.run()
    compiled = {} if loaded.seconds is None else {"export_seconds": loaded.seconds}
    return {"peak_memory_mb": peak_resident_bytes() / 1e6, **compiled}


def _measure(prepared: list[tuple[Candidate, dict]], threads: int, rounds: int, seconds: float) -> list[dict]:
    """Latency and throughput of each candidate, in alternating rounds."""
    loaded = [
        load(candidate, facts["source"] or build_model(candidate.model, candidate.backbone, candidate.size), threads)
        for candidate, facts in prepared
    ]
    times: list[list[float]] = [[] for _ in prepared]
    rates: list[list[float]] = [[] for _ in prepared]
    for one in loaded:
        for _ in range(3):
            one.run()
    for _ in track(range(rounds), description="Timing", transient=True):
        for index, one in enumerate(loaded):
            end = time.perf_counter() + seconds
            count = 0
            while count < 3 or time.perf_counter() < end:
                start = time.perf_counter()
                one.run()
                times[index].append(time.perf_counter() - start)
                count += 1
            if one.queue is not None:
                count = max(3, round(seconds / statistics.median(times[index])))
                start = time.perf_counter()
                one.queue(count)
                rates[index].append(count / (time.perf_counter() - start))
    rows = []
    for (candidate, facts), one, spent, rate in zip(prepared, loaded, times, rates, strict=True):
        p50, p90, p99 = np.percentile(spent, [50, 90, 99])
        rows.append(
            {
                **asdict(candidate),
                "executed": one.executed,
                "p50_ms": 1000 * p50,
                "p90_ms": 1000 * p90,
                "p99_ms": 1000 * p99,
                "fps": candidate.batch / p50,
                "fps_throughput": candidate.batch * statistics.median(rate) if rate else None,
                "runs": len(spent),
                **{key: value for key, value in facts.items() if key != "source"},
            }
        )
    return rows
