"""Images in, rows out: what both engines do with a batch."""

__all__ = ["Scorer", "Settings", "Source"]

import io
import json
import os
from collections import deque
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
import openvino as ov

from cflow_plugin.commands.score.parts import Row
from cflow_plugin.decisions.conformal import p_values
from cflow_plugin.decisions.reference_scores import read_reference_scores
from cflow_plugin.decisions.regions import find_regions
from cflow_plugin.deploy.runtime import compile_exported
from cflow_plugin.images.reading import ImageFileError, contradiction, read_image

_READ_AHEAD = 2**29  # bytes of images that wait

Source = str | bytes | np.ndarray
"""An image: its file's path or content, or what :func:`~cflow_plugin.images.reading.read_image` makes of it."""


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
    """An exported model, with threads that read images ahead of it.

    Only the thread that calls it hands images to OpenVINO: its requests must not be filled by several Python threads,
    which can wait for each other for ever.

    Args:
        settings: How images are scored.
    """

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        model = compile_exported(settings.model, settings.device, settings.precision, "THROUGHPUT", settings.threads)
        compiled, self._bits, self._regions = model.compiled, model.bits, model.regions
        self._reference = read_reference_scores(settings.model)
        self._queue = ov.AsyncInferQueue(compiled)
        self._queue.set_callback(self._keep)
        self._alone = compiled.create_infer_request()
        self._ahead = len(self._queue)  # images in memory, until one has shown how large they are
        self._readers = ThreadPoolExecutor(settings.threads or os.cpu_count() or 1)

    def __call__(self, batch: Sequence[Source]) -> list[Row]:
        """Score a batch; whatever is wrong with an image becomes the error of its row.

        Args:
            batch: Images.

        Returns:
            A row for each, in this order; without a path where an image has none.
        """
        rows: list[Row | None] = [None] * len(batch)
        reading: deque[tuple[int, Future[np.ndarray | str]]] = deque()
        for place, source in enumerate(batch):
            reading.append((place, self._readers.submit(self._read, source)))
            while len(reading) > self._ahead:
                self._start(batch, rows, *reading.popleft())
        while reading:
            self._start(batch, rows, *reading.popleft())
        try:
            self._queue.wait_all()
        except RuntimeError:  # of an image, but it does not say of which; those without a row are tried one by one
            self._queue = ov.AsyncInferQueue(self._alone.get_compiled_model())
            self._queue.set_callback(self._keep)
        return [row or self._once_more(source) for row, source in zip(rows, batch, strict=True)]

    def _read(self, source: Source) -> np.ndarray | str:
        try:
            if isinstance(source, np.ndarray):
                return contradiction(source, self._bits) or source
            return read_image(
                io.BytesIO(source) if isinstance(source, bytes) else self.settings.root / source, self._bits
            )
        except ImageFileError as error:
            return f"cannot be used as an image: {error.reason}"

    def _start(
        self, batch: Sequence[Source], rows: list[Row | None], place: int, reader: Future[np.ndarray | str]
    ) -> None:
        image = reader.result()
        if isinstance(image, str):
            rows[place] = Row(_path(batch[place]), error=image)
            return
        self._ahead = max(1, min(2 * len(self._queue) + 2, _READ_AHEAD // max(1, image.nbytes)))
        with suppress(RuntimeError):  # without a row it is tried again, alone
            self._queue.start_async([image[None]], (batch, rows, place, image.shape[:2]))

    def _keep(
        self, request: ov.InferRequest, job: tuple[Sequence[Source], list[Row | None], int, tuple[int, int]]
    ) -> None:
        batch, rows, place, size = job
        rows[place] = self._row(_path(batch[place]), request, size)

    def _once_more(self, source: Source) -> Row:
        image, path = self._read(source), _path(source)
        if isinstance(image, str):
            return Row(path, error=image)
        try:
            self._alone.infer([image[None]])
        except RuntimeError as error:
            return Row(path, error=f"could not be scored: {str(error).strip().splitlines()[-1]}")
        return self._row(path, self._alone, image.shape[:2])

    def _row(self, path: str, request: ov.InferRequest, size: tuple[int, int]) -> Row:
        score = float(request.get_tensor("pred_score").data.flat[0])
        if not np.isfinite(score):
            return Row(path, error="could not be scored: the score is not a finite number")
        found = request.get_tensor("anomaly_map").data[0, 0]
        mask = request.get_tensor("pred_mask").data[0, 0]
        regions = json.dumps([region._asdict() for region in find_regions(found, mask, self._regions, size)])
        anomaly_map = _png(found) if self.settings.maps else None
        anomalous = bool(request.get_tensor("pred_label").data.flat[0])
        p_value = None if self._reference is None else float(p_values(score, self._reference))
        height, width = size
        return Row(path, score, anomalous, p_value, None, width, height, regions, anomaly_map)

    def close(self) -> None:
        """End the threads."""
        self._readers.shutdown(cancel_futures=True)


def _path(source: Source) -> str:
    return source if isinstance(source, str) else ""


def _png(anomaly_map: np.ndarray) -> bytes:
    levels = np.rint(255 * np.clip(anomaly_map, 0, 1)).astype(np.uint8)
    return cv2.imencode(".png", levels)[1].tobytes()
