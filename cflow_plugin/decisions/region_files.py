"""Regions in files: JSON lines as they come, and at the end a table and a COCO file of them."""

__all__ = ["REGIONS_KEY", "RegionFiles", "note_of", "read_region_settings", "region_settings_of"]

import csv
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import IO, Any

from cflow_plugin.decisions.notes import read_note
from cflow_plugin.decisions.regions import Region, RegionSettings
from cflow_plugin.files import atomic_file

REGIONS_KEY = "cflow_plugin_regions"
"""Under this name an exported file says, as JSON, which regions are shown, and has the reference images' levels."""

_COLUMNS = ("image", "left", "top", "width", "height", "area", "area_mm2", "peak", "p_value")


def note_of(settings: RegionSettings) -> str:
    """What an exported file has under :data:`REGIONS_KEY`."""
    return json.dumps(asdict(settings))


def region_settings_of(note: str | None) -> RegionSettings:
    """The settings that an exported file's note holds.

    Args:
        note: What stands under :data:`REGIONS_KEY`, ``None`` where nothing does.
    """
    return RegionSettings(**json.loads(note)) if note else RegionSettings()


def read_region_settings(path: Path) -> RegionSettings:
    """Read an exported file's settings for regions, whatever runs the file.

    Args:
        path: The .xml or .onnx file.

    Raises:
        CflowError: If it cannot be read.
    """
    return region_settings_of(read_note(path, REGIONS_KEY))


class RegionFiles:
    """Writes ``regions.jsonl``, a line for each image as soon as it is seen, and tables of it at the end.

    The tables are ``regions.csv``, a row for each region, and ``regions.coco.json``, with its boxes and polygons as
    COCO's detections have them.

    Args:
        folder: Where they go; it must be there.
        prefix: What their names start with.
        part: What the name of a process's own lines ends with, where several write.
    """

    def __init__(self, folder: Path, prefix: str = "", part: str = "") -> None:
        self._folder, self._prefix = folder, prefix
        self.lines = folder / f"{prefix}regions.jsonl{part}"
        self._file: IO[str] = self.lines.open("w", encoding="utf-8")

    def add(self, image: str, size: tuple[int, int], regions: Sequence[Region | Mapping[str, Any]]) -> None:
        """Write the line of an image.

        Args:
            image: Its name.
            size: Its height and width.
            regions: What was found in it.
        """
        found = [region._asdict() if isinstance(region, Region) else region for region in regions]
        self._file.write(json.dumps({"image": image, "width": size[1], "height": size[0], "regions": found}) + "\n")
        self._file.flush()

    def take(self, part: Path) -> None:
        """Append another process's lines, and remove its file."""
        with part.open(encoding="utf-8") as lines:
            self._file.writelines(lines)
        part.unlink()

    def close(self, with_tables: bool = True) -> None:
        """End the lines, and write the tables.

        Args:
            with_tables: Whether to do so.
        """
        self._file.close()
        if not with_tables:
            return
        with (
            atomic_file(self._folder / f"{self._prefix}regions.csv") as partial,
            partial.open("w", newline="", encoding="utf-8") as file,
        ):
            table = csv.writer(file)
            table.writerow(_COLUMNS)
            for line in self._read():
                for region in line["regions"]:
                    rest = [region[name] for name in _COLUMNS[5:]]
                    table.writerow([line["image"], *region["box"], *("" if value is None else value for value in rest)])
        with (
            atomic_file(self._folder / f"{self._prefix}regions.coco.json") as partial,
            partial.open("w", encoding="utf-8") as file,
        ):
            # Piece by piece: a camera's images of weeks need not fit into memory.
            file.write('{"categories": [{"id": 1, "name": "anomaly"}], "images": [')
            for number, line in enumerate(self._read()):
                image = {"id": number, "file_name": line["image"], "width": line["width"], "height": line["height"]}
                file.write(",\n" * bool(number) + json.dumps(image))
            file.write('], "annotations": [')
            count = 0
            for number, line in enumerate(self._read()):
                for region in line["regions"]:
                    polygon = [value for corner in region["contour"] for value in corner]
                    rest = {name: region[name] for name in ("area", "area_mm2", "p_value") if region[name] is not None}
                    count += 1
                    annotation = {
                        "id": count,
                        "image_id": number,
                        "category_id": 1,
                        "iscrowd": 0,
                        "score": region["peak"],
                    }
                    annotation |= {"bbox": region["box"], "segmentation": [polygon], **rest}
                    file.write(",\n" * (count > 1) + json.dumps(annotation))
            file.write("]}\n")

    def _read(self) -> Iterator[dict[str, Any]]:
        with self.lines.open(encoding="utf-8") as lines:
            yield from map(json.loads, lines)
