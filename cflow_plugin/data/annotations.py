"""Annotations as labelling tools write them, made into the masks that anomalib reads."""

__all__ = ["read_annotations", "write_masks"]

import json
import logging
import math
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any, cast
from xml.etree import ElementTree

import cv2
import numpy as np
from numpy.typing import NDArray
from skimage.draw import polygon2mask

from cflow_plugin.errors import CflowError
from cflow_plugin.images.listing import list_folder
from cflow_plugin.images.reading import size_of

logger = logging.getLogger(__name__)

Polygon = NDArray[np.float64]
"""Corners ``(N, 2)``, x and y, in pixels, or in shares of width and height where the format has these."""


def read_annotations(source: Path) -> tuple[dict[str, list[Polygon]], bool]:
    """Read what is marked in each image: boxes, polygons, circles and ellipses.

    Args:
        source: A file of COCO (.json), VIA (.json), LabelMe (.json) or CVAT (.xml, "for images"); or a folder of
            LabelMe's .json or YOLO's .txt files, named as the images are.

    Returns:
        Polygons by the images' names, as far as folders and suffixes are known, and whether they are in shares of width
        and height, as YOLO's.

    Raises:
        CflowError: If it cannot be read as one of these.
    """
    found: dict[str, list[Polygon]] = defaultdict(list)
    is_yolo = False
    try:
        if source.is_dir():
            is_yolo = not any(source.glob("*.json"))
            files = sorted(source.glob("*.txt" if is_yolo else "*.json"))
            if not files:
                raise ValueError("it holds neither .json nor .txt files")
            for file in files:
                if is_yolo:
                    found[file.stem] += [_yolo(line) for line in file.read_text().splitlines() if line.strip()]
                else:
                    _add(found, _labelme(json.loads(file.read_text(encoding="utf-8")), file.stem))
        elif source.suffix.lower() == ".xml":
            _add(found, _cvat(ElementTree.parse(source).getroot()))
        else:
            content = json.loads(source.read_text(encoding="utf-8"))
            if "annotations" in content and "images" in content:
                _add(found, _coco(content))
            elif "shapes" in content:
                _add(found, _labelme(content, source.stem))
            else:
                _add(found, _via(content.get("_via_img_metadata", content)))
    except (OSError, ValueError, KeyError, TypeError, AttributeError, IndexError, ElementTree.ParseError) as error:
        message = (
            f"{source} could not be read as annotations of COCO, VIA, LabelMe, CVAT or YOLO "
            f"({type(error).__name__}: {error})."
        )
        raise CflowError(message) from error
    return dict(found), is_yolo


def _add(found: dict[str, list[Polygon]], shapes: Iterator[tuple[str, Polygon | None]]) -> None:
    for name, polygon in shapes:
        polygons = found[name.replace("\\", "/")]
        if polygon is not None:
            polygons.append(polygon)


def _coco(content: Mapping[str, Any]) -> Iterator[tuple[str, Polygon | None]]:
    names = {image["id"]: image["file_name"] for image in content["images"]}
    for annotation in content["annotations"]:
        name, parts = names[annotation["image_id"]], annotation.get("segmentation")
        if isinstance(parts, dict):
            raise ValueError("it holds run-length masks; export polygons or boxes")
        if parts:
            yield from ((name, np.reshape(part, (-1, 2)).astype(float)) for part in parts)
        else:
            yield name, _box(*annotation["bbox"])


def _yolo(line: str) -> Polygon:
    _, *values = map(float, line.split())
    if len(values) == 4:
        x, y, width, height = values
        return _box(x - width / 2, y - height / 2, width, height)
    return np.reshape(values, (-1, 2))


def _labelme(content: Mapping[str, Any], stem: str) -> Iterator[tuple[str, Polygon | None]]:
    name = Path(content.get("imagePath", stem).replace("\\", "/")).name
    yield name, None
    for shape in content["shapes"]:
        points, kind = np.array(shape["points"], float), shape.get("shape_type", "polygon")
        if kind == "rectangle":
            left, top, right, bottom = map(float, (*points.min(0), *points.max(0)))
            yield name, _box(left, top, right - left, bottom - top)
        elif kind == "circle":
            radius = math.dist(*points)
            yield name, _ellipse(float(points[0, 0]), float(points[0, 1]), radius, radius)
        elif kind == "polygon":
            yield name, points
        else:
            raise ValueError(f"a shape of kind {kind!r} has no area")


def _via(content: Mapping[str, Any]) -> Iterator[tuple[str, Polygon | None]]:
    for image in content.values():
        yield image["filename"], None
        regions = image["regions"]
        for region in regions.values() if isinstance(regions, dict) else regions:
            shape = region["shape_attributes"]
            if shape["name"] == "rect":
                polygon = _box(*(shape[name] for name in ("x", "y", "width", "height")))
            elif shape["name"] in ("polygon", "polyline"):
                polygon = np.stack([shape["all_points_x"], shape["all_points_y"]], 1).astype(float)
            else:
                polygon = _ellipse(
                    shape["cx"], shape["cy"], shape.get("r", shape.get("rx")), shape.get("r", shape.get("ry"))
                )
            yield image["filename"], polygon


def _cvat(root: ElementTree.Element) -> Iterator[tuple[str, Polygon | None]]:
    images = root.findall("image")
    if not images:
        raise ValueError("it has no images; export as 'CVAT for images'")
    for image in images:
        name = image.attrib["name"]
        yield name, None
        for box in image.findall("box"):
            left, top, right, bottom = (float(box.attrib[key]) for key in ("xtl", "ytl", "xbr", "ybr"))
            yield name, _box(left, top, right - left, bottom - top)
        for polygon in image.findall("polygon"):
            yield name, np.array([point.split(",") for point in polygon.attrib["points"].split(";")], float)


def _box(left: float, top: float, width: float, height: float) -> Polygon:
    right, bottom = left + width, top + height
    return np.array([[left, top], [right, top], [right, bottom], [left, bottom]], float)


def _ellipse(x: float, y: float, rx: float, ry: float) -> Polygon:
    angle = np.linspace(0, 2 * np.pi, 64, endpoint=False)
    return np.stack([x + rx * np.cos(angle), y + ry * np.sin(angle)], 1)


def write_masks(annotations: Path, images: Path, output: Path) -> int:
    """Write a mask for each image of a folder, as anomalib's ``mask_dir`` takes them.

    Args:
        annotations: As for :func:`read_annotations`.
        images: Folder of the annotated images of defects.
        output: Folder for the masks, which are called as the images are.

    Returns:
        How many there are.

    Raises:
        CflowError: If annotations cannot be read, or an image has none.
    """
    found, in_shares = read_annotations(annotations)
    files = list_folder(images)
    names = _names_of(files, found)
    lacking = [file.name for file, name in zip(files, names, strict=True) if name is None or not found[name]]
    if lacking or not files:
        what = f"nothing for {', '.join(lacking[:3])} ({len(lacking)} images)" if lacking else f"no image in {images}"
        message = f"{annotations} marks {what}; --images is a folder of annotated images of defects alone."
        raise CflowError(message)
    for file, name in zip(files, names, strict=True):
        size = size_of(file)
        mask = draw_mask(found[cast("str", name)], size, in_shares)
        target = (output / file.relative_to(images)).with_suffix(".png")
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(cv2.imencode(".png", mask)[1].tobytes())
    return len(files)


def _names_of(files: Sequence[Path], names: Iterable[str]) -> list[str | None]:
    """Which of the annotated names is each file's: the one whose last parts are most like its own.

    Tools write an image's name alone, or with folders that may lie elsewhere by now.

    Raises:
        CflowError: If two files have the same name, or a file two.
    """
    by_stem: dict[str, list[PurePosixPath]] = defaultdict(list)
    for name in names:
        by_stem[PurePosixPath(name).stem].append(PurePosixPath(name))
    found: list[str | None] = []
    taken: dict[str, Path] = {}
    for file in files:
        folders = file.absolute().parent.parts[::-1]
        alike = {name: _common(folders, name.parent.parts[::-1]) for name in by_stem[file.stem]}
        best = [name for name in alike if alike[name] == max(alike.values())]
        if len(best) > 1:
            message = f"{file} may be {' or '.join(map(str, best))} of the annotations; put it into a folder called so."
            raise CflowError(message)
        name = str(best[0]) if best else None
        if name is not None and taken.setdefault(name, file) != file:
            message = (
                f"{taken[name]} and {file} are both called {name} in the annotations; give each a name of its own."
            )
            raise CflowError(message)
        found.append(name)
    return found


def _common(first: Sequence[str], second: Sequence[str]) -> int:
    return next((at for at, pair in enumerate(zip(first, second)) if pair[0] != pair[1]), min(len(first), len(second)))  # noqa: B905


def draw_mask(polygons: Sequence[Polygon], size: tuple[int, int], in_shares: bool = False) -> NDArray[np.uint8]:
    """A mask of polygons: 255 for pixels whose centres lie in one, and for the nearest pixel of one without any.

    Args:
        polygons: Their corners.
        size: Height and width.
        in_shares: Whether these are in shares of width and height.
    """
    mask = np.zeros(size, bool)
    for polygon in polygons:
        corners = polygon[:, ::-1] * (size if in_shares else 1) - 0.5  # pixels' centres are whole numbers
        inside = polygon2mask(size, corners)
        if not inside.any():
            row, column = np.rint(corners.mean(0)).astype(int).clip(0, np.array(size) - 1)
            inside[row, column] = True
        mask |= inside
    return mask.astype(np.uint8) * 255
