"""What the page shows: the last images, the last scores, and what is to be said of them."""

__all__ = ["Live", "Seen"]

import math
import threading
import time
from collections import deque
from pathlib import Path
from typing import Any, NamedTuple

import cv2
import numpy as np

from cflow_plugin.commands.watch.arrivals import Arrival, Health
from cflow_plugin.commands.watch.journal import Result
from cflow_plugin.commands.watch.judging import HALF, Judge
from cflow_plugin.commands.watch.overlay import overlay
from cflow_plugin.commands.watch.page.models import Models
from cflow_plugin.commands.watch.page.review import Review
from cflow_plugin.decisions.conformal import p_values, threshold_rank
from cflow_plugin.decisions.exchangeability import ExchangeabilityTest
from cflow_plugin.decisions.regions import Region, RegionSettings
from cflow_plugin.errors import CflowError
from cflow_plugin.images.reading import in_8_bits, read_image

_IMAGES = 12  # of each of two kinds, good and not good
_APART = 0.5  # seconds between two good images that are shown
_SCORES = 500
_WIDTH = 640  # pixels of an image on the page
_ERROR_RATE = 0.01
_BINS = 20
_MOST = 100_000  # images after which the test of a change begins anew


class Seen(NamedTuple):
    """An image that can be shown."""

    result: Result
    path: Path | None
    image: np.ndarray
    anomaly_map: np.ndarray
    regions: tuple[list[Region], RegionSettings]


class Live:
    """The state behind the page, filled by the watch and read by the server.

    Args:
        judge: The model in use.
        health: How the watch fares.
        review: What is said of images.
        models: Those that may be used.
        threshold: Scores above it are anomalous; ``None`` where the model decides.

    Attributes:
        review: As given.
        models: As given.
    """

    def __init__(
        self, judge: Judge, health: Health, review: Review, models: Models, threshold: float | None = None
    ) -> None:
        self._health, self.review, self.models = health, review, models
        self._threshold = HALF if threshold is None else threshold
        self._good: deque[Seen] = deque(maxlen=_IMAGES)
        self._other: deque[Seen] = deque(maxlen=_IMAGES)
        self._last: deque[Result] = deque(maxlen=_SCORES)
        self._lock = threading.Lock()
        self.begin(judge)

    def begin(self, judge: Judge) -> None:
        """Go on with a model; what is known of another's scores is forgotten.

        Args:
            judge: The model.
        """
        with self._lock:
            self._reference, self._bits = judge.reference, judge.compiled.bits
            for kept in (self._good, self._other, self._last):
                kept.clear()
            self._begin()

    def _begin(self) -> None:
        self._test = None if self._reference is None else ExchangeabilityTest(self._reference)
        self._tested, self._most, self._since = 0, 0.0, time.time()

    def add(
        self,
        result: Result,
        arrival: Arrival,
        anomaly_map: np.ndarray,
        regions: tuple[list[Region], RegionSettings],
    ) -> None:
        """Take in a result; the image is kept as it is, and drawn when somebody looks."""
        assert result.score is not None
        assert isinstance(arrival.image, np.ndarray)
        with self._lock:
            self._last.append(result)
            if self._test is not None:
                if self._tested >= _MOST:
                    self._begin()
                self._test.update(result.score)
                self._tested += 1
                self._most = max(self._most, self._test.log_capital)
            kind = self._good if result.decision == "good" else self._other
            if not kind or result.time - kind[-1].result.time >= _APART:
                kind.append(Seen(result, arrival.path, arrival.image, anomaly_map.copy(), regions))

    def seen(self, number: int) -> Seen | None:
        """An image that is still at hand."""
        with self._lock:
            return next((seen for seen in [*self._good, *self._other] if seen.result.number == number), None)

    def picture(self, number: int) -> bytes | None:
        """An image under its map, as JPEG."""
        seen = self.seen(number)
        if seen is None:
            return None
        image = in_8_bits(seen.image, self._bits)
        assert seen.result.smoothed is not None
        return _jpeg(overlay(image, seen.anomaly_map, seen.result.smoothed, seen.result.decision, seen.regions))

    def state(self) -> dict[str, Any]:
        """All that the page shows, for JSON."""
        with self._lock:
            last, shown = list(self._last), [*self._good, *self._other]
        scores = [result.score for result in last if result.score is not None]
        edges = np.linspace(0, 1, _BINS + 1)
        health = _health(self._health)
        return {
            **health,
            "images": sorted((_brief(seen.result) for seen in shown), key=lambda found: -found["number"]),
            "scores": [[round(result.time, 3), result.smoothed, result.decision] for result in last],
            "recent": np.histogram(np.clip(scores, 0, 1), edges)[0].tolist(),
            "reference": [] if self._reference is None else np.histogram(self._reference, edges)[0].tolist(),
            "threshold": self._threshold,
            "verdict": self._verdict(),
            "sample": self.review.sample(),
            "models": self.models.known(),
            "retrain": self.review.command(),
            "fixed": self.models.why_not(),
        }

    def drawn(self, name: str) -> bytes | None:
        """An image of the sample, as it is, as JPEG; its score is not shown, so that it sways nobody."""
        file = self.review.drawn(name)
        if file is None:
            return None
        return _jpeg(in_8_bits(read_image(file, self._bits), self._bits))

    def would(self, rate: float) -> dict[str, Any]:
        """What would have been decided of the last images with another false-alarm rate.

        Args:
            rate: The rate.

        Raises:
            CflowError: If the reference images are too few for it, or there are none.
        """
        if self._reference is None:
            message = "The model has no reference scores: train with --model.target_false_alarm_rate."
            raise CflowError(message)
        rank = threshold_rank(len(self._reference), rate)
        with self._lock:
            scores = [result.score for result in self._last if result.score is not None]
        anomalous = int(np.sum(p_values(scores, self._reference) <= rate)) if scores else 0
        return {"threshold": float(self._reference[rank - 1]), "anomalous": anomalous, "images": len(scores)}

    def _verdict(self) -> str:
        if self._test is None:
            return "The model has no reference scores, so a change cannot be told from chance."
        since = time.strftime("%Y-%m-%d %H:%M", time.localtime(self._since))
        if self._most >= math.log(1 / _ERROR_RATE):
            return (
                f"CHANGED: the scores of {self._tested} images since {since} no longer fit the good ones. Check the "
                "camera, the light and the parts."
            )
        return f"No change: {self._tested} images since {since} score as the good ones (error rate {_ERROR_RATE:.0%})."

    def mark(self, number: int, what: str, who: str) -> str:
        """Copy an image to the review folder, and note who called it what.

        Args:
            number: The result's number.
            what: ``good`` or ``defect``.
            who: Who says so.

        Returns:
            Where the copy is, below the output folder.

        Raises:
            CflowError: If the image is no longer at hand.
        """
        seen = self.seen(number)
        if seen is None:
            message = "This image is no longer at hand."
            raise CflowError(message)
        return self.review.pick(seen.result, seen.path, seen.image, what, who)


def _jpeg(picture: np.ndarray) -> bytes:
    scale = min(1.0, _WIDTH / max(picture.shape[:2]))
    if scale < 1:
        picture = cv2.resize(picture, None, fx=scale, fy=scale, interpolation=cv2.INTER_AREA)
    return cv2.imencode(".jpg", picture)[1].tobytes()


def _health(health: Health) -> dict[str, Any]:
    """What a page may know of how the watch fares."""
    return {
        "scored": health.scored,
        "dropped": health.dropped,
        "lost": health.lost,
        "troubles": [words for words in [health.source, *list(health.receivers.values())] if words],
    }


def _brief(result: Result) -> dict[str, Any]:
    names = ("number", "image", "time", "score", "p_value", "decision")
    return {name: getattr(result, name) for name in names}
