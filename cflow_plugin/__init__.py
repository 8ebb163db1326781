"""CFLOW-AD for anomalib: unsupervised anomaly detection with localization by conditional normalizing flows."""

__all__ = ["CflowError", "CflowPlugin", "Spade", "__version__"]

TYPE_CHECKING = False  # importing it takes its time, at every start of Python
if TYPE_CHECKING:
    from cflow_plugin.baselines.spade import Spade
    from cflow_plugin.errors import CflowError
    from cflow_plugin.training.lightning_model import CflowPlugin

__version__ = "0.1.0"

_MODULES = {
    "CflowError": "cflow_plugin.errors",
    "CflowPlugin": "cflow_plugin.training.lightning_model",
    "Spade": "cflow_plugin.baselines.spade",
}


def __getattr__(name: str) -> object:
    # Python imports this package at every start (see startup.py), so nothing heavy is imported before it is asked for.
    if name in _MODULES:
        from importlib import import_module

        return getattr(import_module(_MODULES[name]), name)
    msg = f"module {__name__!r} has no attribute {name!r}"
    raise AttributeError(msg)
