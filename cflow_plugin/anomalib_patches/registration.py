"""Models and data modules among the attributes of anomalib's own packages.

- What: sets ``anomalib.models.CflowPlugin``, ``anomalib.models.Spade`` and the data modules in ``anomalib.data``.
- Why: anomalib has no plug-in hook. ``anomalib benchmark`` and a data module's short name are looked up with
  ``getattr`` on these packages.
- Since: anomalib 2.7 (2.0 was the first to look up so).
- Upstream: to be asked for: entry points, say a group ``anomalib.models``. No report is known.
- Can go: when anomalib reads entry points.
"""

__all__ = ["publish"]

import sys


def publish(package: str, *classes: type) -> None:
    """Make classes attributes of one of anomalib's packages.

    Args:
        package: The package, which may be only half imported yet.
        *classes: What becomes known there under its own name.
    """
    for one in classes:
        setattr(sys.modules[package], one.__name__, one)
