"""Large collections of images, scored by an exported model on one machine or many."""

__all__ = ["score"]

from cflow_plugin.commands.score.score import score
