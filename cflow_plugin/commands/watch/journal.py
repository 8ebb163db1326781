"""Every result of a watch that goes on, in one file on disk: what was scored, and how far each receiver has been told.

Whoever is told of results (the table, a webhook, a broker) reads them here in their order and notes the last one that
has arrived. So the journal is every receiver's queue, and a killed run loses nothing and scores nothing twice.
"""

__all__ = ["Journal", "Result", "ScoreTable"]

import csv
import errno
import io
import os
import sqlite3
import uuid
from collections.abc import Iterable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from cflow_plugin.errors import CflowError, first_line

_COLUMNS = ["frame", "image", "time", "score", "smoothed", "anomalous", "milliseconds", "p_value", "decision"]
_KEPT = 200_000  # frames of a camera; those before them are of no use once every receiver has them
_TAIL = 4096  # bytes, in which a table's last line begins


class Result(NamedTuple):
    """What is known of one image.

    Attributes:
        number: 1 for the first of a journal, and so on.
        image: Its path below the folder, or the time of a camera's frame.
        stamp: Its file's time and size; ``""`` for a frame.
        time: When it was scored, in seconds since 1970.
        score: Its score, or ``None`` where it has none.
        smoothed: The smoothed score.
        p_value: Its conformal p-value, where the model has reference scores.
        anomalous: Whether it is called anomalous.
        decision: ``good``, ``anomalous``, ``unsure`` or ``unreadable``.
        milliseconds: How long the model took.
        error: Why it has no score.
        copy: Where a copy of it is, below the output folder.
        regions: Its anomalous regions, as JSON.
    """

    number: int
    image: str
    stamp: str
    time: float
    score: float | None = None
    smoothed: float | None = None
    p_value: float | None = None
    anomalous: bool | None = None
    decision: str = "unreadable"
    milliseconds: float | None = None
    error: str | None = None
    copy: str | None = None
    regions: str | None = None


_FIELDS = ", ".join(Result._fields)


class Journal:
    """Results on disk. A thread opens its own.

    Args:
        path: The SQLite file; it is made where there is none.

    Attributes:
        name: A name of its own, for identifiers that no other journal gives out.

    Raises:
        CflowError: If the file is damaged or not a journal.
    """

    def __init__(self, path: Path) -> None:
        try:
            self._database = sqlite3.connect(path, timeout=60, isolation_level=None)
            # A killed process loses nothing; a machine that loses its power may forget the last results, no others.
            self._database.execute("PRAGMA journal_mode = WAL")
            self._database.execute("PRAGMA synchronous = NORMAL")
            self._database.executescript(
                "CREATE TABLE IF NOT EXISTS results (number INTEGER PRIMARY KEY, image TEXT, stamp TEXT, time REAL, "
                "score REAL, smoothed REAL, p_value REAL, anomalous INTEGER, decision TEXT, milliseconds REAL, "
                "error TEXT, copy TEXT, regions TEXT);"
                "CREATE UNIQUE INDEX IF NOT EXISTS images ON results (image, stamp);"
                "CREATE TABLE IF NOT EXISTS notes (name TEXT PRIMARY KEY, value TEXT);"
            )
            self._database.execute("INSERT OR IGNORE INTO notes VALUES ('name', ?)", (uuid.uuid4().hex,))
        except sqlite3.DatabaseError as error:
            if _is_full(error):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path)) from error
            message = f"{path} could not be read ({first_line(error)}): move it away, or choose another --output."
            raise CflowError(message) from error
        self.name = str(self.note("name"))

    def close(self) -> None:
        """Close the file."""
        self._database.close()

    def note(self, name: str) -> str | None:
        """What is kept under a name."""
        found = self._database.execute("SELECT value FROM notes WHERE name = ?", (name,)).fetchone()
        return None if found is None else found[0]

    def keep(self, name: str, value: str | None) -> None:
        """Keep a text under a name."""
        self._run("INSERT OR REPLACE INTO notes VALUES (?, ?)", (name, value))

    @property
    def last(self) -> int:
        """Number of the last result, 0 where there is none."""
        return self._database.execute("SELECT coalesce(max(number), 0) FROM results").fetchone()[0]

    def knows(self, image: str, stamp: str) -> bool:
        """Whether there is a result of this image, as its file is now."""
        found = self._database.execute("SELECT 1 FROM results WHERE image = ? AND stamp = ?", (image, stamp))
        return found.fetchone() is not None

    def add(self, result: Result) -> None:
        """Keep a result.

        Raises:
            OSError: If the disk is full; nothing is kept then.
        """
        self._run(f"INSERT INTO results VALUES ({', '.join('?' * len(result))})", result)

    def after(self, number: int, most: int = 100) -> list[Result]:
        """The next results after one, in their order."""
        query = f"SELECT {_FIELDS} FROM results WHERE number > ? ORDER BY number LIMIT ?"
        return [Result(*row) for row in self._database.execute(query, (number, most))]

    def told(self, receiver: str) -> int:
        """The last result that a receiver has; a new receiver begins with the next one."""
        if (found := self.note(f"told {receiver}")) is None:
            found = str(self.last)
            self.keep(f"told {receiver}", found)
        return int(found)

    def tell(self, receiver: str, number: int) -> None:
        """Note that a receiver has all results up to this one."""
        self.keep(f"told {receiver}", str(number))

    def forget(self, receivers: Sequence[str] = ()) -> None:
        """Drop what no one will ask for again: old frames of a camera. Files are known for as long as the journal.

        Args:
            receivers: Who is told of results; what one of them does not have yet is kept.
        """
        last = min((self.told(receiver) for receiver in receivers), default=self.last)
        self._run("DELETE FROM results WHERE stamp = '' AND number <= ?", (last - _KEPT,))

    def _run(self, statement: str, values: tuple[object, ...]) -> None:
        try:
            self._database.execute(statement, values)
        except sqlite3.OperationalError as error:
            if _is_full(error):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)) from error
            raise


def _is_full(error: sqlite3.Error) -> bool:
    return any(words in str(error) for words in ("disk is full", "disk I/O error", "unable to open database file"))


class ScoreTable:
    """``scores.csv``: one line for each result that has a score, written as soon as it is in the journal.

    Args:
        path: The table. A half-written last line is taken away.
        first: Number of the result before the table's first.
    """

    def __init__(self, path: Path, first: int) -> None:
        self._file = path.open("ab", buffering=0)
        self._size = self._file.tell()
        self._told = first
        if self._size:
            with path.open("rb") as written:
                written.seek(max(0, self._size - _TAIL))
                tail = written.read()
            whole = tail[: tail.rfind(b"\n") + 1]
            self._size -= len(tail) - len(whole)
            self._file.truncate(self._size)
            with suppress(ValueError, IndexError):  # of the header
                self._told = max(first, int(whole.splitlines()[-1].split(b",")[0]))
        if not self._size:
            self._write([_COLUMNS])

    def catch_up(self, journal: Journal) -> None:
        """Write what is in the journal and not in the table.

        Raises:
            OSError: If the disk is full; the table then ends with a whole line.
        """
        while results := journal.after(self._told):
            self._write([_row(result) for result in results if result.score is not None])
            self._told = results[-1].number

    def _write(self, rows: Iterable[Iterable[object]]) -> None:
        text = io.StringIO()
        csv.writer(text).writerows(rows)
        data = text.getvalue().encode()
        try:
            written = self._file.write(data) or 0
        except OSError:
            self._file.truncate(self._size)
            raise
        if written < len(data):
            self._file.truncate(self._size)
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), self._file.name)
        self._size += written

    def close(self) -> None:
        """Close the file."""
        self._file.close()


def _row(result: Result) -> list[object]:
    def form(value: float | None, digits: int) -> str:
        return "" if value is None else f"{value:.{digits}f}"

    figures = [form(result.time, 3), form(result.score, 6), form(result.smoothed, 6)]
    last = [form(result.milliseconds, 2), form(result.p_value, 6), result.decision]
    return [result.number, result.image, *figures, int(bool(result.anomalous)), *last]
