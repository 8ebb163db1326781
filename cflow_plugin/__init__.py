"""CFLOW-AD for anomalib: unsupervised anomaly detection with localization by conditional normalizing flows."""

__all__ = ["CflowError", "CflowPlugin", "__version__"]

__version__ = "0.1.0"


def __getattr__(name: str) -> object:
    # Python imports this package at every start (see startup.py), so nothing heavy is imported before it is asked for.
    if name == "CflowPlugin":
        from cflow_plugin.lightning_model import CflowPlugin

        return CflowPlugin
    if name == "CflowError":
        from cflow_plugin.errors import CflowError

        return CflowError
    msg = f"module {__name__!r} has no attribute {name!r}"
    raise AttributeError(msg)
