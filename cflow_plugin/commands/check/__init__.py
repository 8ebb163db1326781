"""One decision wherever it is made: an exported file in every runtime at hand, and against what it says of itself."""

__all__ = ["check"]

from cflow_plugin.commands.check.check import check
