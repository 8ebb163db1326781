"""timm's checks of shapes, found in a traced network.

- What: recognises calls of ``torch._assert``.
- Why: torch.fx keeps such calls, since dead code elimination takes them for effects. They hold on to the layers whose
  output they check, which a truncated network has no use for.
- Since: timm 0.6, torch 1.8.
- Upstream: none needed: torch documents ``torch._assert`` for traced code in spite of its name.
- Can go: when layers inside a stage are taken without tracing.
"""

__all__ = ["is_shape_check"]

import torch
from torch import fx


def is_shape_check(node: fx.Node) -> bool:
    """Whether a node of a traced network does nothing but raise an error.

    Args:
        node: The node.
    """
    return node.target is torch._assert  # noqa: SLF001
