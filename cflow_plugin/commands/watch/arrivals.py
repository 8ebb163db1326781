"""Images as they arrive, for as long as one waits: files of a folder or a pattern, frames of a camera."""

__all__ = ["Arrival", "Health", "arrivals", "is_same"]

import glob
import itertools
import logging
import os
import re
import threading
import time
from collections import OrderedDict, deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import cv2
import numpy as np

from cflow_plugin.commands.watch.sources import is_film, open_capture, without_password
from cflow_plugin.errors import CflowError
from cflow_plugin.images.listing import IMAGES, is_hidden, natural_order
from cflow_plugin.images.reading import ImageFileError, read_image

logger = logging.getLogger(__name__)

_SETTLED = 1.0  # seconds without a change, after which a file counts as written
_PATIENCE = 10.0  # seconds for which a file that cannot be read may still be half-written
_RESCAN = 30.0  # seconds: what no event told of (network drives send none) is found by then
_LOOK = 0.2
_PENDING = 10_000  # files that are waited for; if there are more, the folder is listed again
_LONGEST = 60.0  # seconds between two attempts to reach a camera
_MAGIC = frozenset("*?[")


class Arrival(NamedTuple):
    """One image that has arrived.

    Attributes:
        name: Its path below the folder, or the time of a camera's frame.
        stamp: Its file's time and size, ``""`` for a frame: together with the name it is this image for good.
        path: Its file, if there is one.
        time: When it arrived, in seconds since 1970.
        image: Shape ``(H, W, 3)``, blue first, bytes or 16-bit values; or what is wrong with the file.
    """

    name: str
    stamp: str
    path: Path | None
    time: float
    image: np.ndarray | ImageFileError


@dataclass
class Health:
    """How a watch fares, for whoever asks.

    Attributes:
        scored: Images with a score since the start.
        dropped: Frames that were not scored since the model is slower than the camera.
        lost: Files that went away before they were scored.
        source: What is wrong with the source, ``""`` if nothing is.
        receivers: The same of each receiver of results.
        ended: Set when the watch is to end.
    """

    scored: int = 0
    dropped: int = 0
    lost: int = 0
    source: str = ""
    receivers: dict[str, str] = field(default_factory=dict)
    ended: threading.Event = field(default_factory=threading.Event)


def arrivals(
    source: str, bits: int, known: Callable[[str, str], bool], health: Health, leave_out: Path
) -> Iterator[Arrival]:
    """Yield images for ever, until ``health.ended`` is set.

    Args:
        source: A folder, a pattern, a camera or a stream; a video file ends by itself.
        bits: Bits of a value, as the model takes them.
        known: Whether an image of that name and stamp has a result already.
        health: What is dropped, lost or wrong is noted there.
        leave_out: A folder whose images do not count: that of the results.

    Raises:
        CflowError: If the source cannot be used.
    """
    if _MAGIC & set(source) and "://" not in source and not Path(source).exists():
        return _files(_Pattern(source), bits, known, health, leave_out)
    path = Path(source)
    if path.is_dir():
        return _files(_Folder(path), bits, known, health, leave_out)
    if bits > 8:
        message = f"The model was trained on images of {bits} bits a value; a camera or video gives 8. Name a folder."
        raise CflowError(message)
    if not is_film(source):
        message = f"There is nothing to follow at {source}: name a folder, a pattern in quotes, a camera or a stream."
        raise CflowError(message)
    return _frames(source, health)


class _Folder:
    """A folder with all below it, and what its events tell of."""

    def __init__(self, root: Path) -> None:
        from watchdog.events import FileSystemEvent, FileSystemEventHandler
        from watchdog.observers import Observer

        self.root = root
        self._told: deque[tuple[Path, bool]] = deque(maxlen=_PENDING)
        self._wake = threading.Event()
        self.every = _RESCAN
        folder = self

        class Handler(FileSystemEventHandler):
            def on_any_event(self, event: FileSystemEvent) -> None:
                if event.is_directory or event.event_type not in {"created", "modified", "moved", "closed"}:
                    return
                path = Path(os.fsdecode(event.dest_path or event.src_path))
                if path.suffix.lower() in IMAGES:
                    # Whoever closes a file or moves it into place has written it.
                    folder._told.append((path, event.event_type in {"moved", "closed"}))
                    folder._wake.set()

        self._observer = Observer()
        self._observer.schedule(Handler(), str(root), recursive=True)
        try:
            self._observer.start()
        except OSError as error:  # Linux counts how many folders are watched
            logger.warning("The system does not tell of new files (%s); %s is listed every second.", error, root)
            self.every = _SETTLED

    def listed(self) -> Iterator[Path]:
        for where, folders, names in os.walk(self.root):
            folders.sort(key=lambda name: natural_order(Path(name)))
            images = [name for name in names if Path(name).suffix.lower() in IMAGES]
            yield from (Path(where, name) for name in sorted(images, key=lambda name: natural_order(Path(name))))

    def told(self) -> tuple[list[tuple[Path, bool]], bool]:
        """Files that events told of, with whether they are written; and whether some may have been forgotten."""
        self._wake.wait(_LOOK)
        self._wake.clear()
        found = [self._told.popleft() for _ in range(len(self._told))]
        return found, len(found) >= _PENDING

    def close(self) -> None:
        if self._observer.is_alive():
            self._observer.stop()
            self._observer.join()


class _Pattern:
    """Files that a pattern fits."""

    every = _SETTLED

    def __init__(self, pattern: str) -> None:
        self._pattern = pattern
        fixed = re.split(r"[*?\[]", pattern, maxsplit=1)[0]
        self.root = Path(fixed if fixed.endswith("/") else os.path.dirname(fixed) or ".")  # noqa: PTH120  of a pattern

    def listed(self) -> Iterator[Path]:
        found = map(Path, glob.iglob(self._pattern, recursive=True))  # noqa: PTH207  it may be absolute
        yield from sorted((path for path in found if path.suffix.lower() in IMAGES), key=natural_order)

    def told(self) -> tuple[list[tuple[Path, bool]], bool]:
        time.sleep(_LOOK)
        return [], False

    def close(self) -> None:
        pass


def _files(
    where: _Folder | _Pattern, bits: int, known: Callable[[str, str], bool], health: Health, leave_out: Path
) -> Iterator[Arrival]:
    leave_out = leave_out.resolve()
    waiting: OrderedDict[Path, tuple[str, float]] = OrderedDict()  # the stamp, and since when it is the same

    def look(path: Path, written: bool) -> Arrival | None:
        """What a file is, if it has arrived; it is waited for if it is still growing."""
        name = path.relative_to(where.root)
        if is_hidden(name) or leave_out in path.resolve().parents:
            return None
        try:
            stamp, age = _stamp(path)
        except OSError:
            health.lost += waiting.pop(path, None) is not None
            return None
        if known(name.as_posix(), stamp):
            waiting.pop(path, None)
            return None
        now = time.monotonic()
        # Copies may have old times, so that alone does not tell how long nothing has been written.
        before, since = waiting.get(path, (stamp, now - min(max(0.0, age), _SETTLED)))
        unchanged = now - since if before == stamp else 0.0
        if written or unchanged >= _SETTLED:
            try:
                image = read_image(path, bits)
            except ImageFileError as error:
                image = error
            if (not isinstance(image, ImageFileError) or unchanged >= _PATIENCE) and is_same(path, stamp):
                waiting.pop(path, None)
                return Arrival(name.as_posix(), stamp, path, time.time(), image)
        if len(waiting) < _PENDING:  # the others are found when the folder is listed again
            waiting[path] = (stamp, now - unchanged)
        return None

    listed = -float("inf")
    try:
        while not health.ended.is_set():
            told, forgotten = where.told()
            listing: Iterable[Path] = ()
            if forgotten or time.monotonic() - listed >= where.every:
                there = where.root.is_dir()
                health.source = "" if there else f"{where.root} is not there; it is waited for."
                listing = where.listed()  # one by one: a folder of months is large
                listed = time.monotonic()
            others = itertools.chain(listing, list(waiting))
            for path, written in itertools.chain(told, ((path, False) for path in others)):
                if health.ended.is_set():
                    return
                if arrival := look(path, written):
                    yield arrival
    finally:
        where.close()


def _stamp(path: Path) -> tuple[str, float]:
    found = path.stat()
    return f"{found.st_mtime_ns} {found.st_size}", time.time() - found.st_mtime


def is_same(path: Path, stamp: str) -> bool:
    """Whether a file is still there, and what it was when it had this stamp."""
    try:
        return _stamp(path)[0] == stamp
    except OSError:
        return False


def _frames(source: str, health: Health) -> Iterator[Arrival]:
    """Frames of a camera, the newest ones: a thread takes them as they come, and drops those that come too fast."""
    newest: deque[tuple[float, np.ndarray]] = deque()
    there = threading.Condition()
    finished = threading.Event()

    def take() -> None:
        wait = 1.0
        while not health.ended.is_set():
            capture = open_capture(source)
            taken = 0
            is_file = capture.isOpened() and capture.get(cv2.CAP_PROP_FRAME_COUNT) > 0
            while capture.isOpened() and not health.ended.is_set():
                read, image = capture.read()
                if not read:
                    break
                if taken == 0 and health.source:
                    logger.info("%s gives images again.", without_password(source))
                health.source, wait, taken = "", 1.0, taken + 1
                with there:
                    if is_file:  # which can wait; a camera cannot
                        there.wait_for(lambda: not newest or health.ended.is_set())
                    if newest:
                        newest.clear()
                        health.dropped += 1
                    newest.append((time.time(), image))
                    there.notify_all()
            capture.release()
            if is_file and taken:
                break
            health.source = f"{without_password(source)} gives no images; it is tried again every {wait:.0f} s."
            logger.warning("%s", health.source)
            health.ended.wait(wait)
            wait = min(2 * wait, _LONGEST)
        with there:
            finished.set()
            there.notify_all()

    thread = threading.Thread(target=take, name="camera", daemon=True)
    thread.start()
    try:
        while not health.ended.is_set():
            with there:
                there.wait_for(lambda: newest or finished.is_set(), timeout=_LOOK)
                if not newest and finished.is_set():
                    return
                if not newest:
                    continue
                moment, image = newest.popleft()
                there.notify_all()
            name = time.strftime("%Y-%m-%d_%H-%M-%S", time.gmtime(moment)) + f"-{int(moment % 1 * 1e6):06d}"
            yield Arrival(name, "", None, moment, image)
    finally:
        health.ended.set()
        with there:
            there.notify_all()
