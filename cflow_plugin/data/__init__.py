"""Data for the detector beyond what anomalib brings."""

__all__ = ["ShanghaiTechFrames", "Textures"]

import sys

from cflow_plugin.data.datamodule import Textures
from cflow_plugin.data.paths import accept_any_language
from cflow_plugin.data.shanghaitech import ShanghaiTechFrames

# anomalib looks data modules up by name among the attributes of its own package, which may be only half imported now.
sys.modules["anomalib.data"].ShanghaiTechFrames = ShanghaiTechFrames
sys.modules["anomalib.data"].Textures = Textures
accept_any_language()
