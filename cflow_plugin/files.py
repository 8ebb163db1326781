"""Files that are there whole or not at all."""

__all__ = ["replacing"]

import os
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def replacing(file: Path) -> Iterator[Path]:
    """A passing name to write to, in the same folder; what is there in the end takes the file's place in one step.

    So a run that is killed, or a full disk, leaves an older file as it was, and nothing that looks like a new one.

    Args:
        file: The file to write; its folder must be there.
    """
    passing = file.with_name(f".{file.name}.{uuid.uuid4().hex[:8]}.partial")
    try:
        yield passing
        with passing.open("rb+") as written:  # on the disk before it gets its name, should the machine go down
            os.fsync(written.fileno())
        os.replace(passing, file)
    finally:
        passing.unlink(missing_ok=True)
