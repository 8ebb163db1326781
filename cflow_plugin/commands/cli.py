"""The ``cflow-plugin`` command: what anomalib's own command line has no place for."""

__all__ = ["main"]

import logging
import os
import sys
import warnings
from importlib import import_module

from jsonargparse import auto_cli

from cflow_plugin.anomalib_patches.error_hook import install_excepthook

_COMMANDS = {
    "benchmark": "cflow_plugin.commands.benchmark",
    "compare": "cflow_plugin.commands.compare",
    "import-checkpoint": "cflow_plugin.commands.import_checkpoint",
    "make-scenes": "cflow_plugin.commands.make_scenes",
    "monitor": "cflow_plugin.commands.monitor",
    "score": "cflow_plugin.commands.score",
    "watch": "cflow_plugin.commands.watch.watch",
}


def main(arguments: list[str] | None = None) -> None:
    """Run a subcommand."""
    install_excepthook()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    arguments = sys.argv[1:] if arguments is None else arguments
    # anomalib's and timm's imports warn of each other; a user can do nothing about it.
    warnings.filterwarnings("ignore", category=FutureWarning)
    os.environ.setdefault("PYTHONWARNINGS", "ignore::FutureWarning")  # in processes that are started, too
    if arguments[:1] == ["import-checkpoint"] and len(arguments) > 1 and not arguments[1].startswith("-"):
        arguments = [arguments[0], "--checkpoint", *arguments[1:]]
    # Some import all of anomalib, which those that run exported models have no need of.
    wanted = [name for name in _COMMANDS if name in arguments[:1]] or list(_COMMANDS)
    functions = {name: getattr(import_module(_COMMANDS[name]), name.replace("-", "_")) for name in wanted}
    auto_cli(functions, args=arguments, as_positional=False, prog="cflow-plugin")
