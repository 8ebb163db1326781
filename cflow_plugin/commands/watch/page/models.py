"""The models that a watch may use: the one that it was given, and the files beside it."""

__all__ = ["Models"]

import hashlib
import logging
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from cflow_plugin.commands.watch.judging import Following, Judge
from cflow_plugin.commands.watch.page.review import Review
from cflow_plugin.commands.watch.timeline import frame_auroc
from cflow_plugin.deploy.recalibration import recalibrate_file
from cflow_plugin.deploy.runtime import compile_exported
from cflow_plugin.errors import CflowError, first_line
from cflow_plugin.images.listing import is_hidden
from cflow_plugin.images.reading import ImageFileError, read_image

logger = logging.getLogger(__name__)

_FILES = 20  # beside those that are or were in use
_MEASURED = 500  # images of each kind, the last ones
_SUFFIXES = {".xml", ".onnx"}


class Models:
    """Files beside the one in use, what is known of them, and which one is wished for.

    Args:
        settings: Of the watch.
        in_use: The model that it uses.
        review: Images that were looked at, by which models are measured.
        keep: Notes which file is to be used, for a restart.
    """

    def __init__(self, settings: Following, in_use: Judge, review: Review, keep: Callable[[Judge], None]) -> None:
        self._settings, self._given, self._in_use = settings, settings.model, in_use
        self._review, self._keep = review, keep
        self._figures: dict[str, dict[str, Any]] = {}
        self._digests: dict[tuple[Path, int, int], str] = {}
        self._wish: Judge | None = None
        self._busy = threading.Lock()

    def known(self) -> list[dict[str, Any]]:
        """All files, the newest first, each with its figures if it was measured; and the one in use, if it is gone."""
        found = [self._about(file.name, self._digest(file)) for file in self._files()]
        if not any(model["in_use"] for model in found):
            found.append({**self._about(self._in_use.file.name, self._in_use.digest), "gone": True})
        return found

    def _about(self, name: str, digest: str) -> dict[str, Any]:
        return {
            "name": name,
            "in_use": (name, digest) == (self._in_use.file.name, self._in_use.digest),
            "wished": self._wish is not None and (name, digest) == (self._wish.file.name, self._wish.digest),
            "gone": False,
            "figures": self._figures.get(digest),
        }

    def _files(self) -> list[Path]:
        """Files that can be chosen from, the newest first."""
        times: dict[Path, float] = {}
        for file in self._given.parent.iterdir():
            if file.suffix.lower() in _SUFFIXES and not is_hidden(Path(file.name)) and file.is_file():
                try:
                    times[file] = file.stat().st_mtime
                except OSError:  # it has gone meanwhile
                    continue
        newest = sorted(times, key=lambda file: -times[file])
        always = {self._given.name, self._in_use.file.name}
        return newest[:_FILES] + [file for file in newest[_FILES:] if file.name in always]

    def _digest(self, file: Path) -> str:
        """Of a file's content, read once."""
        try:
            found = file.stat()
            key = file, found.st_mtime_ns, found.st_size
            if key not in self._digests:
                self._digests[key] = hashlib.sha256(file.read_bytes()).hexdigest()
            return self._digests[key]
        except OSError:
            return ""

    def _named(self, name: str) -> Path:
        for file in self._files():
            if file.name == name:
                return file
        message = "There is no such model beside the one in use."
        raise CflowError(message)

    def why_not(self) -> str | None:
        """Why the threshold of the model in use cannot be set anew; ``None`` if it can."""
        if self._settings.threshold is not None:
            return "--threshold decides here, and not the model: start without it."
        if self._in_use.file.suffix.lower() != ".xml":
            return "The model in use is an ONNX file; thresholds can be set anew in OpenVINO's .xml files."
        if self._digest(self._in_use.file) != self._in_use.digest:
            return "The file of the model in use has changed since: use it first."
        return None

    # Measuring

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
            return self._measure(self._named(name))

    def _measure(self, file: Path) -> dict[str, Any]:
        good, defect = (self._review.all_of(what)[-_MEASURED:] for what in ("good", "defect"))
        if not good and not defect:
            message = "Nothing was looked at yet: mark images, or look at the sample."
            raise CflowError(message)
        in_use = self._in_use
        digest = self._digest(file)
        for one, key in {(file, digest), (in_use.file, in_use.digest)}:
            if key == self._digest(one):  # and not another file by now
                try:
                    self._figures[key] = self._figures_of(one, good, defect)
                except CflowError:
                    raise
                except Exception as error:  # what a file of another kind makes a runtime raise is not foreseen
                    message = f"{one.name} cannot be run here: {first_line(error)}"
                    raise CflowError(message) from error
        if digest not in self._figures:
            message = f"{file.name} was written anew while it was measured; measure it again."
            raise CflowError(message)
        return self._figures[digest]

    def _figures_of(self, file: Path, good: list[Path], defect: list[Path]) -> dict[str, Any]:
        compiled = compile_exported(file, self._settings.device, self._settings.precision)
        threshold = self._settings.threshold
        scores: list[float] = []
        found: list[bool] = []
        truth: list[bool] = []
        spent: list[float] = []
        unread = 0
        for is_defect, paths in ((False, good), (True, defect)):
            for path in paths:
                try:
                    image = read_image(path, compiled.bits)[None]
                except ImageFileError:
                    unread += 1
                    continue
                start = time.perf_counter()
                result = compiled([image])
                spent.append(time.perf_counter() - start)
                scores.append(float(result["pred_score"][0]))
                found.append(bool(result["pred_label"][0]) if threshold is None else scores[-1] > threshold)
                truth.append(is_defect)
        if not scores:
            message = "None of the images that were looked at can be read by this model."
            raise CflowError(message)
        defects, alarms = np.array(truth), np.array(found)
        return {
            "good": int((~defects).sum()),
            "alarms": int((alarms & ~defects).sum()),
            "defect": int(defects.sum()),
            "found": int((alarms & defects).sum()),
            "unread": unread,
            "auroc": frame_auroc(scores, defects),
            "milliseconds": round(1000 * float(np.median(spent)), 2),
        }

    # What is done

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
        if reason := self.why_not():
            raise CflowError(reason)
        with self._alone():
            images, old = self._review.reviewed_sample(), self._in_use.file
            stem = old.stem.split(".recalibrated-")[0]
            target = self._given.with_name(f"{stem}.recalibrated-{time.strftime('%Y-%m-%dT%H-%M-%S')}.xml")
            done = recalibrate_file(old, images, target, rate, self._settings.device)
            self._note(who, f"recalibrated for a rate of {rate:g} by {done.images} good images", target)
            self._review.lay_aside(who)
            try:
                self._measure(target)
            except CflowError as error:  # it is there all the same, and can be measured later
                logger.warning("%s could not be measured: %s", target.name, error)
        return {"name": target.name, "threshold": done.threshold, "images": done.images, "alarms": done.alarms}

    def use(self, name: str, who: str) -> None:
        """Wish for a model; the watch takes it for the next image.

        Args:
            name: Of its file.
            who: Who wishes for it.

        Raises:
            CflowError: If it was not measured, unless it is the one that the watch was started with.
        """
        if self._settings.threshold is not None:
            message = "--threshold is of the scores of one model: start without it to use another one."
            raise CflowError(message)
        file = self._named(name)
        if file.name != self._given.name and self._digest(file) not in self._figures:
            message = "Measure it first, so that its figures stand beside those of the model in use."
            raise CflowError(message)
        judge = Judge(self._settings, file)  # what cannot be used is refused here, not where images wait
        bits = self._in_use.compiled.bits
        if judge.compiled.bits != bits:
            message = f"It takes images of {judge.compiled.bits} bits a value, and the source gives {bits}."
            raise CflowError(message)
        self._note(who, "to be used", file)
        self._keep(judge)
        self._wish = judge

    def take_wish(self) -> Judge | None:
        """The model that is wished for, which is in use from then on."""
        wish, self._wish = self._wish, None
        if wish:
            self._in_use = wish
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
