"""What is said of an image: by a model, by its reference scores, and by what the user has set."""

__all__ = ["HALF", "Following", "Judge"]

import hashlib
import json
import logging
import math
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cflow_plugin.commands.watch.arrivals import Arrival
from cflow_plugin.commands.watch.journal import Result
from cflow_plugin.commands.watch.timeline import Smoother
from cflow_plugin.decisions.conformal import p_values
from cflow_plugin.decisions.reference_scores import read_reference_scores
from cflow_plugin.decisions.regions import Region, find_regions
from cflow_plugin.deploy.runtime import compile_exported
from cflow_plugin.errors import CflowError
from cflow_plugin.images.reading import ImageFileError

logger = logging.getLogger(__name__)

HALF = 0.5
"""Where anomalib's normalisation of scores puts the threshold."""


@dataclass(frozen=True)
class Following:
    """What is followed, and what is done with the results; see :func:`~cflow_plugin.commands.watch.watch.watch`."""

    model: Path
    source: str
    output: Path
    overlays: bool = True
    device: str = "CPU"
    precision: str = "f32"
    limit: int | None = None
    smoothing: float = 0.0
    threshold: float | None = None
    sort: bool = False
    unsure: tuple[float, float] | None = None
    webhook: str | None = None
    mqtt: str | None = None
    page: int | None = None
    host: str = "127.0.0.1"
    sample: int = 100


class Judge:
    """An exported model, and what is said by it.

    Args:
        settings: Of the watch.
        file: The model.

    Attributes:
        file: As given.
        digest: Of the file's content.
        compiled: The model, compiled.
        reference: Scores of its reference images, ascending, or ``None``.

    Raises:
        CflowError: If it cannot be used with these settings.
    """

    def __init__(self, settings: Following, file: Path) -> None:
        self.file = file
        self.compiled = compile_exported(file, settings.device, settings.precision)
        self.digest = hashlib.sha256(file.read_bytes()).hexdigest()
        self.reference = read_reference_scores(file)
        self._unsure, self._threshold = settings.unsure, settings.threshold
        self._smoother, self._smoothing = Smoother(settings.smoothing), settings.smoothing
        if settings.unsure is None:
            return
        if not 0 <= settings.unsure[0] <= settings.unsure[1] <= 1:
            message = f"--unsure is an interval of p-values between 0 and 1, as [0.01,0.1]; got {settings.unsure}."
            raise CflowError(message)
        if self.reference is None:
            message = (
                f"--unsure is an interval of p-values, and {file} holds no reference scores: train with "
                "--model.target_false_alarm_rate."
            )
            raise CflowError(message)
        least = 1 / (len(self.reference) + 1)
        if settings.unsure[0] <= least <= settings.unsure[1]:
            logger.warning(
                "Nothing will be called anomalous: with %d reference images no p-value is below %.3f, and from %g on "
                "--unsure calls images unsure. Begin it above %.3f.",
                len(self.reference),
                least,
                settings.unsure[0],
                least,
            )

    def __call__(self, arrival: Arrival, number: int) -> tuple[Result, Any, list[Region]]:
        """Score an image, and put what the model gave into words.

        Args:
            arrival: The image.
            number: Number of the result.

        Returns:
            The result, what the model gave (``None`` where the image has no score), and the regions in it.
        """
        seen = (number, arrival.name, arrival.stamp, arrival.time)
        if isinstance(arrival.image, ImageFileError):
            return Result(*seen, error=arrival.image.reason), None, []
        start = time.perf_counter()
        found = self.compiled([arrival.image[None]])
        spent = time.perf_counter() - start
        score = float(found["pred_score"][0])
        if not math.isfinite(score):
            return Result(*seen, error="its score is not a finite number"), None, []
        smoothed = self._smoother(arrival.time, score)
        p_value = None if self.reference is None else float(p_values(score, self.reference))
        anomaly_map = found["anomaly_map"][0, 0]
        if self._threshold is None and self._smoothing == 0:
            anomalous, mask = bool(found["pred_label"][0]), found["pred_mask"][0, 0]
        else:
            anomalous = smoothed > (HALF if self._threshold is None else self._threshold)
            mask = (anomaly_map > HALF) & anomalous
        regions = find_regions(anomaly_map, mask, self.compiled.regions, arrival.image.shape[:2]) if mask.any() else []
        is_unsure = self._unsure and p_value is not None and self._unsure[0] <= p_value <= self._unsure[1]
        decision = "unsure" if is_unsure else "anomalous" if anomalous else "good"
        figures = (score, smoothed, p_value, anomalous, decision, 1000 * spent)
        text = json.dumps([region._asdict() for region in regions])
        return Result(*seen, *figures, regions=text), found, regions
