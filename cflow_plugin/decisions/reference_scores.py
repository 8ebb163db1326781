"""The reference images' scores, as exported files, checkpoints and tables carry them."""

__all__ = ["DECISIONS_KEY", "KEY", "read_reference_scores"]

import json
from pathlib import Path

import numpy as np

from cflow_plugin.decisions.notes import read_note
from cflow_plugin.decisions.score_tables import read_scores
from cflow_plugin.errors import CflowError

KEY = "cflow_plugin_reference_scores"
"""Under this name an exported file has the scores, as JSON."""

DECISIONS_KEY = "cflow_plugin_decisions"
"""Under this name an exported file says, in a sentence, what its decisions rest on."""


def read_reference_scores(path: Path) -> np.ndarray | None:
    """Read the reference images' scores.

    Args:
        path: An exported model (.xml, .onnx), a checkpoint (.ckpt), or a table of good parts' scores (.csv, .parquet,
            or a folder of these) as ``cflow-plugin watch`` and ``score`` write it.

    Returns:
        Scores as the model gives them, ascending, ``(n,)``, or ``None`` where the model was trained without a
        false-alarm rate.

    Raises:
        CflowError: If the file cannot be read.
    """
    readers = {".xml": _from_file, ".onnx": _from_file, ".ckpt": _from_checkpoint}
    suffix = path.suffix.lower()
    if not path.exists():
        message = f"There is no file {path}."
        raise CflowError(message)
    if suffix in {".csv", ".parquet"} or path.is_dir():
        return np.sort(read_scores(path).scores)
    if suffix not in readers:
        message = f"{path} is no exported model (.xml, .onnx), checkpoint (.ckpt) or table of scores (.csv)."
        raise CflowError(message)
    try:
        scores = readers[suffix](path)
    except ModuleNotFoundError:  # in an environment that only runs exported files
        raise
    except Exception as error:  # what damaged files raise differs from format to format
        message = f"{path} could not be read: it is damaged, or not what its name says."
        raise CflowError(message) from error
    return None if scores is None or not len(scores) else np.sort(np.asarray(scores, dtype=float))


def _from_file(path: Path) -> list[float] | None:
    note = read_note(path, KEY)
    return None if note is None else json.loads(note)


def _from_checkpoint(path: Path) -> list[float] | None:
    # Imported here: they take seconds, and only a checkpoint needs them.
    import torch

    from cflow_plugin.decisions.post_processing import ConformalPostProcessor

    state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)["state_dict"]
    prefix = "post_processor."
    if prefix + "reference_scores" not in state:
        return None
    post_processor = ConformalPostProcessor()
    post_processor.load_state_dict(
        {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}
    )
    return post_processor.normalized_reference_scores.tolist()
