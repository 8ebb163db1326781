"""The ``cflow-plugin`` command: what anomalib's own command line has no place for."""

__all__ = ["main"]

import logging
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
    from cflow_plugin.benchmark import benchmark
    from cflow_plugin.monitor import monitor
    from cflow_plugin.watch import watch

    commands = {"benchmark": benchmark, "monitor": monitor, "watch": watch}
    auto_cli(commands, args=arguments, as_positional=False, prog="cflow-plugin")
