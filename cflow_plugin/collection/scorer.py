"""Images in, rows out: what both engines do with a batch."""

__all__ = ["Scorer", "Settings"]

import threading
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

import cv2
import numpy as np

from cflow_plugin.collection.parts import Row
from cflow_plugin.exported import compile_exported
from cflow_plugin.sources import read_image


@dataclass(frozen=True)
class Settings:
    """How images are scored.

    Attributes:
        model: The exported model.
        root: What relative paths are relative to.
        maps: Whether anomaly maps are wanted.
        device: OpenVINO device.
        precision: What OpenVINO computes in where the model is not INT8.
        threads: CPU threads; all where ``None``.
    """

    model: Path
    root: Path
    maps: bool
    device: str
    precision: str
    threads: int | None


class Scorer:
    """An exported model with threads that read images, run it and pack its maps.

    Each thread has a request of its own to the model and takes an image all the way, so no more images are in memory
    than there are threads, and one is read while another is scored.

    Args:
        settings: How images are scored.
    """

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self._compiled = compile_exported(
            settings.model, settings.device, settings.precision, "THROUGHPUT", settings.threads
        )
        streams = self._compiled.get_property("OPTIMAL_NUMBER_OF_INFER_REQUESTS")
        self._threads = ThreadPoolExecutor(streams + 1)
        self._own = threading.local()

    def __call__(self, batches: Iterable[list[str]]) -> Iterator[tuple[list[str], list[Row]]]:
        """Score batches, the next being begun before the last is finished.

        Args:
            batches: Paths.

        Yields:
            Each batch and its rows, in their order.
        """
        waiting: tuple[list[str], list[Future[Row]]] | None = None
        try:
            for batch in chain(batches, [None]):
                begun = None if batch is None else (batch, [self._threads.submit(self.row, path) for path in batch])
                waiting, ready = begun, waiting
                if ready is not None:
                    yield ready[0], [future.result() for future in ready[1]]
        finally:
            for future in waiting[1] if waiting else []:
                future.cancel()

    def row(self, path: str) -> Row:
        """Score one image; whatever is wrong with it becomes its error.

        Args:
            path: Its path.
        """
        try:
            image = read_image(self.settings.root / path)
        except OSError as error:
            return Row(path, error=f"could not be read: {error.strerror or error}")
        except (ValueError, cv2.error, MemoryError) as error:
            return Row(path, error=f"could not be read: {error}")
        if image is None:
            return Row(path, error="could not be read as an image")
        if not hasattr(self._own, "request"):
            self._own.request = self._compiled.create_infer_request()
        try:
            result = self._own.request.infer([image[None]])
        except RuntimeError as error:
            return Row(path, error=f"could not be scored: {str(error).strip().splitlines()[-1]}")
        score = float(result["pred_score"][0])
        if not np.isfinite(score):
            return Row(path, error="could not be scored: the score is not a finite number")
        anomaly_map = _png(result["anomaly_map"][0, 0]) if self.settings.maps else None
        return Row(path, score, bool(result["pred_label"][0]), None, anomaly_map)

    def close(self) -> None:
        """End the threads."""
        self._threads.shutdown(cancel_futures=True)


def _png(anomaly_map: np.ndarray) -> bytes:
    levels = np.rint(255 * np.clip(anomaly_map, 0, 1)).astype(np.uint8)
    return cv2.imencode(".png", levels)[1].tobytes()
