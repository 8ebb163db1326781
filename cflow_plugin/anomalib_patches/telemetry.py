"""NNCF's report of its use, switched off in processes that this package starts.

- What: puts ``None`` in the place of the module ``openvino_telemetry``.
- Why: NNCF 3.4 reports over the network, by a process that it starts while this one is still importing OpenCV, whose
  passing change of the import path makes that process fail with a stack trace now and then. There is no other switch
  that works before the import.
- Since: NNCF 2.0.
- Upstream: to be reported: an environment variable that opts out. No report is known.
- Can go: when there is such a variable.
"""

__all__ = ["switch_off_telemetry"]

import sys


def switch_off_telemetry() -> None:
    """Keep NNCF from reporting over the network; to be called before anything heavy is imported."""
    sys.modules.setdefault("openvino_telemetry", None)  # pyright: ignore[reportArgumentType]  documented by Python
