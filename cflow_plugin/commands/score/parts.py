"""The folder of scores: parts that are written whole, once, and under names that say what is in them."""

__all__ = ["Row", "ScoreTable"]

import hashlib
import json
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import filelock
import pyarrow as pa
import pyarrow.parquet as pq

from cflow_plugin.decisions.region_files import RegionFiles
from cflow_plugin.errors import CflowError
from cflow_plugin.files import atomic_file

logger = logging.getLogger(__name__)

# Readers of Parquet folders pass over names that begin with a dot or an underscore.
_SETTINGS, _LOCK = "_settings.json", ".lock"
_SCHEMA = pa.schema(
    [
        ("path", pa.string()),
        ("score", pa.float32()),
        ("anomalous", pa.bool_()),
        ("p_value", pa.float64()),
        ("error", pa.string()),
        ("width", pa.int32()),
        ("height", pa.int32()),
        ("regions", pa.string()),
    ]
)


class Row(NamedTuple):
    """What is known of an image.

    Attributes:
        path: Its path, as it was listed.
        score: Its anomaly score, unless there is an error.
        anomalous: The model's decision.
        p_value: Its conformal p-value, if the file holds reference scores.
        error: Why it has no score.
        width: Width of the image.
        height: Its height.
        regions: What is anomalous in it, as JSON: a list of :class:`~cflow_plugin.decisions.regions.Region`.
        anomaly_map: Its anomaly map as a PNG of 8 bits a pixel, 0 for 0 and 255 for 1, if maps are wanted.
    """

    path: str
    score: float | None = None
    anomalous: bool | None = None
    p_value: float | None = None
    error: str | None = None
    width: int | None = None
    height: int | None = None
    regions: str | None = None
    anomaly_map: bytes | None = None


def _is_newer(path: str, written: int) -> bool:
    """Whether a file was changed or put in its place after a moment, in nanoseconds; no, if it is there no longer."""
    try:
        found = os.stat(path)  # noqa: PTH116  of very many files
    except OSError:
        return False
    return max(found.st_mtime_ns, found.st_ctime_ns) > written


class ScoreTable:
    """A folder of Parquet parts, to be read as one table.

    A part holds one batch of images and is named by a hash of their paths. It appears under that name only when it is
    complete, so a run that was killed leaves nothing behind that looks like a part, and a batch that is scored twice
    (by a task that was tried again, say) is one file all the same.

    Args:
        folder: The folder; it is made when the first part is written.
        maps: Whether rows have anomaly maps.
    """

    def __init__(self, folder: Path, maps: bool) -> None:
        self.folder = folder.absolute()
        self.schema = _SCHEMA.append(pa.field("anomaly_map", pa.binary())) if maps else _SCHEMA

    def file(self, batch: list[str]) -> Path:
        """Where the part of this batch is or will be."""
        return self.folder / f"part-{hashlib.sha256(chr(0).join(batch).encode()).hexdigest()[:24]}.parquet"

    @contextmanager
    def opened(self, settings: dict[str, Any]) -> Iterator[None]:
        """Keep other runs out, and scores of another model or other settings.

        Args:
            settings: What scores depend on.

        Raises:
            CflowError: If another run is writing into this folder, or it holds something else.
        """
        record = self.folder / _SETTINGS
        if not record.exists() and any(self.folder.glob("*.parquet")):
            message = f"{self.folder} holds Parquet files of something else; choose another --output."
            raise CflowError(message)
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            lock = filelock.FileLock(self.folder / _LOCK)
            lock.acquire(timeout=0)
        except filelock.Timeout as error:
            message = f"Another run is writing into {self.folder}; wait for its end, or choose another --output."
            raise CflowError(message) from error
        except OSError as error:
            message = f"{self.folder} cannot be written to ({error.strerror}); choose another --output."
            raise CflowError(message) from error
        try:
            if record.exists():
                self._compare(record, settings)
            else:
                self._replace(record, lambda file: file.write_text(json.dumps(settings, indent=2) + "\n"))
            for rest in self.folder.glob(".*.partial"):  # of a run that was killed
                rest.unlink(missing_ok=True)
            yield
        finally:
            lock.release()

    def _compare(self, record: Path, settings: dict[str, Any]) -> None:
        try:
            found = json.loads(record.read_text())
            other = [name for name in settings if found.get(name) != settings[name]]
        except (ValueError, AttributeError) as error:
            message = (
                f"{record} is damaged, so it is not known how the scores beside it were made; choose another --output."
            )
            raise CflowError(message) from error
        if other:
            message = f"{self.folder} holds scores made with another {' and '.join(other)}; choose another --output."
            raise CflowError(message)

    def done(self) -> set[str]:
        """Paths of all images that need no score any more.

        A damaged part is removed, and rows that hold an error or are older than their images, so that these come again.
        """
        paths: set[str] = set()
        for file in self.folder.glob("part-*.parquet"):
            try:
                table, written = pq.read_table(file, columns=["path", "error"]), file.stat().st_mtime_ns
            except (OSError, pa.ArrowException):
                logger.warning("%s is damaged; its images are scored again.", file)
                file.unlink(missing_ok=True)
                continue
            scored, errors = (table.column(name).to_pylist() for name in ("path", "error"))
            holds = [not error and not _is_newer(path, written) for path, error in zip(scored, errors, strict=True)]
            if not any(holds):
                file.unlink()
            elif not all(holds):
                kept = pq.read_table(file).filter(pa.array(holds))
                self._replace(file, lambda partial, kept=kept: pq.write_table(kept, partial))
            paths.update(path for path, still in zip(scored, holds, strict=True) if still)
        return paths

    def missing(self, paths: list[str], size: int) -> list[list[str]]:
        """Batches of those images that have no score yet, or another one by now.

        Batches are cut from the list of all images, not from that of the missing ones. So a run that goes on asks for
        the same batches as the one before it, and a late worker of that one writes the same parts.

        Args:
            paths: All images.
            size: Images in a batch.
        """
        done = self.done()
        batches = (paths[start : start + size] for start in range(0, len(paths), size))
        todo = ([path for path in batch if path not in done] for batch in batches)
        return [batch for batch in todo if batch]

    def write(self, batch: list[str], rows: list[Row]) -> None:
        """Write the part of a batch.

        Args:
            batch: Paths of the batch.
            rows: One row each, in this order.

        Raises:
            CflowError: If it cannot be written.
        """
        table = pa.Table.from_pylist([row._asdict() for row in rows], schema=self.schema)
        self._replace(self.file(batch), lambda file: pq.write_table(table, file))

    def write_regions(self) -> None:
        """Write the regions of all parts beside them, see :class:`~cflow_plugin.decisions.region_files.RegionFiles`."""
        files = RegionFiles(self.folder, prefix="_")
        for part in sorted(self.folder.glob("part-*.parquet")):
            for row in pq.read_table(part, columns=["path", "width", "height", "regions"]).to_pylist():
                if row["regions"] is not None:
                    files.add(row["path"], (row["height"], row["width"]), json.loads(row["regions"]))
        files.close()

    def _replace(self, file: Path, write: Any) -> None:
        try:
            with atomic_file(file) as partial:
                write(partial)
        except OSError as error:
            message = f"{file} could not be written ({error.strerror or error}); what is there already is kept."
            raise CflowError(message) from error
