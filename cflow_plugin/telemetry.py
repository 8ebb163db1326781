"""NNCF's report of its use, which is switched off in processes that this package starts."""

__all__ = ["switch_off_telemetry"]

import sys


def switch_off_telemetry() -> None:
    """Keep NNCF from reporting over the network; to be called before anything heavy is imported.

    It does so by a process that it starts while this one is still importing OpenCV, whose passing change of the import
    path makes that process fail with a stack trace now and then.
    """
    sys.modules.setdefault("openvino_telemetry", None)
