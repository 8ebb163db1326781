"""What people say of images: those that they pick out, and a random sample, which is what thresholds may rest on."""

__all__ = ["Review"]

import csv
import hashlib
import re
import shutil
import threading
import time
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from cflow_plugin.commands.watch.arrivals import Arrival
from cflow_plugin.commands.watch.journal import Result
from cflow_plugin.errors import CflowError
from cflow_plugin.files import atomic_file
from cflow_plugin.images.listing import IMAGES, is_hidden

_WORDS = {"good": "good after all", "defect": "defect missed"}
_COLUMNS = ["time", "who", "what", "number", "image", "score", "p_value", "decision", "copy"]
_CONFIG = """\
# What was said to be good and defective, as training data:
#   anomalib train --config {config}
# Add the folders of good images that the model was trained on: {good}
# alone is what the last model found odd, and what was drawn at random.
seed_everything: 0
model:
  class_path: CflowPlugin
data:
  class_path: Folder
  init_args:
    name: reviewed
    root: {root}
    normal_dir: [{good}]
    abnormal_dir: {defect}
    test_split_mode: from_dir
    val_split_mode: from_test
"""


class Review:
    """Folders of images that somebody has looked at, and of those that wait for it.

    ``good`` and ``defect`` hold what was picked out. ``sample/drawn`` holds images that were drawn at random from all
    that were scored, each with the same chance, and ``sample/good`` and ``sample/defect`` those of them that were
    looked at. Once the first one was, no other is drawn until the sample is used up.

    Args:
        folder: Where they are.
        size: Images of a sample; 0 for none.
        name: Of the journal, so that a restart draws as before.

    Attributes:
        config: A config that trains on what was looked at.
    """

    def __init__(self, folder: Path, size: int, name: str) -> None:
        self._folder, self._size, self._name = folder, size, name
        self._sample = folder / "sample"
        self.config = folder / "retrain.yaml"
        self._lock = threading.Lock()
        self._keys: dict[float, Path] = {}
        for file in _images(self._sample / "drawn"):
            self._keys[self._key(_number_of(file))] = file

    # The sample

    def offer(self, result: Result, arrival: Arrival) -> None:
        """Let an image take part in the draw.

        The images with the lowest of keys that are random numbers of their own are a sample in which each image is
        with the same probability, however many there will be.
        """
        with self._lock:
            if not self._size or self._is_looked_at():
                return
            key = self._key(result.number)
            if len(self._keys) >= self._size and key > max(self._keys):
                return
            self._keys[key] = _copy(result, arrival.path, arrival.image, self._sample / "drawn")
            while len(self._keys) > self._size:
                self._keys.pop(max(self._keys)).unlink(missing_ok=True)

    def _key(self, number: int) -> float:
        digest = hashlib.sha256(f"{self._name} {number}".encode()).digest()
        return int.from_bytes(digest[:8], "big") / 2**64

    def _is_looked_at(self) -> bool:
        return any(_images(self._sample / what) for what in _WORDS)

    def sample(self) -> dict[str, Any]:
        """How far the sample is, for the page."""
        with self._lock:
            drawn = _images(self._sample / "drawn")
            good, defect = (len(_images(self._sample / what)) for what in _WORDS)
        return {
            "good": good,
            "defect": defect,
            "left": len(drawn),
            "size": self._size,
            "next": drawn[0].name if drawn else None,
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
            CflowError: If it is not there.
        """
        with self._lock:
            file = self.drawn(name)
            if file is None:
                message = "This image is not in the sample, or somebody has looked at it."
                raise CflowError(message)
            target = self._sample / what / name
            target.parent.mkdir(exist_ok=True)
            file.replace(target)
            self._keys.pop(self._key(_number_of(file)), None)
            return self._note(who, f"{what}, of the sample", [_number_of(file), name, "", "", ""], target)

    def reviewed_sample(self) -> list[Path]:
        """The sample's good images.

        Raises:
            CflowError: If not all of it was looked at: what is left would be what somebody did not like to judge.
        """
        state = self.sample()
        if state["left"] or not state["good"]:
            message = (
                f"Look at the whole sample first: {state['left']} images are left. A threshold may rest on a random "
                "sample alone, of which all was looked at."
            )
            raise CflowError(message)
        return _images(self._sample / "good")

    def use_up(self) -> None:
        """Lay a sample aside that was used, with what was said of it; the next one is drawn from then on."""
        with self._lock:
            stamp = time.strftime("%Y-%m-%dT%H-%M-%S")
            self._sample.rename(self._folder / f"sample-{stamp}")
            self._keys.clear()
            self._write_config()

    # What was picked out

    def pick(self, result: Result, path: Path | None, image: np.ndarray, what: str, who: str) -> str:
        """Copy an image that somebody has picked out, and note who called it what.

        Args:
            result: Its result.
            path: Its file, if there is one.
            image: Its pixels.
            what: ``good`` or ``defect``.
            who: Who says so.

        Returns:
            Where the copy is, below the folder of results.
        """
        target = _copy(result, path, image, self._folder / what)
        with self._lock:
            figures = [result.number, result.image, result.score, result.p_value, result.decision]
            return self._note(who, _WORDS[what], figures, target)

    def note_of_model(self, who: str, what: str, name: str) -> None:
        """Note what somebody does with a model."""
        with self._lock:
            self._note(who, what, [""] * 5, self._folder / name)

    def _note(self, who: str, what: str, figures: list[Any], target: Path) -> str:
        self._folder.mkdir(exist_ok=True)
        log = self._folder / "log.csv"
        is_new = not log.exists()
        with log.open("a", newline="", encoding="utf-8") as file:
            table = csv.writer(file)
            if is_new:
                table.writerow(_COLUMNS)
            table.writerow([f"{time.time():.3f}", who, what, *figures, target.name])
        self._write_config()
        return target.relative_to(self._folder.parent).as_posix()

    # All of it

    def all_of(self, what: str) -> list[Path]:
        """All images that were called ``good``, or ``defect``: picked out, of this sample, and of earlier ones."""
        return [file for folder in self._folders(what) for file in _images(folder)]

    def _folders(self, what: str) -> list[Path]:
        folders = [self._folder / what, *sorted(self._folder.glob(f"sample*/{what}"))]
        return [folder for folder in folders if _images(folder)]

    def _write_config(self) -> None:
        """The folders as training data; written anew at each word, since folders come and go."""
        good, defect = (
            ", ".join(folder.relative_to(self._folder).as_posix() for folder in self._folders(what)) for what in _WORDS
        )
        if not good:
            return
        root, defect = self._folder.resolve(), f"[{defect}]" if defect else "null"
        with atomic_file(self.config) as partial:
            partial.write_text(
                _CONFIG.format(config=self.config, root=root, good=good, defect=defect), encoding="utf-8"
            )


def _images(folder: Path) -> list[Path]:
    files = folder.iterdir() if folder.is_dir() else ()
    found = [file for file in files if file.suffix.lower() in IMAGES and not is_hidden(Path(file.name))]
    return sorted(found, key=_number_of)


def _number_of(file: Path) -> int:
    """Number of the result that an image's copy begins with."""
    return int(found.group()) if (found := re.match(r"\d+", file.name)) else 0


def _copy(result: Result, path: Path | None, image: Any, folder: Path) -> Path:
    """Copy an image under its result's number; as it is seen where its file has gone away."""
    folder.mkdir(parents=True, exist_ok=True)
    name = re.sub(r"[^\w.-]", "_", result.image)
    target = folder / f"{result.number}_{name}"
    with atomic_file(target if path is not None and path.is_file() else target.with_suffix(".png")) as partial:
        if path is not None and path.is_file():
            shutil.copyfile(path, partial)
        else:
            partial.write_bytes(cv2.imencode(".png", image)[1].tobytes())
    return target if target.exists() else target.with_suffix(".png")
