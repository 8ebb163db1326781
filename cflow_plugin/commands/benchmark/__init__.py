"""How fast and how large: this model beside others, and beside the paper's Table 6."""

__all__ = ["benchmark"]

from cflow_plugin.commands.benchmark.speed import benchmark
