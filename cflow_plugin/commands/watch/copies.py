"""Copies of images in folders by decision."""

__all__ = ["Copies"]

import shutil
from pathlib import Path

import cv2

from cflow_plugin.commands.watch.arrivals import Arrival
from cflow_plugin.commands.watch.journal import Journal, Result
from cflow_plugin.images.reading import ImageFileError


class Copies:
    """Copies of images in folders by decision, each there once with its result, whenever the process is killed.

    A copy is written under a name of its own, then the result comes into the journal, and then the copy gets its place.

    Args:
        output: The folder of results; copies are below ``sorted``.
    """

    def __init__(self, output: Path) -> None:
        self._output, self._folder = output, output / "sorted"
        self._folder.mkdir(exist_ok=True)

    def prepare(self, result: Result, arrival: Arrival) -> Result:
        """Copy an image, not yet to its place; the result says where that is."""
        name = Path(arrival.name if arrival.path else f"{arrival.name}.png")
        target = self._folder / result.decision / name
        if target.exists():  # of another image that had this name
            target = target.with_stem(f"{target.stem}.{result.number}")
        if arrival.path or isinstance(arrival.image, ImageFileError):
            assert arrival.path is not None
            try:
                shutil.copyfile(arrival.path, self._partial(result.number))
            except FileNotFoundError:  # it was scored, and then it went away
                return result
        else:
            _, data = cv2.imencode(".png", arrival.image, [cv2.IMWRITE_PNG_COMPRESSION, 1])
            self._partial(result.number).write_bytes(data.tobytes())
        return result._replace(copy=target.relative_to(self._output).as_posix())

    def place(self, result: Result) -> None:
        """Give a copy its place."""
        if result.copy and self._partial(result.number).exists():
            target = self._output / result.copy
            target.parent.mkdir(parents=True, exist_ok=True)
            self._partial(result.number).replace(target)

    def recover(self, journal: Journal) -> None:
        """Finish what a killed run had begun."""
        for result in journal.after(journal.last - 1):
            self.place(result)
        for rest in self._folder.glob(".*.partial"):
            rest.unlink()

    def _partial(self, number: int) -> Path:
        return self._folder / f".{number}.partial"
