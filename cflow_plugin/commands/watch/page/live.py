"""What the page shows: the last images, the last scores, and what is to be said of them."""

__all__ = ["Live", "Seen"]

import csv
import math
import re
import threading
import time
from collections import deque
from pathlib import Path
from typing import Any, NamedTuple

import cv2
import numpy as np

from cflow_plugin.commands.watch.arrivals import Arrival, Health
from cflow_plugin.commands.watch.journal import Result
from cflow_plugin.commands.watch.overlay import overlay
from cflow_plugin.decisions.conformal import p_values, threshold_rank
from cflow_plugin.decisions.exchangeability import ExchangeabilityTest
from cflow_plugin.decisions.regions import Region, RegionSettings
from cflow_plugin.errors import CflowError
from cflow_plugin.images.reading import in_8_bits

_IMAGES = 12  # of each of two kinds, good and not good
_APART = 0.5  # seconds between two good images that are shown
_SCORES = 500
_WIDTH = 640  # pixels of an image on the page
_ERROR_RATE = 0.01
_BINS = 20
_MOST = 100_000  # images after which the test of a change begins anew
_LAST_WORDS = {"good": "good after all", "defect": "defect missed"}


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
        reference: Scores of the reference images, ascending, or ``None``.
        bits: Bits of a value in images.
        health: How the watch fares.
        review: Folder for images that are marked.
        threshold: Scores above it are anomalous.
    """

    def __init__(
        self, reference: np.ndarray | None, bits: int, health: Health, review: Path, threshold: float = 0.5
    ) -> None:
        self._reference, self._bits, self._health, self._review = reference, bits, health, review
        self._threshold = threshold
        self._good: deque[Seen] = deque(maxlen=_IMAGES)
        self._other: deque[Seen] = deque(maxlen=_IMAGES)
        self._last: deque[Result] = deque(maxlen=_SCORES)
        self._lock = threading.Lock()
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
        picture = overlay(image, seen.anomaly_map, seen.result.smoothed, seen.result.decision, seen.regions)
        scale = min(1.0, _WIDTH / max(image.shape[:2]))
        if scale < 1:
            picture = cv2.resize(picture, None, fx=scale, fy=scale, interpolation=cv2.INTER_AREA)
        return cv2.imencode(".jpg", picture)[1].tobytes()

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
        }

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
        name = re.sub(r"[^\w.-]", "_", seen.result.image)
        target = self._review / what / f"{number}_{name if seen.path else f'{name}.png'}"
        target.parent.mkdir(parents=True, exist_ok=True)
        if seen.path is not None and seen.path.is_file():
            target.write_bytes(seen.path.read_bytes())
        else:
            target = target.with_suffix(".png")
            target.write_bytes(cv2.imencode(".png", seen.image)[1].tobytes())
        log = self._review / "log.csv"
        with self._lock:
            is_new = not log.exists()
            with log.open("a", newline="", encoding="utf-8") as file:
                table = csv.writer(file)
                if is_new:
                    table.writerow(["time", "who", "what", "number", "image", "score", "p_value", "decision", "copy"])
                result = seen.result
                figures = [result.number, result.image, result.score, result.p_value, result.decision]
                table.writerow([f"{time.time():.3f}", who, _LAST_WORDS[what], *figures, target.name])
        return target.relative_to(self._review.parent).as_posix()


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
