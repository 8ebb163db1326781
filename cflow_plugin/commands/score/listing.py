"""Which images a collection holds."""

__all__ = ["list_images"]

import glob
import os
from pathlib import Path

import pyarrow as pa
import pyarrow.dataset as ds

from cflow_plugin.errors import CflowError
from cflow_plugin.images.listing import IMAGES, list_folder

_MAGIC = frozenset("*?[")


def list_images(source: str) -> list[str]:
    """List the images of a folder, of a glob pattern or of a table.

    Args:
        source: A folder, taken with all folders below it; a pattern in which ``**`` stands for any folders; a Parquet
            file, or a folder of them without any image, with a column ``path``.

    Returns:
        Each path once. A folder's and a pattern's are absolute and sorted, a table's are as they stand there.

    Raises:
        CflowError: If there is nothing, or no image, or a table cannot be read.
    """
    path = Path(source)
    if path.is_dir():
        found = list_folder(path)
        if not found and next(path.rglob("*.parquet"), None) is not None:
            return _from_table(source)
    elif path.is_file():
        if path.suffix.lower() not in IMAGES:
            return _from_table(source)
        found = [path]
    elif _MAGIC & set(source):
        names = glob.iglob(source, recursive=True)  # noqa: PTH207  the pattern may be absolute
        found = [Path(name) for name in names if Path(name).suffix.lower() in IMAGES]  # none of them hidden
    else:
        message = (
            f"There is nothing at {source}: name a folder, a pattern such as 'line 3/**/*.png', or a Parquet file."
        )
        raise CflowError(message)
    if not found:
        message = f"There is no image in {source} ({', '.join(sorted(IMAGES))})."
        raise CflowError(message)
    return sorted({_as_text(file.absolute()) for file in found})


def _as_text(path: Path) -> str:
    # A name that is no UTF-8 cannot stand in a table; spelt like this it gets a row that says it cannot be read.
    return os.fsencode(path).decode("utf-8", "backslashreplace")


def _from_table(source: str) -> list[str]:
    try:
        column = ds.dataset(source, format="parquet").to_table(columns=["path"]).column("path")
    except (OSError, pa.ArrowInvalid, pa.ArrowKeyError) as error:
        message = f"{source} could not be read as Parquet with a column 'path' ({str(error).splitlines()[0]})."
        raise CflowError(message) from error
    paths = column.to_pylist()
    if not all(isinstance(path, str) and path for path in paths):
        message = f"The column 'path' of {source} must hold a text in every row."
        raise CflowError(message)
    if not paths:
        message = f"There is no path in {source}."
        raise CflowError(message)
    return list(dict.fromkeys(paths))
