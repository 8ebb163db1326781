"""Data for the detector beyond what anomalib brings."""

__all__ = ["Textures"]

from cflow_plugin.data.datamodule import Textures
