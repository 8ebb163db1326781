"""How anomalib learns of the models without the user importing anything.

The wheel installs ``cflow_plugin.pth``, whose one line calls :func:`install` when Python starts. That adds a finder
to ``sys.meta_path``, which does nothing until somebody imports one of three anomalib modules; after each has been
imported, the matching part of this package is imported as well. Only parts of the standard library that are loaded
already are used, nothing here raises, and ``CFLOW_PLUGIN_AUTOLOAD=0`` switches it off.

- What: a finder in ``sys.meta_path``.
- Why: anomalib finds a model by name only among the classes already imported, and has no plug-in hook.
- Since: anomalib 1.0.
- Upstream: to be asked for: entry points. No report is known.
- Can go: when anomalib reads entry points.
"""

__all__ = ["install"]

import os
import sys

# After this module of anomalib has been imported: what to import of ours, and the function to call in each, if any.
_AFTER = {
    "anomalib.models": (("cflow_plugin.training.lightning_model", None), ("cflow_plugin.baselines.spade", None)),
    "anomalib.data": (("cflow_plugin.data", None),),
    # rich installs its own hook for uncaught errors in this module; ours has to come later.
    "anomalib.cli.cli": (
        ("cflow_plugin.anomalib_patches.error_hook", "install_excepthook"),
        ("cflow_plugin.anomalib_patches.error_hook", "keep_our_errors"),
        ("cflow_plugin.anomalib_patches.seed", "honour_seed"),
        ("cflow_plugin.anomalib_patches.screen", "log_each_line_once"),
    ),
}


# What waits for a module of ours that is being imported itself, and has led to anomalib's import.
_waiting = []
# The modules of ours that are being imported.
_unfinished = []


class _Loader:
    """The module's own loader, followed by the imports of ours."""

    def __init__(self, loader, ours):
        self._loader = loader
        self._ours = ours

    def __getattr__(self, name):
        return getattr(self._loader, name)

    def create_module(self, spec):
        return self._loader.create_module(spec)

    def exec_module(self, module):
        module.__spec__.loader = module.__loader__ = self._loader
        import warnings

        with warnings.catch_warnings():
            # anomalib and timm announce to each other what will change; a user can do nothing about it.
            warnings.simplefilter("ignore", FutureWarning)
            self._loader.exec_module(module)
        for name, function in self._ours:
            _load(name, function)


class _OwnLoader(_Loader):
    """The loader of a module of ours, followed by what waits for it."""

    def exec_module(self, module):
        module.__spec__.loader = module.__loader__ = self._loader
        _unfinished.append(module)
        try:
            self._loader.exec_module(module)
        finally:
            _unfinished.remove(module)
        if not _unfinished:
            todo = list(_waiting)
            _waiting.clear()
            for name, function in todo:
                _load(name, function)


def _load(name, function):
    try:
        __import__(name)
        if function:
            getattr(sys.modules[name], function)()
    except Exception as error:  # a broken plug-in must not break anomalib
        if _unfinished and "partially initialized module 'cflow_plugin" in str(error):
            _waiting.append((name, function))
        else:
            print(f"cflow_plugin could not be loaded ({type(error).__name__}: {error})", file=sys.stderr)


class _Finder:
    """Finds the modules above as Python would, and exchanges their loaders."""

    @staticmethod
    def find_spec(name, path=None, target=None):
        own = name.startswith("cflow_plugin.")
        if not own and name not in _AFTER:
            return None
        from importlib.machinery import PathFinder

        spec = PathFinder.find_spec(name, path, target)
        if spec is not None and spec.loader is not None:
            ours = _AFTER.get(name, ())
            spec.loader = (_OwnLoader if own else _Loader)(spec.loader, ours)  # pyright: ignore[reportAttributeAccessIssue]
        return spec


def install():
    """Add the finder, once, unless the environment forbids it."""
    if os.environ.get("CFLOW_PLUGIN_AUTOLOAD") != "0" and _Finder not in sys.meta_path:
        sys.meta_path.insert(0, _Finder)
