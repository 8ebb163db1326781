"""Whether somebody has asked for the length that a run has.

- What: wraps ``_parse_loop_limits`` where ``lightning.pytorch.trainer.trainer`` calls it.
- Why: Lightning 2.6 puts 1000 in the place of a ``max_epochs`` that was not given. Afterwards a trainer of which
  somebody wants 1000 epochs looks the same.
- Since: Lightning 1.0.
- Upstream: to be asked for: a ``FitLoop`` that knows. No report is known.
- Can go: when a trainer says what it was given.
"""

__all__ = ["is_open", "note_lengths"]

from functools import wraps
from typing import Any

from lightning import Trainer
from lightning.pytorch.trainer import trainer as lightning_trainer

_GIVEN = "cflow_plugin_given_epochs"
_DEFAULT = 1000


def note_lengths() -> None:
    """Let each trainer note, when it begins to train, which ``max_epochs`` it was given."""
    original = lightning_trainer._parse_loop_limits  # noqa: SLF001  # pyright: ignore[reportPrivateImportUsage]
    if hasattr(original, "__wrapped__"):
        return

    @wraps(original)
    def noting(
        min_steps: int | None, max_steps: int, min_epochs: int | None, max_epochs: int | None, trainer: Trainer
    ) -> Any:
        vars(trainer)[_GIVEN] = max_epochs
        return original(min_steps, max_steps, min_epochs, max_epochs, trainer)

    setattr(lightning_trainer, original.__name__, noting)


def is_open(trainer: Trainer) -> bool:
    """Whether nobody has asked for a length.

    Args:
        trainer: The trainer, being set up.
    """
    return trainer.fit_loop.max_epochs == _DEFAULT and vars(trainer).get(_GIVEN) is None
