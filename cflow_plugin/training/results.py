"""What a test and a prediction leave behind: pictures, none of which overwrites another, and a table of predictions."""

__all__ = ["ResultFiles"]

import csv
import logging
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, cast

from anomalib.data import ImageBatch
from anomalib.utils.path import generate_output_filename
from anomalib.visualization import ImageVisualizer
from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback
from pandas import DataFrame, read_csv, to_numeric
from PIL import Image
from rich.console import Console
from rich.table import Table

from cflow_plugin.decisions.post_processing import ConformalPostProcessor
from cflow_plugin.decisions.region_files import RegionFiles
from cflow_plugin.decisions.regions import RegionSettings, draw_regions, outlines_of
from cflow_plugin.images.checking import image_files
from cflow_plugin.images.loading import data_module_of
from cflow_plugin.images.reading import in_8_bits, load_pixels, size_of

logger = logging.getLogger(__name__)

_TABLE = "predictions.csv"
_COLUMNS = ("image", "score", "anomalous", "p_value", "picture")
_SHOWN = 20


class ResultFiles(Callback):
    """Writes pictures, and a row for each prediction as soon as it is there.

    anomalib keeps a picture's name and the last folder of its path, so that ``lineA/cam1/000.png`` and
    ``lineB/cam1/000.png`` become one picture.

    A prediction has a folder of its own, ``images/NAME`` where ``NAME`` is that of the images' folder, or ``NAME_2``
    and so on where an earlier prediction's results are. In it are the pictures, in the images' own folders, and
    ``predictions.csv`` with image, score, decision, p-value (where the model keeps a false-alarm rate) and picture.
    Where the model has a threshold there are its anomalous regions, too: in files as
    :class:`~cflow_plugin.decisions.region_files.RegionFiles` writes them, and drawn into the images, in their own size,
    in ``regions``.

    Args:
        visualizer: Makes the pictures; ``None`` for none.
    """

    def __init__(self, visualizer: ImageVisualizer | None) -> None:
        self.visualizer = visualizer
        self._place: Callable[[str], Path] = Path
        self._folder = Path()
        self._table: Path | None = None
        self._regions: RegionFiles | None = None

    # Test

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Plan where pictures go: as anomalib puts them, but for those that would overwrite others."""
        del pl_module
        data = data_module_of(trainer)
        folder = Path(getattr(self.visualizer, "output_dir", None) or Path(trainer.default_root_dir) / "images")

        def place(path: str) -> Path:
            name, category = getattr(data, "name", None), getattr(data, "category", None)
            return generate_output_filename(path, folder, name, category, mkdir=False)

        self._place = _never_twice(place, image_files(trainer.test_dataloaders))

    def on_test_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: ImageBatch, *args: Any, **kwargs: Any
    ) -> None:
        """Write the pictures of a batch."""
        del trainer, pl_module, outputs, args, kwargs
        for _ in self._pictures(batch):
            pass

    # Prediction

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Make a folder for the results."""
        images = image_files(trainer.predict_dataloaders)
        parents = {os.path.dirname(os.path.abspath(image)) for image in images}  # noqa: PTH100, PTH120  commonpath's kind
        try:
            root = Path(os.path.commonpath(parents))
        except ValueError:  # there are none, or on several drives
            root = Path("predictions")
        folder = Path(getattr(self.visualizer, "output_dir", None) or Path(trainer.default_root_dir) / "images")
        own = _new_folder(folder, root.name or "predictions") if trainer.is_global_zero else None
        self._folder = Path(trainer.strategy.broadcast(str(own)))

        def place(path: str) -> Path:
            absolute = Path(os.path.abspath(path))  # noqa: PTH100  resolve() would follow links
            return self._folder / (absolute.relative_to(root) if absolute.is_relative_to(root) else absolute.name)

        self._place = _never_twice(place, images)
        part = "" if trainer.is_global_zero else f".{trainer.global_rank}"
        self._table = self._folder / f"{_TABLE}{part}"
        with self._table.open("w", newline="", encoding="utf-8") as file:
            csv.writer(file).writerow(_COLUMNS)
        processor = pl_module.post_processor
        finds_regions = isinstance(processor, ConformalPostProcessor) and processor.decides and images
        self._regions = RegionFiles(self._folder, part=part) if finds_regions else None

    def on_predict_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: ImageBatch,
        *args: Any,
        **kwargs: Any,
    ) -> None:
        """Write a batch's pictures and rows."""
        del trainer, outputs, args, kwargs
        if self._table is None:
            return
        pictures = list(self._pictures(batch))
        rows = _rows(batch, getattr(pl_module, "post_processor", None), pictures)
        with self._table.open("a", newline="", encoding="utf-8") as file:
            csv.writer(file).writerows(rows)
        if self._regions is not None:
            self._write_regions(batch, pl_module, self._regions)

    def on_predict_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Gather what other processes wrote, and show the highest scores."""
        del pl_module
        if self._regions is not None and not trainer.is_global_zero:
            self._regions.close(with_tables=False)
        trainer.strategy.barrier()
        if self._table is None or not trainer.is_global_zero:
            return
        for rank in range(1, trainer.world_size):
            part = self._folder / f"{_TABLE}.{rank}"
            _, *lines = part.read_text(encoding="utf-8").splitlines(keepends=True)
            with self._table.open("a", newline="", encoding="utf-8") as file:
                file.writelines(lines)
            part.unlink()
            if self._regions is not None:
                self._regions.take(Path(f"{self._regions.lines}.{rank}"))
        if self._regions is not None:
            self._regions.close()
        found = read_csv(self._table, dtype=str, keep_default_na=False)
        if trainer.progress_bar_callback is not None:
            _show(found)
        what, anomalous = "1 image" if len(found) == 1 else f"{len(found)} images", (found["anomalous"] == "1").sum()
        logger.info("%s, %d anomalous. Table and pictures are in %s.", what, anomalous, self._folder.resolve())

    def _write_regions(self, batch: ImageBatch, module: LightningModule, files: RegionFiles) -> None:
        """Write what is anomalous in a batch's images, in their files' own pixels."""
        processor, bits = (
            cast("ConformalPostProcessor", module.post_processor),
            getattr(module.pre_processor, "bits", 8),
        )
        if batch.anomaly_map is None or batch.pred_mask is None or batch.image_path is None:
            return
        interest = getattr(getattr(module.model, "scoring", None), "interest", None)
        edges = [] if interest is None else outlines_of(interest.cpu().numpy())
        sizes = [size_of(path) for path in batch.image_path]
        found = processor.find_regions(batch.anomaly_map, batch.pred_mask, sizes)
        for path, size, regions in zip(batch.image_path, sizes, found, strict=True):
            files.add(str(path), size, regions)
            if regions and self.visualizer is not None:
                picture = in_8_bits(load_pixels(path), bits)[..., ::-1].copy()
                draw_regions(picture, regions, RegionSettings(outlines=edges))
                file = self._folder / "regions" / self._place(str(path)).relative_to(self._folder)
                file.parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(picture[..., ::-1]).save(file.with_name(f"{file.name}.jpg"), quality=90)

    # Both

    def _pictures(self, batch: ImageBatch) -> Iterator[str]:
        """Write a batch's pictures; yields where each is."""
        for item in batch:
            picture = self.visualizer.visualize(item) if self.visualizer is not None else None
            if not isinstance(picture, Image.Image):
                yield ""
                continue
            file = self._place(str(item.image_path or "image.png"))
            file.parent.mkdir(parents=True, exist_ok=True)
            picture.save(file)
            yield str(file)


def _never_twice(place: Callable[[str], Path], known: list[str]) -> Callable[[str], Path]:
    """A place for each image that no other image has, whatever letters a file system tells apart.

    Args:
        place: Where an image is wanted.
        known: Images that are sure to come, the same in all processes.
    """
    places: dict[str, Path] = {}
    taken: set[str] = set()

    def find(path: str) -> Path:
        if path not in places:
            wanted = found = place(path)
            number = 1
            while str(found).casefold() in taken:
                number += 1
                found = wanted.with_stem(f"{wanted.stem}_{number}")
            taken.add(str(found).casefold())
            places[path] = found
        return places[path]

    for path in known:
        find(path)
    return find


def _new_folder(parent: Path, name: str) -> Path:
    number = 1
    while True:
        folder = parent / (name if number == 1 else f"{name}_{number}")
        try:
            folder.mkdir(parents=True)
        except FileExistsError:
            number += 1
        else:
            return folder


def _rows(batch: ImageBatch, post_processor: Any, pictures: list[str]) -> list[tuple[str, ...]]:
    paths = batch.image_path or [""] * len(pictures)
    scores = [""] * len(pictures) if batch.pred_score is None else [f"{float(score):.6f}" for score in batch.pred_score]
    labels = [""] * len(pictures) if batch.pred_label is None else [f"{int(label)}" for label in batch.pred_label]
    p_values = [""] * len(pictures)
    has_reference = isinstance(post_processor, ConformalPostProcessor) and post_processor.is_calibrated
    if has_reference and batch.pred_score is not None:
        p_values = [f"{float(value):.6f}" for value in post_processor.image_p_values(batch.pred_score)]
    return list(zip(map(str, paths), scores, labels, p_values, pictures, strict=True))


def _show(found: DataFrame) -> None:
    title = "Predictions" if len(found) <= _SHOWN else f"The {_SHOWN} highest of {len(found)} scores"
    table = Table(title=title, title_justify="left")
    for name in ("image", "score", "decision", "p-value"):
        table.add_column(name, overflow="fold")
    scores = to_numeric(found["score"], errors="coerce").sort_values(ascending=False)
    for _, (image, score, anomalous, p_value, _) in found.loc[scores.index[:_SHOWN]].iterrows():
        table.add_row(image, score, {"1": "anomalous", "0": "good"}.get(anomalous, ""), p_value)
    Console().print(table)
