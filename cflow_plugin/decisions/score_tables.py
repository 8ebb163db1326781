"""Tables of scores, as ``cflow-plugin watch`` and ``score`` write them, and as a line's whole history."""

__all__ = ["History", "is_history", "read_history", "read_scores"]

import csv
import io
import logging
import math
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from cflow_plugin.decisions.conformal import p_values
from cflow_plugin.errors import CflowError
from cflow_plugin.images.listing import natural_order

logger = logging.getLogger(__name__)

_LIVE = "scores.csv"
_TIES = 2  # images by which a rank may differ, since tables hold six decimals
_ODD = 0.1


class History(NamedTuple):
    """Scores in the order in which the images came.

    Attributes:
        names: The images' names, or their numbers where there are none.
        scores: Their scores, ``(N,)``.
        p_values: The p-values that stand beside them, NaN where there are none, ``(N,)``.
    """

    names: list[str]
    scores: NDArray[np.float64]
    p_values: NDArray[np.float64]


def is_history(folder: Path) -> bool:
    """Whether a folder holds tables of scores, and not images.

    Args:
        folder: The folder.
    """
    return (folder / _LIVE).is_file() or any(folder.glob("*.parquet"))


def read_history(sources: Sequence[Path], expected: NDArray[np.float64] | None = None) -> History:
    """Read several tables as one history, oldest first.

    Args:
        sources: Tables as for :func:`read_scores`, or folders that ``watch`` wrote to, whose earlier tables come first.
        expected: Reference scores of the model. Tables whose p-values are of other reference scores are another
            model's: in a folder they are left out, and said so; one that is named is refused.

    Returns:
        All scores.

    Raises:
        CflowError: If a table cannot be read, is another model's, or there is no score at all.
    """
    parts: list[History] = []
    for source in sources:
        is_folder = source.is_dir() and (source / _LIVE).is_file()
        # Those that were set aside have the time at which they ended in their names.
        tables = [*sorted(source.glob("scores_*.csv")), source / _LIVE] if is_folder else [source]
        for table in tables:
            part = read_scores(table, may_be_empty=is_folder)
            if expected is not None and not _is_of(part, expected):
                message = f"{table} holds scores of another model than the reference scores are of"
                if not is_folder:
                    raise CflowError(message + ": give tables of one model, and its file as --reference.")
                logger.warning("%s; it is left out.", message)
                continue
            parts.append(part)
    history = History(
        [name for part in parts for name in part.names],
        np.concatenate([np.empty(0), *(part.scores for part in parts)]),
        np.concatenate([np.empty(0), *(part.p_values for part in parts)]),
    )
    if not history.names:
        message = f"There is no score in {', '.join(map(str, sources))}."
        raise CflowError(message)
    return history


def _is_of(part: History, expected: NDArray[np.float64]) -> bool:
    """Whether p-values are those of the reference scores."""
    known = np.isfinite(part.p_values)
    if not known.any():
        return True
    again = p_values(part.scores[known], np.sort(expected))
    odd = np.abs(again - part.p_values[known]) > (_TIES + 0.5) / (len(expected) + 1)
    return bool(odd.mean() <= _ODD)


def read_scores(path: Path, may_be_empty: bool = False) -> History:
    """Read a table of scores.

    Args:
        path: A CSV file with a column ``score`` and perhaps ``image`` and ``p_value``; or a Parquet file, or a folder
            of them, with ``score``, ``path`` and perhaps ``p_value``, whose images are taken in the natural order of
            their paths, those without a score left out. Another program may still be writing to a CSV file: a last line
            without its end is left out.
        may_be_empty: Take a table without any score.

    Returns:
        The table.

    Raises:
        CflowError: If it cannot be read or holds no scores.
    """
    is_parquet = path.is_dir() or path.suffix.lower() == ".parquet"
    found = _from_parquet(path) if is_parquet else _from_csv(path)
    if not found.names and not may_be_empty:
        message = f"There is no score in {path}."
        raise CflowError(message)
    return found


def _from_csv(path: Path) -> History:
    try:
        content = path.read_bytes()
        whole = content[: content.rfind(b"\n") + 1]
        rows = list(csv.DictReader(io.StringIO(whole.decode("utf-8"), newline="")))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        message = f"{path} could not be read as a table of scores ({error})."
        raise CflowError(message) from error
    if len(whole) < len(content):
        logger.info("The last line of %s has no end, as if it were being written; it is left out.", path)
    names: list[str] = []
    scores: list[float] = []
    beside: list[float] = []
    for number, row in enumerate(rows, start=2):
        score = _number(row.get("score"))
        if not math.isfinite(score):
            message = f"Line {number} of {path} has no finite number in a column 'score'."
            raise CflowError(message)
        names.append(row.get("image") or str(number - 2))
        scores.append(score)
        beside.append(_number(row.get("p_value")))
    return History(names, np.array(scores), np.array(beside))


def _number(text: str | None) -> float:
    try:
        return float(text or math.nan)
    except (TypeError, ValueError):
        return math.nan


def _from_parquet(path: Path) -> History:
    import pyarrow as pa  # only these tables need it
    import pyarrow.dataset as ds

    try:
        table = ds.dataset(path, format="parquet")
        columns = [name for name in ("path", "score", "p_value") if name in table.schema.names]
        rows = table.to_table(columns=columns).to_pylist()
        rows = [row for row in rows if row["score"] is not None]
        rows.sort(key=lambda row: natural_order(Path(row["path"])))
    except (OSError, KeyError, TypeError, pa.ArrowException) as error:
        reason = str(error).splitlines()[0]
        message = f"{path} could not be read as Parquet with columns 'path' and 'score' ({reason})."
        raise CflowError(message) from error
    beside = [math.nan if row.get("p_value") is None else row["p_value"] for row in rows]
    return History([row["path"] for row in rows], np.array([row["score"] for row in rows], float), np.array(beside))
