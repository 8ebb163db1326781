"""Errors that end in one sentence instead of a stack trace, those of anomalib among them.

- What: sets ``sys.excepthook``, wraps ``AnomalibCLI.instantiate_classes``, and recognises four of anomalib's errors and
  two of torch's by the words of their messages.
- Why: on anomalib's command line a wrong path or setting ends in a hundred lines of stack trace. anomalib raises plain
  ``ValueError`` and ``FileNotFoundError`` there, which nothing but their words tells apart; jsonargparse drops our own
  errors for another that lists all settings.
- Since: anomalib 2.7, whose ``rich`` installs a hook of its own when ``anomalib.cli.cli`` is imported.
- Upstream: to be asked for: exceptions of types of their own. No report is known.
- Can go: the words, when there are such types; the hook stays for our own errors.
"""

from __future__ import annotations

__all__ = ["explain", "install_excepthook", "keep_our_errors"]

import errno
import os
import sys
from functools import wraps
from typing import TYPE_CHECKING, Any
from urllib.error import URLError

from cflow_plugin.errors import CflowError

if TYPE_CHECKING:
    from types import TracebackType

_SPACE = "Free some space and start again; what was written before is kept."
_ELSEWHERE = "Choose a folder that may be written to, with --default_root_dir FOLDER for anomalib's commands."
_UNWRITABLE = {
    errno.ENOSPC: _SPACE,
    errno.EDQUOT: _SPACE,
    errno.EROFS: _ELSEWHERE,
    errno.EACCES: _ELSEWHERE,
    errno.EPERM: _ELSEWHERE,
    errno.EFBIG: "The system limits the size of files; see ulimit -f.",
}

_FORBIDDEN = {errno.EACCES, errno.EPERM}

# What anomalib says where images are missing, and what it means.
_OF_ANOMALIB = {
    "Path does not exist: ": "{error}. Check --data.root and the folders that are named below it.",
    "Found 0 ": "There is no image where some are needed: {error}. Check --data.root and the folders below it.",
    "missing file path(s) in samples": (
        "An image that is listed in a data folder is not there; look for links in it that lead nowhere."
    ),
    "not enough values to unpack (expected 2, got 0)": (
        "There are too few images to split them into training, validation and test images. Add images, or name other "
        "images to test on, with --data.normal_test_dir FOLDER for a Folder."
    ),
}


_OF_TORCH = {
    "unable to allocate shared memory": (
        "The processes that load images have too little shared memory. Set --data.num_workers 0, or start the "
        "container with more, for example docker run --shm-size 2g."
    ),
    "Error(s) in loading state_dict for": (
        "The checkpoint is damaged, or of another kind of model: its weights do not fit. Take another one, or train "
        "anew."
    ),
}


class _KeptError(BaseException):
    """Carries an error through ``except Exception``."""


def explain(error: BaseException) -> str | None:
    """Say in a sentence what an error means to the user.

    Args:
        error: An exception that was not caught.

    Returns:
        The sentence, or ``None`` where only a stack trace helps.
    """
    if isinstance(error, CflowError):
        return str(error)
    if explanation := getattr(error, "explanation", None):  # found out where the error was raised
        return explanation
    if isinstance(error, URLError):
        return (
            f"A download failed ({error.reason}). Connect to the internet, or put the data set into a local folder and "
            "name it with --data.root FOLDER."
        )
    for fragment, sentence in _OF_ANOMALIB.items():
        if fragment in str(error) and _was_raised_by("anomalib", error):
            return sentence.format(error=" ".join(str(error).split()))
    for fragment, sentence in _OF_TORCH.items():
        if isinstance(error, RuntimeError) and fragment in str(error):
            return sentence
    if isinstance(error, OSError) and error.errno in _UNWRITABLE:
        reason = os.strerror(error.errno)
        if error.errno in _FORBIDDEN and _cannot_be_read(error.filename):
            return f"{error.filename}: {reason}. Let the user that runs this read it, or name other data."
        return f"{f'{error.filename}: {reason}' if error.filename else reason}. {_UNWRITABLE[error.errno]}"
    return None


def _cannot_be_read(path: str | bytes | int | None) -> bool:
    """Whether a file or folder is there and may not be read."""
    return isinstance(path, str | bytes) and os.path.lexists(path) and not os.access(path, os.R_OK)


def _was_raised_by(package: str, error: BaseException) -> bool:
    """Whether the innermost frame belongs to a package."""
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    return trace is not None and trace.tb_frame.f_globals.get("__name__", "").split(".")[0] == package


def install_excepthook() -> None:
    """Let uncaught errors that can be explained end in one sentence instead of a stack trace.

    The exit status stays that of an uncaught exception. ``CFLOW_PLUGIN_TRACEBACK=1`` brings the stack trace back.
    """
    previous = sys.excepthook

    def hook(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        message = explain(error)
        if message is None or os.environ.get("CFLOW_PLUGIN_TRACEBACK") == "1":
            previous(kind, error, trace)
        else:
            print(f"error: {message}", file=sys.stderr)

    sys.excepthook = hook


def keep_our_errors() -> None:
    """Let what a model or a data module says of its settings reach the user as it is."""
    from anomalib.cli.cli import AnomalibCLI

    build = AnomalibCLI.instantiate_classes

    @wraps(build)
    def built(self: AnomalibCLI) -> None:
        self.parser.add_instantiator(_instantiate, object)
        try:
            build(self)
        except _KeptError as kept:
            raise kept.args[0] from None

    AnomalibCLI.instantiate_classes = built


def _instantiate(class_type: type, *args: Any, **kwargs: Any) -> Any:
    try:
        return class_type(*args, **kwargs)
    except CflowError as error:
        raise _KeptError(error) from error
    except ValueError as error:  # of a part of ours, which is no part of Lightning's command line elsewhere
        if class_type.__module__.startswith("cflow_plugin."):
            raise _KeptError(CflowError(str(error))) from error
        raise
