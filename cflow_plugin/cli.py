"""The ``cflow-plugin`` command: what anomalib's own command line has no place for."""

__all__ = ["main"]

import logging
import os
import sys
import warnings

from jsonargparse import auto_cli

from cflow_plugin.errors import install_excepthook


def main(arguments: list[str] | None = None) -> None:
    """Run a subcommand."""
    install_excepthook()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    arguments = sys.argv[1:] if arguments is None else arguments
    # anomalib's and timm's imports warn of each other; a user can do nothing about it.
    warnings.filterwarnings("ignore", category=FutureWarning)
    os.environ.setdefault("PYTHONWARNINGS", "ignore::FutureWarning")  # in processes that are started, too
    from cflow_plugin.benchmark import benchmark
    from cflow_plugin.collection import score
    from cflow_plugin.comparison import compare
    from cflow_plugin.data.scenes import make_scenes
    from cflow_plugin.import_checkpoint import import_checkpoint
    from cflow_plugin.monitor import monitor
    from cflow_plugin.watch import watch

    if arguments[:1] == ["import-checkpoint"] and len(arguments) > 1 and not arguments[1].startswith("-"):
        arguments = [arguments[0], "--checkpoint", *arguments[1:]]
    commands = {
        "benchmark": benchmark,
        "compare": compare,
        "import-checkpoint": import_checkpoint,
        "make-scenes": make_scenes,
        "monitor": monitor,
        "score": score,
        "watch": watch,
    }
    auto_cli(commands, args=arguments, as_positional=False, prog="cflow-plugin")
