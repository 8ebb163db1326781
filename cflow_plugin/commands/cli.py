"""The ``cflow-plugin`` command: what anomalib's own command line has no place for."""

__all__ = ["main"]

import logging
import os
import sys
import warnings
from importlib import import_module
from pathlib import Path
from typing import Any

from jsonargparse import auto_cli

from cflow_plugin.anomalib_patches.error_hook import install_excepthook
from cflow_plugin.commands.configs import find_config
from cflow_plugin.errors import CflowError

_COMMANDS = {
    "benchmark": "cflow_plugin.commands.benchmark",
    "check": "cflow_plugin.commands.check",
    "compare": "cflow_plugin.commands.compare",
    "configs": "cflow_plugin.commands.configs",
    "encoders": "cflow_plugin.commands.encoders",
    "import-checkpoint": "cflow_plugin.commands.import_checkpoint",
    "make-masks": "cflow_plugin.commands.make_masks",
    "make-repository": "cflow_plugin.commands.make_repository",
    "make-scenes": "cflow_plugin.commands.make_scenes",
    "monitor": "cflow_plugin.commands.monitor",
    "recalibrate": "cflow_plugin.commands.recalibrate",
    "score": "cflow_plugin.commands.score",
    "serve": "cflow_plugin.commands.serve",
    "watch": "cflow_plugin.commands.watch.watch",
}

_INTERRUPTED = 128 + 2

# Options whose value may stand right behind the command.
_FIRST = {"check": "--model", "import-checkpoint": "--checkpoint"}


def main(arguments: list[str] | None = None) -> None:
    """Run a subcommand."""
    install_excepthook()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    arguments = sys.argv[1:] if arguments is None else arguments
    # anomalib's and timm's imports warn of each other; a user can do nothing about it.
    warnings.filterwarnings("ignore", category=FutureWarning)
    os.environ.setdefault("PYTHONWARNINGS", "ignore::FutureWarning")  # in processes that are started, too
    if len(arguments) > 1 and arguments[0] in _FIRST and not arguments[1].startswith("-"):
        arguments = [arguments[0], _FIRST[arguments[0]], *arguments[1:]]
    # Some import all of anomalib, which those that run exported models have no need of.
    wanted = [name for name in _COMMANDS if name in arguments[:1]] or list(_COMMANDS)
    arguments = _with_shipped_configs(arguments)
    functions = _functions(wanted)
    try:
        auto_cli(functions, args=arguments, as_positional=False, prog="cflow-plugin")
    except ModuleNotFoundError as error:
        raise CflowError(_missing(error)) from error
    except KeyboardInterrupt:
        print("Interrupted; what was written before is kept.", file=sys.stderr, flush=True)
        sys.stdout.flush()
        os._exit(_INTERRUPTED)  # Python's own end would wait for threads, or abort one that is in a callback
    except BrokenPipeError:  # of a pipe to `head`, say
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise SystemExit(1) from None


def _functions(names: list[str]) -> dict[str, Any]:
    """Commands by name; of several, those that this environment has the packages for."""
    found = {}
    for name in names:
        try:
            found[name] = getattr(import_module(_COMMANDS[name]), name.replace("-", "_"))
        except ModuleNotFoundError as error:
            if len(names) == 1:
                raise CflowError(_missing(error)) from error
    return found


def _missing(error: ModuleNotFoundError) -> str:
    return (
        f"This needs the package {error.name}, which is not installed: an environment that only runs exported files "
        "has no part of training. Install all of it, pip install cflow-plugin, or use another environment."
    )


def _with_shipped_configs(arguments: list[str]) -> list[str]:
    """Let ``--config`` name a config that comes with the package, where the working directory has no such file."""
    found = list(arguments)
    for place, argument in enumerate(arguments):
        option, equals, name = argument.partition("=") if argument.startswith("--") else ("", "", argument)
        if option == "--config" and equals:
            found[place] = f"--config={_file_or_shipped(name)}"
        elif place and arguments[place - 1] == "--config":
            found[place] = _file_or_shipped(argument)
    return found


def _file_or_shipped(name: str) -> str:
    if Path(name).exists():
        return name
    try:
        return str(find_config(name))
    except CflowError:
        return name  # the command line has a message of its own for what is not there
