"""What people say of images: those that they pick out, and a random sample, which is what thresholds may rest on."""

__all__ = ["Review"]

import csv
import hashlib
import json
import re
import shlex
import shutil
import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from cflow_plugin.commands.watch.arrivals import Arrival, is_same
from cflow_plugin.commands.watch.journal import Result
from cflow_plugin.errors import CflowError
from cflow_plugin.files import atomic_file
from cflow_plugin.images.listing import IMAGES, is_hidden

_WORDS = {"good": "good after all", "defect": "defect missed"}
_COLUMNS = ["time", "who", "what", "number", "image", "score", "p_value", "decision", "copy"]
_NAME = 60  # letters of an image's name that its copy has, the last ones
_CONFIG = """\
# What was said to be good and defective, as training data:
#   {command}
# Add the folders of good images that the model was trained on to normal_dir: what is here alone is what the last model
# found odd, and what was drawn at random.
seed_everything: 0
model:
  class_path: CflowPlugin
data:
  class_path: Folder
  init_args:
    name: reviewed
    root: {root}
    normal_dir: {good}
    abnormal_dir: {defect}
    test_split_mode: from_dir
    val_split_mode: from_test
"""


class Review:
    """Folders of images that somebody has looked at, and of those that wait for it.

    ``good`` and ``defect`` hold what was picked out. ``sample/drawn`` holds images that were drawn at random from all
    that were scored, each with the same chance, and ``sample/good`` and ``sample/defect`` those of them that were
    looked at. A sample is judged when it is full; with the first word no other image is drawn until it is laid aside.

    Args:
        folder: Where they are.
        size: Images of a sample; 0 for none.
        name: Of the journal, so that a restart draws as before.

    Attributes:
        config: A config that trains on what was looked at.

    Raises:
        CflowError: If the size is negative.
    """

    def __init__(self, folder: Path, size: int, name: str) -> None:
        if size < 0:
            message = f"--sample is a number of images, 0 for none; got {size}."
            raise CflowError(message)
        self._folder, self._size, self._name = folder, size, name
        self._sample = folder / "sample"
        self.config = folder / "retrain.yaml"
        self._lock = threading.Lock()
        self._keys: dict[float, Path] = {}
        self._go_on()

    def _go_on(self) -> None:
        """Go on with an earlier run's sample; one of another size is of no use unless it is being judged."""
        if self._is_judged():
            self._size = len(self._judged()) + len(_images(self._sample / "drawn"))
        elif self._sample.exists() and self._kept_size() != self._size:
            shutil.rmtree(self._sample)
        self._keys = {self._key(_number_of(file)): file for file in _images(self._sample / "drawn")}

    def _kept_size(self) -> int | None:
        try:
            return int((self._sample / ".size").read_text())
        except (OSError, ValueError):
            return None

    # The sample

    def offer(self, result: Result, arrival: Arrival) -> None:
        """Let an image take part in the draw.

        The images with the lowest of keys that are random numbers of their own are a sample in which each image is
        with the same probability, however many there will be.

        Raises:
            OSError: If it cannot be copied.
        """
        with self._lock:
            if not self._size or self._is_judged():
                return
            if not (self._sample / "drawn").is_dir():
                self._keys.clear()
                (self._sample / "drawn").mkdir(parents=True)
                (self._sample / ".size").write_text(str(self._size))
            key = self._key(result.number)
            if len(self._keys) >= self._size and key > max(self._keys):
                return
            assert isinstance(arrival.image, np.ndarray)
            self._keys[key] = _copy(result, arrival.path, arrival.image, self._sample / "drawn")
            while len(self._keys) > self._size:
                self._keys.pop(max(self._keys)).unlink(missing_ok=True)

    def _key(self, number: int) -> float:
        digest = hashlib.sha256(f"{self._name} {number}".encode()).digest()
        return int.from_bytes(digest[:8], "big") / 2**64

    def _judged(self) -> list[Path]:
        return [file for what in _WORDS for file in _images(self._sample / what)]

    def _is_judged(self) -> bool:
        return bool(self._judged())

    def sample(self) -> dict[str, Any]:
        """How far the sample is, for the page."""
        with self._lock:
            drawn = _images(self._sample / "drawn")
            good, defect = (len(_images(self._sample / what)) for what in _WORDS)
        full = bool(good or defect or (self._size and len(drawn) >= self._size))
        return {
            "good": good,
            "defect": defect,
            "left": len(drawn),
            "size": self._size,
            "full": full,
            "next": drawn[0].name if drawn and full else None,
        }

    def drawn(self, name: str) -> Path | None:
        """An image of the sample that nobody has looked at."""
        return next((file for file in _images(self._sample / "drawn") if file.name == name), None)

    def judge(self, name: str, what: str, who: str) -> str:
        """Note what somebody says of an image of the sample.

        Args:
            name: Of its file.
            what: ``good`` or ``defect``.
            who: Who says so.

        Returns:
            Where the image is now, below the folder of results.

        Raises:
            CflowError: If it is not there, or more will be drawn.
            OSError: If it cannot be noted; nothing is done then.
        """
        full = self.sample()["full"]
        with self._lock:
            file = self.drawn(name)
            if file is None:
                message = "This image is not in the sample, or somebody has looked at it."
                raise CflowError(message)
            if not full:
                message = "The sample is still being drawn; wait until it is full, or start with a smaller --sample."
                raise CflowError(message)
            target = self._sample / what / name
            target.parent.mkdir(exist_ok=True)
            self._note(who, f"{what}, of the sample", [_number_of(file), name, "", "", ""], target)
            self._forget_picks(file.stem)
            file.replace(target)
            self._write_config()
            return target.relative_to(self._folder.parent).as_posix()

    def reviewed_sample(self) -> list[Path]:
        """The sample's good images.

        Raises:
            CflowError: If not all of it was looked at: what is left would be what somebody did not like to judge.
        """
        state = self.sample()
        if not state["full"] or state["left"]:
            message = (
                f"Look at the whole sample first: {state['left']} images are left. A threshold may rest on a random "
                "sample alone, of which all was looked at."
            )
            raise CflowError(message)
        if not state["good"]:
            message = "No image of the sample was called good: lay it aside, and another is drawn."
            raise CflowError(message)
        return _images(self._sample / "good")

    def lay_aside(self, who: str) -> None:
        """Lay a sample aside, with what was said of it; the next one is drawn from then on.

        Args:
            who: Who wants it.

        Raises:
            CflowError: If there is none.
        """
        with self._lock:
            if not self._sample.is_dir():
                message = "There is no sample to lay aside."
                raise CflowError(message)
            target = self._folder / time.strftime("sample-%Y-%m-%dT%H-%M-%S")
            self._note(who, "the sample is laid aside", [""] * 5, target)
            self._sample.rename(target)
            shutil.rmtree(target / "drawn", ignore_errors=True)  # nobody has said anything of these
            self._keys.clear()
            self._write_config()

    # What was picked out

    def pick(self, result: Result, path: Path | None, image: np.ndarray, what: str, who: str) -> str:
        """Copy an image that somebody has picked out, and note who called it what; the last word counts.

        Args:
            result: Its result.
            path: Its file, if there is one.
            image: Its pixels.
            what: ``good`` or ``defect``.
            who: Who says so.

        Returns:
            Where the copy is, below the folder of results.
        """
        with self._lock:
            figures = [result.number, result.image, result.score, result.p_value, result.decision]
            [judged, *_] = [*(file for file in self._judged() if file.stem == _stem(result)), None]
            if judged is not None:  # it is in the sample, and stays there
                target = self._sample / what / judged.name
                target.parent.mkdir(exist_ok=True)
                self._note(who, _WORDS[what], figures, target)
                judged.replace(target)
            else:
                self._forget_picks(_stem(result))
                target = _copy(result, path, image, self._folder / what)
                self._note(who, _WORDS[what], figures, target)
            self._write_config()
            return target.relative_to(self._folder.parent).as_posix()

    def _forget_picks(self, stem: str) -> None:
        for what in _WORDS:
            for file in _images(self._folder / what):
                if file.stem == stem:
                    file.unlink(missing_ok=True)

    # All of it

    def all_of(self, what: str) -> list[Path]:
        """All images that were called ``good``, or ``defect``, the last ones last."""
        files = [file for folder in self._folders(what) for file in _images(folder)]
        return sorted(files, key=lambda file: (file.stat().st_mtime, _number_of(file)))

    def note_of_model(self, who: str, what: str, name: str) -> None:
        """Note what somebody does with a model."""
        with self._lock:
            self._note(who, what, [""] * 5, self._folder / name)

    def command(self) -> str | None:
        """What trains on all of it, once there is something."""
        return f"anomalib train --config {shlex.quote(str(self.config))}" if self.config.exists() else None

    def _note(self, who: str, what: str, figures: list[Any], target: Path) -> None:
        self._folder.mkdir(exist_ok=True)
        log = self._folder / "log.csv"
        is_new = not log.exists()
        with log.open("a", newline="", encoding="utf-8") as file:
            table = csv.writer(file)
            if is_new:
                table.writerow(_COLUMNS)
            table.writerow([f"{time.time():.3f}", who, what, *figures, target.name])

    def _folders(self, what: str) -> list[Path]:
        folders = [self._folder / what, *sorted(self._folder.glob(f"sample*/{what}"))]
        return [folder for folder in folders if _images(folder)]

    def _write_config(self) -> None:
        """The folders as training data; written anew at each word, since folders come and go."""
        good, defect = (
            [folder.relative_to(self._folder).as_posix() for folder in self._folders(what)] for what in _WORDS
        )
        if not good:
            return
        values = {"root": str(self._folder.resolve()), "good": good, "defect": defect or None}
        # JSON is YAML, whatever a path has in it.
        texts = {name: json.dumps(value, ensure_ascii=False) for name, value in values.items()}
        command = f"anomalib train --config {shlex.quote(str(self.config))}"
        with atomic_file(self.config) as partial:
            partial.write_text(_CONFIG.format(command=command, **texts), encoding="utf-8")


def _images(folder: Path) -> list[Path]:
    files = folder.iterdir() if folder.is_dir() else ()
    found = [file for file in files if file.suffix.lower() in IMAGES and not is_hidden(Path(file.name))]
    return sorted(found, key=_number_of)


def _number_of(file: Path) -> int:
    """Number of the result that an image's copy begins with."""
    return int(found.group()) if (found := re.match(r"\d+", file.name)) else 0


def _stem(result: Result) -> str:
    """What an image's copy is called: number and name, of which no letter is too many for any file system."""
    return f"{result.number}_{re.sub(r'[^A-Za-z0-9-]', '_', Path(result.image).with_suffix('').as_posix())[-_NAME:]}"


def _copy(result: Result, path: Path | None, image: np.ndarray, folder: Path) -> Path:
    """Copy an image under its result's number; as it was seen where its file has gone away or is another one now."""
    folder.mkdir(parents=True, exist_ok=True)
    target = folder / f"{_stem(result)}{'.png' if path is None else path.suffix}"
    with suppress(FileNotFoundError):
        if path is not None and is_same(path, result.stamp):
            with atomic_file(target) as partial:
                shutil.copyfile(path, partial)
            if is_same(path, result.stamp):
                return target
            target.unlink()
    target = target.with_suffix(".png")
    with atomic_file(target) as partial:
        _write(partial, image)
    return target


def _write(file: Path, image: np.ndarray) -> None:
    """Write pixels without loss; more than 8 bits are a grey camera's, in one channel as its own files have them."""
    file.write_bytes(cv2.imencode(".png", image if image.dtype == np.uint8 else image[..., 0])[1].tobytes())
