"""SPADE (Cohen and Hoshen, 2020): nearest neighbours, first among images, then among their positions."""

__all__ = ["Spade"]

from cflow_plugin.baselines.spade.lightning_model import Spade
