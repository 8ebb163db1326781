"""Files that are there whole or not at all."""

__all__ = ["atomic_file", "atomic_folder", "remove_unfinished"]

import errno
import glob
import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_FULL = 2**20  # bytes: what a writer's buffer may leave of a disk that is full


@contextmanager
def atomic_file(file: Path) -> Iterator[Path]:
    """A partial name to write to, in the same folder; what is there in the end takes the file's place in one step.

    So a run that is killed, or a full disk, leaves an older file as it was, and nothing that looks like a new one.

    Args:
        file: The file to write; its folder must be there.
    """
    partial = file.with_name(f".{file.name}.{uuid.uuid4().hex[:8]}.partial")
    try:
        yield partial
        with partial.open("rb+") as written:  # on the disk before it gets its name, should the machine go down
            os.fsync(written.fileno())
        partial.replace(file)
    finally:
        partial.unlink(missing_ok=True)


@contextmanager
def atomic_folder(folder: Path, last: str) -> Iterator[Path]:
    """A partial folder for files that belong together; in the end they move to where they are wanted.

    The file that the others are found by is taken away first and comes last. So it is there only with the others of its
    own making.

    Args:
        folder: Where they are wanted; it must be there.
        last: Name of the file that the others are found by.

    Raises:
        OSError: If the disk is full, whatever the library that writes the files makes of it.
    """
    remove_unfinished(folder / last)
    partial = folder / f".{last}.{uuid.uuid4().hex[:8]}.partial"
    partial.mkdir()
    try:
        yield partial
        files = sorted((file for file in partial.rglob("*") if file.is_file()), key=lambda file: file.name == last)
        (folder / last).unlink(missing_ok=True)
        for file in files:
            file.replace(folder / file.name)
    except (OSError, RuntimeError) as error:
        if shutil.disk_usage(folder).free < _FULL:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(folder)) from error
        raise
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def remove_unfinished(file: Path) -> None:
    """Remove what killed runs left of a file, or of files that arrive together, that only one process writes.

    Args:
        file: The file, or that which the others are found by.
    """
    for rest in file.parent.glob(f".{glob.escape(file.name)}.*.partial"):
        if rest.is_dir():
            shutil.rmtree(rest, ignore_errors=True)
        else:
            rest.unlink(missing_ok=True)
