"""A watch that goes on: images are scored as they arrive, and a restart goes on where the last run ended."""

__all__ = ["JOURNAL", "follow_source"]

import errno
import json
import logging
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import filelock
import numpy as np
from rich.progress import Progress

from cflow_plugin.commands.watch.arrivals import Arrival, Health, arrivals
from cflow_plugin.commands.watch.copies import Copies
from cflow_plugin.commands.watch.delivery import deliver, receivers_of
from cflow_plugin.commands.watch.journal import Journal, Result, ScoreTable
from cflow_plugin.commands.watch.judging import Following, Judge
from cflow_plugin.commands.watch.overlay import overlay, set_aside, write_picture
from cflow_plugin.commands.watch.page import Live, Models, Review, start_page
from cflow_plugin.decisions.regions import Region
from cflow_plugin.deploy.runtime import ExportedModel
from cflow_plugin.errors import CflowError, first_line
from cflow_plugin.images.reading import in_8_bits

logger = logging.getLogger(__name__)

JOURNAL = "journal.sqlite"
_FULL = {errno.ENOSPC, errno.EDQUOT}
_AGAIN = 5.0  # seconds between two looks at a full disk
_FORGET = 10_000


def follow_source(settings: Following) -> None:
    """Score images as they arrive, until Ctrl-C, a signal to end, or ``limit``.

    Args:
        settings: What is followed.

    Raises:
        CflowError: If model, source or output cannot be used.
    """
    judge, health = Judge(settings, settings.model), Health()
    output = settings.output
    with ExitStack() as stack:
        output.mkdir(parents=True, exist_ok=True)
        stack.enter_context(_alone(output))
        journal = Journal(output / JOURNAL)
        stack.callback(journal.close)
        given = judge.digest
        judge = _last_used(settings, journal, judge)
        table = _table(judge.digest, output, journal)
        stack.callback(lambda: table.close())
        copies = Copies(output) if settings.sort else None
        if copies:
            copies.recover(journal)
        table.catch_up(journal)
        receivers = receivers_of(settings.webhook, settings.mqtt, journal)
        for receiver in receivers:
            stack.callback(deliver(receiver, output / JOURNAL, health).join)
        stack.callback(health.ended.set)  # before they are waited for, whatever fails from here on
        live = None
        if settings.page is not None:
            review = Review(output / "review", settings.sample, journal.name)
            models = Models(settings, judge, review, lambda chosen: _keep_choice(output, given, chosen))
            live = Live(judge, health, review, models, settings.threshold)
            start_page(live, settings.host, settings.page)
        stack.enter_context(_ended_by_signal(health))
        images = arrivals(settings.source, judge.compiled.bits, journal.knows, health, output)
        progress = stack.enter_context(Progress(transient=True))
        task = progress.add_task("Watching", total=settings.limit)
        if journal.last:
            logger.info("%d results are there already; this watch goes on from there.", journal.last)
        number = 0
        for number, arrival in enumerate(images, start=1):
            if live and (wished := live.models.take_wish()):
                judge = wished
                table.close()
                tables: list[ScoreTable] = []
                _write(lambda: tables.append(_table(judge.digest, output, journal)), health)  # noqa: B023
                [table] = tables
                live.begin(judge)
                logger.info("From here on with %s.", judge.file)
            result, found, regions = judge(arrival, journal.last + 1)
            if result.error:
                logger.warning("%s: %s.", result.image, result.error)
            _write(lambda: _keep(journal, table, copies, result, arrival), health)  # noqa: B023  called at once
            if found is not None and settings.overlays and result.decision != "good":
                _write(lambda: _write_overlay(output, result, arrival, found, judge.compiled, regions), health)  # noqa: B023
            if found is not None and live:
                live.add(result, arrival, found["anomaly_map"][0, 0], (regions, judge.compiled.regions))
                _draw(live.review, result, arrival, health)
            health.scored += result.score is not None
            dropped = f", {health.dropped} frames dropped" if health.dropped else ""
            score = "" if result.smoothed is None else f", score {result.smoothed:.3f}"
            progress.update(task, advance=1, description=f"{health.scored} scored{score}{dropped}")
            if number % _FORGET == 0:
                journal.forget([receiver.name for receiver in receivers])
            if number == settings.limit:
                break
    lost = f", {health.lost} files went away before they could be scored" if health.lost else ""
    dropped = f", {health.dropped} frames dropped since the model is slower than the camera" if health.dropped else ""
    logger.info("%d images%s%s; results are in %s.", health.scored, dropped, lost, output.resolve())


def _last_used(settings: Following, journal: Journal, judge: Judge) -> Judge:
    """The model that was chosen on the page, if the watch is started with the same one as then."""
    choice = json.loads(journal.note("chosen on the page") or "{}")
    if not choice or choice["given"] != judge.digest or choice["digest"] == judge.digest:
        return judge
    chosen = settings.model.with_name(choice["name"])
    try:
        found = Judge(settings, chosen)
    except (OSError, CflowError) as error:
        logger.warning(
            "%s was chosen on the page and cannot be used (%s): %s decides.", chosen, first_line(error), settings.model
        )
        return judge
    logger.info("Goes on with %s, which was chosen on the page in place of %s.", chosen, settings.model)
    return found


def _keep_choice(output: Path, given: str, chosen: Judge) -> None:
    """Note which model is to be used, for a restart with the same one; called by another thread than the journal's."""
    journal = Journal(output / JOURNAL)
    try:
        choice = {"given": given, "name": chosen.file.name, "digest": chosen.digest}
        journal.keep("chosen on the page", json.dumps(choice))
    finally:
        journal.close()


def _draw(review: Review, result: Result, arrival: Arrival, health: Health) -> None:
    """Let an image take part in the draw of the sample, which must not stop the watch."""
    try:
        _write(lambda: review.offer(result, arrival), health)
    except OSError as error:
        if "sample" not in health.receivers:
            logger.warning("The sample cannot be drawn: %s.", error)
        health.receivers["sample"] = f"The sample cannot be drawn: {error}."
    else:
        health.receivers.pop("sample", None)


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
    output: Path, result: Result, arrival: Arrival, found: Any, model: ExportedModel, regions: list[Region]
) -> None:
    assert isinstance(arrival.image, np.ndarray)
    assert result.smoothed is not None
    seen, shown = in_8_bits(arrival.image, model.bits), (regions, model.regions)
    picture = overlay(seen, found["anomaly_map"][0, 0], result.smoothed, result.decision, shown)
    name = arrival.name if arrival.name.lower().endswith(".png") else f"{arrival.name}.png"
    write_picture(output / "overlays" / name, picture)


def _table(model: str, output: Path, journal: Journal) -> ScoreTable:
    """The table of this model; that of another model is set aside."""
    path = output / "scores.csv"
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
