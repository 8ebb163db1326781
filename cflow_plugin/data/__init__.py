"""Data for the detector beyond what anomalib brings."""

__all__ = ["ShanghaiTechFrames", "Textures"]

from cflow_plugin.anomalib_patches.file_names import accept_any_language
from cflow_plugin.anomalib_patches.registration import publish
from cflow_plugin.data.datamodule import Textures
from cflow_plugin.data.shanghaitech import ShanghaiTechFrames
from cflow_plugin.images.in_anomalib import install

publish("anomalib.data", ShanghaiTechFrames, Textures)
accept_any_language()
install()
