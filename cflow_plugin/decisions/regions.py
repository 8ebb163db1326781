"""From an anomaly map and its mask to regions: where, how large, how sure."""

__all__ = ["Region", "RegionSettings", "draw_regions", "find_regions", "outlines_of", "region_level", "shown_mask"]

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import cv2
import numpy as np
from numpy.typing import NDArray

from cflow_plugin.decisions.conformal import p_values
from cflow_plugin.errors import CflowError

_EDGE = (255, 255, 0)
_COLOUR = (255, 0, 255)  # seldom in a picture, and not in its heat map


@dataclass(frozen=True)
class RegionSettings:
    """Which regions of a mask are shown, and what is said of them.

    Attributes:
        smallest: Pixels of the map that a region has at least.
        most: Regions shown of an image, those with the highest peaks; ``None`` for all.
        mm_per_pixel: Length of a picture's pixel in millimetres, where areas are wanted in mm².
        levels: For each reference image the highest level at which its map has such a region, see
            :func:`region_level`; without them regions have no p-value.
        outlines: Edges of what is looked at, where that is not all, as corners in shares of width and height.

    Raises:
        CflowError: If a setting is out of range.
    """

    smallest: int = 1
    most: int | None = None
    mm_per_pixel: float | None = None
    levels: Sequence[float] = ()
    outlines: Sequence[Sequence[Sequence[float]]] = ()

    def __post_init__(self) -> None:
        for name, value in (("smallest_region", self.smallest), ("most_regions", self.most)):
            if value is not None and value < 1:
                message = f"{name} must be at least 1, got {value}."
                raise CflowError(message)
        if self.mm_per_pixel is not None and not self.mm_per_pixel > 0:
            message = f"mm_per_pixel must be above 0, got {self.mm_per_pixel}."
            raise CflowError(message)


class Region(NamedTuple):
    """A connected part of a mask, in pixels of the picture; ``(0, 0)`` is the upper left corner of the first pixel.

    Attributes:
        box: Left, top, width, height.
        area: Area in square pixels.
        area_mm2: Area in mm², where the scale is known.
        peak: Highest value of the map in it.
        p_value: Its conformal p-value, where there are reference levels. Of a normal image the least one of all its
            regions is at most a with a probability of at most a.
        contour: Corners of its outer edge.
    """

    box: tuple[float, float, float, float]
    area: float
    area_mm2: float | None
    peak: float
    p_value: float | None
    contour: list[tuple[float, float]]


class _Part(NamedTuple):
    label: int
    window: tuple[slice, slice]
    area: int
    peak: float


def find_regions(
    anomaly_map: NDArray[Any],
    mask: NDArray[Any],
    settings: RegionSettings = RegionSettings(),
    size: tuple[int, int] | None = None,
) -> list[Region]:
    """Find the regions of an image: 8-connected parts of its mask, those with the highest peaks first.

    Args:
        anomaly_map: ``(H, W)``, as predicted.
        mask: ``(H, W)``, what is anomalous.
        settings: Which are shown.
        size: Height and width of the picture, if it is not the map's.

    Example:
        >>> anomaly_map = np.pad(np.full((2, 3), 0.75), 4)
        >>> [region] = find_regions(anomaly_map, anomaly_map > 0.5, RegionSettings(mm_per_pixel=0.5))
        >>> region.box, region.area, region.area_mm2, region.peak
        ((4.0, 4.0, 3.0, 2.0), 6.0, 1.5, 0.75)
    """
    labels, parts = _parts(anomaly_map, mask, settings)
    height, width = size or mask.shape
    scale = np.array([width / mask.shape[1], height / mask.shape[0]])
    found = []
    for part in parts:
        rows, columns = part.window
        inside = labels[part.window] == part.label
        start, extent = np.array([columns.start, rows.start]), np.array(inside.shape[::-1])
        # In doubled pixels the contour runs along the region's edge, a quarter of a pixel inside, and is never a line.
        doubled = np.kron(inside, np.ones((2, 2))).astype(np.uint8)
        contours, _ = cv2.findContours(doubled, cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_SIMPLE)
        corners = ((contours[0][:, 0] + 0.5) / 2 + start) * scale
        area = float(part.area * scale.prod())
        p_value = None
        if len(settings.levels):
            level = region_level(np.where(inside, anomaly_map[part.window], -np.inf), settings.smallest)
            p_value = float(p_values(level, settings.levels))
        found.append(
            Region(
                box=tuple(np.concatenate([start * scale, extent * scale]).round(2).tolist()),
                area=round(area, 2),
                area_mm2=None if settings.mm_per_pixel is None else round(area * settings.mm_per_pixel**2, 6),
                peak=round(part.peak, 6),
                p_value=p_value,
                contour=[(x, y) for x, y in corners.round(2).tolist()],
            )
        )
    return found


def shown_mask(anomaly_map: NDArray[Any], mask: NDArray[Any], settings: RegionSettings) -> NDArray[np.bool_]:
    """A mask without regions that are not shown.

    Args:
        anomaly_map: ``(H, W)``.
        mask: ``(H, W)``.
        settings: Which are shown.
    """
    labels, parts = _parts(anomaly_map, mask, settings)
    return np.isin(labels, [part.label for part in parts])


def _parts(anomaly_map: NDArray[Any], mask: NDArray[Any], settings: RegionSettings) -> tuple[NDArray[Any], list[_Part]]:
    _, labels, stats, _ = cv2.connectedComponentsWithStats(mask.astype(np.uint8), connectivity=8)
    found = []
    for label, (x, y, width, height, area) in enumerate(stats.tolist()):
        if label and area >= settings.smallest:
            window = slice(y, y + height), slice(x, x + width)
            found.append(_Part(label, window, area, float(anomaly_map[window][labels[window] == label].max())))
    return labels, sorted(found, key=lambda part: -part.peak)[: settings.most]


def region_level(anomaly_map: NDArray[Any], smallest: int = 1) -> float:
    """The highest level at which a map has a region: it is at least so high on so many connected pixels.

    With this as a map's score, the rule that keeps a false-alarm rate for scores keeps it for regions: what is above a
    threshold holds a region of that size if, and only if, this level is above it.

    Args:
        anomaly_map: ``(H, W)``; pixels of minus infinity are in no region.
        smallest: Pixels that a region has at least.

    Raises:
        CflowError: If the map has fewer pixels.

    Example:
        >>> region_level(np.array([[9, 0, 5], [0, 0, 4], [0, 0, 4]]), smallest=2)
        4.0
    """
    if smallest == 1:
        return float(anomaly_map.max())
    values = np.sort(anomaly_map[np.isfinite(anomaly_map)], axis=None)
    if len(values) < smallest:
        message = f"smallest_region is {smallest} pixels, but the map has {len(values)}; choose a smaller one."
        raise CflowError(message)
    # At the lowest value all belongs to one region (or to few, whose largest may be too small); at the highest too few.
    low, high = 0, len(values) - smallest + 1
    while high - low > 1:
        middle = (low + high) // 2
        _, _, stats, _ = cv2.connectedComponentsWithStats((anomaly_map >= values[middle]).astype(np.uint8))
        low, high = (middle, high) if stats[1:, cv2.CC_STAT_AREA].max() >= smallest else (low, middle)
    return float(values[low])


def outlines_of(interest: NDArray[Any]) -> list[list[list[float]]]:
    """The edges of what is looked at, for :class:`RegionSettings`.

    Args:
        interest: ``(H, W)`` bool.
    """
    if interest.all():
        return []
    contours, _ = cv2.findContours(interest.astype(np.uint8), cv2.RETR_CCOMP, cv2.CHAIN_APPROX_SIMPLE)
    return [((contour[:, 0] + 0.5) / interest.shape[::-1]).round(4).tolist() for contour in contours]


def draw_regions(picture: NDArray[Any], regions: Sequence[Region], settings: RegionSettings = RegionSettings()) -> None:
    """Draw boxes and contours into a picture, with the area beside each, and the edges of what is looked at.

    Args:
        picture: ``(H, W, 3)`` bytes, of the size that the regions were found for; it is changed.
        regions: The regions.
        settings: Has the edges.
    """
    width = max(1, min(picture.shape[:2]) // 400)
    for region in regions:
        left, top, right, bottom = (
            round(value)
            for value in (*region.box[:2], region.box[0] + region.box[2] - 1, region.box[1] + region.box[3] - 1)
        )
        margin = 2 * width
        corner = max(0, left - margin), max(0, top - margin)
        cv2.rectangle(picture, corner, (right + margin, bottom + margin), _COLOUR, width)
        contour = np.array(region.contour, float).astype(np.int32)
        cv2.polylines(picture, [contour], isClosed=True, color=_COLOUR, thickness=1)
        text = f"{region.area:.0f} px" if region.area_mm2 is None else f"{region.area_mm2:.2g} mm2"
        scale = cv2.getFontScaleFromHeight(cv2.FONT_HERSHEY_SIMPLEX, max(8, min(picture.shape[:2]) // 50))
        place = corner[0], max(12 * width, corner[1] - margin)
        cv2.putText(picture, text, place, cv2.FONT_HERSHEY_SIMPLEX, scale, _COLOUR, width, cv2.LINE_AA)
    for outline in settings.outlines:
        corners = np.rint(np.array(outline) * picture.shape[1::-1] - 0.5).astype(np.int32)
        cv2.polylines(picture, [corners], isClosed=True, color=_EDGE, thickness=width)
