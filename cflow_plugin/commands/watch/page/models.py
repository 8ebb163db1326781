"""The models that a watch may use: the one that it was given, and the files beside it."""

__all__ = ["Models"]

import logging
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from cflow_plugin.commands.watch.judging import Following, Judge
from cflow_plugin.commands.watch.page.review import Review
from cflow_plugin.commands.watch.timeline import frame_auroc
from cflow_plugin.deploy.recalibration import recalibrate_file
from cflow_plugin.deploy.runtime import bits_of, compile_exported, read_file
from cflow_plugin.errors import CflowError
from cflow_plugin.images.listing import is_hidden
from cflow_plugin.images.reading import ImageFileError, read_image

logger = logging.getLogger(__name__)

_FILES = 20  # beside the one that was given
_MEASURED = 500  # images of each kind, the last ones
_SUFFIXES = {".xml", ".onnx"}


class Models:
    """Files beside the one in use, what is known of them, and which one is wished for.

    Args:
        settings: Of the watch.
        in_use: The file that it uses.
        review: Images that were looked at, by which models are measured.
    """

    def __init__(self, settings: Following, in_use: Path, review: Review) -> None:
        self._settings, self._given, self._in_use, self._review = settings, settings.model, in_use, review
        self._figures: dict[tuple[str, float], dict[str, Any]] = {}
        self._wish: Judge | None = None
        self._bits = bits_of(read_file(in_use)[0])
        self._busy = threading.Lock()

    def known(self) -> list[dict[str, Any]]:
        """All files, the newest first, each with its figures if it was measured."""
        return [
            {
                "name": file.name,
                "in_use": file.name == self._in_use.name,
                "wished": self._wish is not None and file.name == self._wish.file.name,
                "figures": self._figures.get(_identity(file)),
            }
            for file in self._files()
        ]

    def _files(self) -> list[Path]:
        files = (file for file in self._given.parent.iterdir() if file.suffix.lower() in _SUFFIXES)
        visible = [file for file in files if not is_hidden(Path(file.name))]
        newest = sorted(visible, key=lambda file: -file.stat().st_mtime)[:_FILES]
        return newest if self._given in newest else [*newest, self._given]

    def _named(self, name: str) -> Path:
        for file in self._files():
            if file.name == name:
                return file
        message = "There is no such model beside the one in use."
        raise CflowError(message)

    def measure(self, name: str) -> dict[str, Any]:
        """What a model, and the one in use, say of the images that were looked at.

        Args:
            name: Of its file.

        Returns:
            Its figures, as they stand in :meth:`known` from then on.

        Raises:
            CflowError: If it cannot be run, or nothing was looked at.
        """
        with self._alone():
            good, defect = (self._review.all_of(what)[-_MEASURED:] for what in ("good", "defect"))
            if not good and not defect:
                message = "Nothing was looked at yet: mark images, or look at the sample."
                raise CflowError(message)
            for file in {self._named(name), self._in_use}:
                self._figures[_identity(file)] = self._figures_of(file, good, defect)
            return self._figures[_identity(self._named(name))]

    def _figures_of(self, file: Path, good: list[Path], defect: list[Path]) -> dict[str, Any]:
        compiled = compile_exported(file, self._settings.device, self._settings.precision)
        scores, found, spent = [], [], []
        for path in (*good, *defect):
            try:
                image = read_image(path, compiled.bits)[None]
            except ImageFileError as error:
                raise CflowError(str(error)) from error
            start = time.perf_counter()
            result = compiled([image])
            spent.append(time.perf_counter() - start)
            scores.append(float(result["pred_score"][0]))
            found.append(bool(result["pred_label"][0]))
        return {
            "good": len(good),
            "alarms": sum(found[: len(good)]),
            "defect": len(defect),
            "found": sum(found[len(good) :]),
            "auroc": frame_auroc(scores, np.arange(len(scores)) >= len(good)),
            "milliseconds": round(1000 * float(np.median(spent)), 2),
        }

    def recalibrate(self, rate: float, who: str) -> dict[str, Any]:
        """Write a file with thresholds by the sample's good images, beside the one in use.

        Args:
            rate: False-alarm rate that it is to keep.
            who: Who wants it.

        Returns:
            Its ``name``, the ``threshold`` in the old one's scores, and of ``images`` how many were ``alarms`` of it.

        Raises:
            CflowError: If the sample was not looked at as a whole, or is too small for the rate.
            OSError: If it cannot be written.
        """
        with self._alone():
            stamp = time.strftime("%Y-%m-%dT%H-%M-%S")
            stem = self._in_use.stem.split(".recalibrated-")[0]
            target = self._given.with_name(f"{stem}.recalibrated-{stamp}.xml")
            done = recalibrate_file(self._in_use, self._review.reviewed_sample(), target, rate, self._settings.device)
            self._note(who, f"recalibrated for a rate of {rate:g} by {done.images} good images", target)
            self._review.use_up()
        self.measure(target.name)
        return {"name": target.name, "threshold": done.threshold, "images": done.images, "alarms": done.alarms}

    def use(self, name: str, who: str) -> None:
        """Wish for a model; the watch takes it for the next image.

        Args:
            name: Of its file.
            who: Who wishes for it.

        Raises:
            CflowError: If it was not measured, unless it is the one that the watch was started with.
        """
        file = self._named(name)
        if file != self._given and _identity(file) not in self._figures:
            message = "Measure it first, so that its figures stand beside those of the model in use."
            raise CflowError(message)
        judge = Judge(self._settings, file)  # what cannot be used is refused here, not where images wait
        if judge.compiled.bits != self._bits:
            message = f"It takes images of {judge.compiled.bits} bits a value, and the source gives {self._bits}."
            raise CflowError(message)
        self._note(who, "to be used", file)
        self._wish = judge

    def take_wish(self) -> Judge | None:
        """The model that is wished for, which is in use from then on."""
        wish, self._wish = self._wish, None
        if wish:
            self._in_use = wish.file
        return wish

    @contextmanager
    def _alone(self) -> Iterator[None]:
        """One long job at a time."""
        if not self._busy.acquire(blocking=False):
            message = "Another model is being measured or recalibrated: wait for it."
            raise CflowError(message)
        try:
            yield
        finally:
            self._busy.release()

    def _note(self, who: str, what: str, file: Path) -> None:
        self._review.note_of_model(who, what, file.name)
        logger.info("%s: %s, says %s.", file.name, what, who)


def _identity(file: Path) -> tuple[str, float]:
    return file.name, file.stat().st_mtime
