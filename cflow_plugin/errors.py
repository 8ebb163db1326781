"""Errors a user can act upon, and how the command line shows them."""

from __future__ import annotations

__all__ = ["CflowError", "explain", "install_excepthook"]

import os
import sys
from typing import TYPE_CHECKING
from urllib.error import URLError

if TYPE_CHECKING:
    from types import TracebackType


class CflowError(RuntimeError):
    """Something is wrong with the input, the settings or the machine; the message says what, and what to do."""


def explain(error: BaseException) -> str | None:
    """Say in a sentence what an error means to the user.

    Args:
        error: An exception that was not caught.

    Returns:
        The sentence, or ``None`` where only a stack trace helps.
    """
    if isinstance(error, CflowError):
        return str(error)
    if isinstance(error, URLError):
        return (
            f"A download failed ({error.reason}). Connect to the internet, or put the data set into a local folder and "
            "name it with --data.root FOLDER."
        )
    return None


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
