"""``seed_everything`` on anomalib's command line.

- What: wraps ``AnomalibCLI.instantiate_classes``.
- Why: anomalib 2.7 declares the option for all its commands and ignores it: three equal commands gave three models.
- Since: anomalib 2.0.
- Upstream: to be reported. No report is known.
- Can go: when ``anomalib train --seed_everything 1`` seeds before it builds the model.
"""

__all__ = ["honour_seed"]

from functools import wraps


def honour_seed() -> None:
    """Let `anomalib train` and its other commands seed everything before they build model and data."""
    from anomalib.cli.cli import AnomalibCLI

    build = AnomalibCLI.instantiate_classes

    @wraps(build)
    def seeded(self: AnomalibCLI) -> None:
        settings = self.config.get(self.config.get("subcommand"))
        seed = settings.get("seed_everything") if settings is not None else None
        if isinstance(seed, int) and not isinstance(seed, bool):
            from lightning import seed_everything

            seed_everything(seed, workers=True, verbose=False)
        build(self)

    AnomalibCLI.instantiate_classes = seeded
