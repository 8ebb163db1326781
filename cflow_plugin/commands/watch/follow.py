"""A watch that goes on: images are scored as they arrive, and a restart goes on where the last run ended."""

__all__ = ["JOURNAL", "Following", "follow_source"]

import errno
import hashlib
import json
import logging
import math
import shutil
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import filelock
import numpy as np
from rich.progress import Progress

from cflow_plugin.commands.watch.arrivals import Arrival, Health, arrivals
from cflow_plugin.commands.watch.delivery import deliver, receivers_of
from cflow_plugin.commands.watch.journal import Journal, Result, ScoreTable
from cflow_plugin.commands.watch.overlay import overlay, set_aside, write_picture
from cflow_plugin.commands.watch.page import Live, start_page
from cflow_plugin.commands.watch.timeline import Smoother
from cflow_plugin.decisions.conformal import p_values
from cflow_plugin.decisions.reference_scores import read_reference_scores
from cflow_plugin.decisions.regions import Region, RegionSettings, find_regions
from cflow_plugin.deploy.runtime import ExportedModel, compile_exported
from cflow_plugin.errors import CflowError
from cflow_plugin.images.reading import ImageFileError, in_8_bits

logger = logging.getLogger(__name__)

JOURNAL = "journal.sqlite"
_HALF = 0.5  # where anomalib's normalisation of scores puts the threshold
_FULL = {errno.ENOSPC, errno.EDQUOT}
_AGAIN = 5.0  # seconds between two looks at a full disk
_FORGET = 10_000


@dataclass(frozen=True)
class Following:
    """What is followed, and what is done with the results; see :func:`~cflow_plugin.commands.watch.watch.watch`."""

    model: Path
    source: str
    output: Path
    overlays: bool = True
    device: str = "CPU"
    precision: str = "f32"
    limit: int | None = None
    smoothing: float = 0.0
    threshold: float | None = None
    sort: bool = False
    unsure: tuple[float, float] | None = None
    webhook: str | None = None
    mqtt: str | None = None
    page: int | None = None
    host: str = "127.0.0.1"


class Decider:
    """What is said of an image.

    Attributes:
        reference: Scores of the reference images, ascending, or ``None``.
    """

    def __init__(self, settings: Following) -> None:
        self.reference = read_reference_scores(settings.model)
        self._unsure, self._threshold = settings.unsure, settings.threshold
        self._smoother, self._smoothing = Smoother(settings.smoothing), settings.smoothing
        if settings.unsure is None:
            return
        if not 0 <= settings.unsure[0] <= settings.unsure[1] <= 1:
            message = f"--unsure is an interval of p-values between 0 and 1, as [0.01,0.1]; got {settings.unsure}."
            raise CflowError(message)
        if self.reference is None:
            message = (
                f"--unsure is an interval of p-values, and {settings.model} holds no reference scores: train with "
                "--model.target_false_alarm_rate."
            )
            raise CflowError(message)

    def __call__(
        self, arrival: Arrival, number: int, found: Any, spent: float, settings: RegionSettings
    ) -> tuple[Result, list[Region]]:
        """Put what a model gave into words.

        Args:
            arrival: The image.
            number: Number of the result.
            found: What the model gave for it.
            spent: Seconds that it took.
            settings: Which regions are shown.

        Returns:
            The result, and the image's regions.
        """
        assert isinstance(arrival.image, np.ndarray)
        score = float(found["pred_score"][0])
        if not math.isfinite(score):
            error = "its score is not a finite number"
            return Result(number, arrival.name, arrival.stamp, arrival.time, error=error), []
        smoothed = self._smoother(arrival.time, score)
        p_value = None if self.reference is None else float(p_values(score, self.reference))
        if self._threshold is None and self._smoothing == 0:
            anomalous, mask = bool(found["pred_label"][0]), found["pred_mask"][0, 0]
        else:
            anomalous = smoothed > (_HALF if self._threshold is None else self._threshold)
            mask = (found["anomaly_map"][0, 0] > _HALF) & anomalous
        size, where = arrival.image.shape[:2], found["anomaly_map"][0, 0]
        regions = find_regions(where, mask, settings, size) if mask.any() else []
        is_unsure = self._unsure and p_value is not None and self._unsure[0] <= p_value <= self._unsure[1]
        decision = "unsure" if is_unsure else "anomalous" if anomalous else "good"
        figures = (score, smoothed, p_value, anomalous, decision, 1000 * spent)
        text = json.dumps([region._asdict() for region in regions])
        return Result(number, arrival.name, arrival.stamp, arrival.time, *figures, regions=text), regions


class Copies:
    """Copies of images in folders by decision, each there once with its result, whenever the process is killed.

    A copy is written under a name of its own, then the result comes into the journal, and then the copy gets its place.

    Args:
        output: The folder of results; copies are below ``sorted``.
    """

    def __init__(self, output: Path) -> None:
        self._output, self._folder = output, output / "sorted"
        self._folder.mkdir(exist_ok=True)

    def prepare(self, result: Result, arrival: Arrival) -> Result:
        """Copy an image, not yet to its place; the result says where that is."""
        name = Path(arrival.name if arrival.path else f"{arrival.name}.png")
        target = self._folder / result.decision / name
        if target.exists():  # of another image that had this name
            target = target.with_stem(f"{target.stem}.{result.number}")
        if arrival.path or isinstance(arrival.image, ImageFileError):
            assert arrival.path is not None
            try:
                shutil.copyfile(arrival.path, self._partial(result.number))
            except FileNotFoundError:  # it was scored, and then it went away
                return result
        else:
            _, data = cv2.imencode(".png", arrival.image, [cv2.IMWRITE_PNG_COMPRESSION, 1])
            self._partial(result.number).write_bytes(data.tobytes())
        return result._replace(copy=target.relative_to(self._output).as_posix())

    def place(self, result: Result) -> None:
        """Give a copy its place."""
        if result.copy and self._partial(result.number).exists():
            target = self._output / result.copy
            target.parent.mkdir(parents=True, exist_ok=True)
            self._partial(result.number).replace(target)

    def recover(self, journal: Journal) -> None:
        """Finish what a killed run had begun."""
        for result in journal.after(journal.last - 1):
            self.place(result)
        for rest in self._folder.glob(".*.partial"):
            rest.unlink()

    def _partial(self, number: int) -> Path:
        return self._folder / f".{number}.partial"


def follow_source(settings: Following) -> None:
    """Score images as they arrive, until Ctrl-C, a signal to end, or ``limit``.

    Args:
        settings: What is followed.

    Raises:
        CflowError: If model, source or output cannot be used.
    """
    compiled = compile_exported(settings.model, settings.device, settings.precision)
    decider, health = Decider(settings), Health()
    output = settings.output
    with ExitStack() as stack:
        output.mkdir(parents=True, exist_ok=True)
        stack.enter_context(_alone(output))
        journal = Journal(output / JOURNAL)
        stack.callback(journal.close)
        table = _table(settings, journal)
        stack.callback(table.close)
        copies = Copies(output) if settings.sort else None
        if copies:
            copies.recover(journal)
        table.catch_up(journal)
        for receiver in receivers_of(settings.webhook, settings.mqtt, journal):
            stack.callback(deliver(receiver, output / JOURNAL, health).join)
        live = None
        if settings.page is not None:
            threshold = _HALF if settings.threshold is None else settings.threshold
            live = Live(decider.reference, compiled.bits, health, output / "review", threshold)
            start_page(live, settings.host, settings.page)
        stack.callback(health.ended.set)
        stack.enter_context(_ended_by_signal(health))
        images = arrivals(settings.source, compiled.bits, journal.knows, health, output)
        progress = stack.enter_context(Progress(transient=True))
        task = progress.add_task("Watching", total=settings.limit)
        if journal.last:
            logger.info("%d results are there already; this watch goes on from there.", journal.last)
        number = 0
        for number, arrival in enumerate(images, start=1):
            result, found, regions = _score(compiled, decider, arrival, journal.last + 1)
            if result.error:
                logger.warning("%s: %s.", result.image, result.error)
            _write(lambda: _keep(journal, table, copies, result, arrival), health)  # noqa: B023  called at once
            if found is not None and settings.overlays and result.decision != "good":
                shown = (regions, compiled.regions)
                _write(lambda: _write_overlay(output, result, arrival, found, compiled.bits, shown), health)  # noqa: B023
            if found is not None and live:
                live.add(result, arrival, found["anomaly_map"][0, 0], (regions, compiled.regions))
            health.scored += result.score is not None
            dropped = f", {health.dropped} frames dropped" if health.dropped else ""
            score = "" if result.smoothed is None else f", score {result.smoothed:.3f}"
            progress.update(task, advance=1, description=f"{health.scored} scored{score}{dropped}")
            if number % _FORGET == 0:
                journal.forget()
            if number == settings.limit:
                break
    lost = f", {health.lost} files went away before they could be scored" if health.lost else ""
    dropped = f", {health.dropped} frames dropped since the model is slower than the camera" if health.dropped else ""
    logger.info("%d images%s%s; results are in %s.", health.scored, dropped, lost, output.resolve())


def _score(
    compiled: ExportedModel, decider: Decider, arrival: Arrival, number: int
) -> tuple[Result, Any, list[Region]]:
    """The result of an image, what the model gave, and the regions in it."""
    if isinstance(arrival.image, ImageFileError):
        result = Result(number, arrival.name, arrival.stamp, arrival.time, error=arrival.image.reason)
        return result, None, []
    start = time.perf_counter()
    found = compiled([arrival.image[None]])
    result, regions = decider(arrival, number, found, time.perf_counter() - start, compiled.regions)
    return result, found if result.error is None else None, regions


def _keep(journal: Journal, table: ScoreTable, copies: Copies | None, result: Result, arrival: Arrival) -> None:
    """Keep a result; may be called again after a full disk, whatever had been done by then."""
    if journal.last < result.number:
        journal.add(copies.prepare(result, arrival) if copies else result)
    if copies:
        copies.place(journal.after(result.number - 1)[0])
    table.catch_up(journal)


def _write(action: Callable[[], None], health: Health) -> None:
    """Do something that writes, again and again while the disk is full."""
    while True:
        try:
            action()
        except OSError as error:
            if error.errno not in _FULL or health.ended.is_set():
                raise
            if "disk" not in health.receivers:
                logger.warning("The disk is full: nothing is scored until there is space; nothing is lost.")
            health.receivers["disk"] = "The disk is full: nothing is scored until there is space."
            health.ended.wait(_AGAIN)
        else:
            if health.receivers.pop("disk", None):
                logger.info("There is space again.")
            return


def _write_overlay(
    output: Path,
    result: Result,
    arrival: Arrival,
    found: Any,
    bits: int,
    regions: tuple[list[Region], RegionSettings],
) -> None:
    assert isinstance(arrival.image, np.ndarray)
    assert result.smoothed is not None
    seen = in_8_bits(arrival.image, bits)
    picture = overlay(seen, found["anomaly_map"][0, 0], result.smoothed, result.decision, regions)
    name = arrival.name if arrival.name.lower().endswith(".png") else f"{arrival.name}.png"
    write_picture(output / "overlays" / name, picture)


def _table(settings: Following, journal: Journal) -> ScoreTable:
    """The table of this model; that of another model is set aside."""
    model = hashlib.sha256(settings.model.read_bytes()).hexdigest()
    path = settings.output / "scores.csv"
    if journal.note("model") != model:
        set_aside(path)
        journal.keep("table begins after", str(journal.last))
        journal.keep("model", model)
    return ScoreTable(path, int(journal.note("table begins after") or 0))


@contextmanager
def _alone(output: Path) -> Iterator[None]:
    """Keep other runs out."""
    try:
        with filelock.FileLock(output / ".lock", timeout=0):
            yield
    except filelock.Timeout as error:
        message = f"Another watch is writing into {output}; wait for its end, or choose another --output."
        raise CflowError(message) from error


@contextmanager
def _ended_by_signal(health: Health) -> Iterator[None]:
    """End after the image at hand when Ctrl-C is pressed or the system asks for it; a second Ctrl-C ends at once."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def end(number: int, frame: Any) -> None:
        health.ended.set()
        signal.signal(signal.SIGINT, signal.default_int_handler)

    for number in before:
        signal.signal(number, end)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
