"""What a run says on the screen: each line once, and nothing that a user cannot use.

- What: wraps ``anomalib.cli.cli.configure_logger``, filters some lines of anomalib's and Lightning's loggers, and takes
  Lightning's summary table out of a run.
- Why: anomalib 2.7 gives the root logger two handlers, so each line comes twice, in two formats. Lightning announces
  what it looks for ("TPU available: False") and what it advertises. Its table says "train" for a frozen encoder, and
  "Total FLOPs: 0".
- Since: anomalib 1.0, Lightning 2.6.
- Upstream: to be reported to anomalib: one handler. No report is known.
- Can go: when ``configure_logger`` adds one handler; the filters, when Lightning says less.
"""

__all__ = ["keep_quiet", "leave_out_summary", "log_each_line_once"]

import logging
import re
import warnings

from lightning import Trainer
from lightning.pytorch.callbacks import Callback, ModelSummary, RichModelSummary
from rich.logging import RichHandler

_LOGGERS = (
    "anomalib.callbacks",
    "anomalib.engine.engine",
    "anomalib.models.components.base.anomalib_module",
    "lightning.fabric.utilities.rank_zero",
    "lightning.pytorch.utilities.rank_zero",
    "lightning_fabric.utilities.rank_zero",
)
_SUPERFLUOUS = re.compile(
    r"GPU available: |TPU available: |💡 Tip: |Loading `train_dataloader` to estimate|Loading the callbacks"
    r"|Overriding num_sanity_val_steps|Initializing \w+ model|`Trainer.fit` stopped: "
    r"|The following callbacks returned in `LightningModule"
)


def _has_news(record: logging.LogRecord) -> bool:
    return record.levelno > logging.INFO or _SUPERFLUOUS.match(record.getMessage()) is None


def keep_quiet() -> None:
    """Leave out what Lightning and anomalib say of every run."""
    for name in _LOGGERS:
        logging.getLogger(name).addFilter(_has_news)  # the same filter is not added twice
    # The recipe has a length of its own, and the encoder is in eval mode by intention.
    warnings.filterwarnings("ignore", message=".*max_epochs. was not set")
    warnings.filterwarnings("ignore", message=".*in eval mode at the start of training")
    # Of Lightning 2.6 with torch 2.14, about its own code.
    warnings.filterwarnings("ignore", message=".*isinstance.treespec, LeafSpec.. is deprecated")


def log_each_line_once() -> None:
    """Let anomalib's command line log by one handler, without time and place."""
    from anomalib.cli import cli

    configure = cli.configure_logger  # pyright: ignore[reportPrivateImportUsage]

    def configure_once(level: int | str = logging.INFO) -> None:
        configure(level)
        keep_quiet()
        root, lightning = logging.getLogger(), logging.getLogger("lightning.pytorch")
        for logger in (root, lightning):
            for handler in list(logger.handlers):
                if type(handler) in {logging.StreamHandler, RichHandler}:
                    logger.removeHandler(handler)
        lightning.propagate = True
        root.addHandler(RichHandler(rich_tracebacks=True, show_time=False, show_path=False))

    cli.configure_logger = configure_once  # pyright: ignore[reportPrivateImportUsage]


def leave_out_summary(trainer: Trainer) -> None:
    """Take Lightning's own summary tables out of a run.

    Args:
        trainer: The trainer, being set up.
    """
    callbacks: list[Callback] = vars(trainer)["callbacks"]
    callbacks[:] = [one for one in callbacks if type(one) not in {ModelSummary, RichModelSummary}]
