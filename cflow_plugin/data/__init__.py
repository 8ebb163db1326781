"""Data for the detector beyond what anomalib brings."""

__all__ = ["Textures"]

from cflow_plugin.data.datamodule import Textures

# anomalib looks data modules up by name among the attributes of its own package.
import anomalib.data

anomalib.data.Textures = Textures
