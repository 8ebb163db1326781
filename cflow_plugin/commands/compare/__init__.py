"""How accurate: models side by side on the same data, encoder and protocol, and beside the paper's figures."""

__all__ = ["compare"]

from cflow_plugin.commands.compare.compare import compare
