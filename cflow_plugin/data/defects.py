"""Defects, each with the exact mask of the pixels it changes."""

from __future__ import annotations

__all__ = ["DEFECTS", "spoil"]

from typing import TYPE_CHECKING

import numpy as np
from scipy import ndimage
from scipy.spatial import KDTree

from cflow_plugin.data.surfaces import FAMILIES, WIDTH, connected_regions, coordinates, noise, smoothstep

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from numpy.typing import NDArray

    from cflow_plugin.data.surfaces import Surface

    Array = NDArray[np.float64]

# A change a person can make out: about 8 of 255 grey levels in the strongest channel.
_VISIBLE = 0.03
# Neither lone changed pixels beside a defect, nor pixels inside that happen to agree with what was there before, are
# outlined up to these areas, in square design pixels.
_SPECK = 12
_GAP = 40

DEFECTS: Mapping[str, tuple[str, ...]] = {
    "brushed_metal": ("dent", "fibre", "misaligned", "scratch", "stain"),
    "grille": ("blocked_hole", "fibre", "missing_screw", "scratch", "stain"),
    "mosaic": ("broken_tile", "crack", "fibre", "scratch", "stain"),
    "terrazzo": ("crack", "fibre", "missing_chip", "scratch", "stain"),
    "weave": ("broken_thread", "fibre", "hole", "misaligned", "stain"),
    "wood_grain": ("crack", "fibre", "hole", "misaligned", "scratch", "stain"),
}


def spoil(category: str, kind: str, surface: Surface, rng: np.random.Generator) -> tuple[Array, NDArray[np.bool_]]:
    """Give a surface a defect.

    What a defect does is drawn freely; the mask is then made of the pixels where the difference can be seen, and all
    other pixels are put back. So the mask is exact whatever the defect.

    Args:
        category: Family of the surface.
        kind: One of the family's ``DEFECTS``.
        surface: The surface without a defect.
        rng: Source of randomness.

    Returns:
        The surface's colour with the defect, shape ``(H, W, 3)``, and the mask, shape ``(H, W)``; outside the mask the
        colour is the given surface's.
    """
    pixel = (len(surface.region) / WIDTH) ** 2
    while True:
        taken_away = kind in surface.parts
        colour = _missing_part(kind, surface, rng) if taken_away else _PAINTERS[kind](category, surface, rng)
        colour = np.clip(colour, 0.0, 1.0)
        mask = np.abs(colour - surface.colour).max(axis=-1) >= _VISIBLE
        mask = _without_specks(mask, _SPECK * pixel)
        mask = ~_without_specks(~mask, _GAP * pixel)
        if mask.any():  # a stain that fell into a dark hole is no defect: draw another
            return np.where(mask[..., None], colour, surface.colour), mask


def _without_specks(mask: NDArray[np.bool_], area: float) -> NDArray[np.bool_]:
    """The mask's connected regions of more than ``area`` pixels."""
    labels, _ = connected_regions(mask)
    return mask & (np.bincount(labels.ravel()) > area)[labels]


def _place(surface: Surface, rng: np.random.Generator, margin: float) -> Array:
    """A random point ``(x, y)`` of the piece, at least ``margin`` design pixels from the picture's border."""
    y, x = coordinates(len(surface.region))
    free = surface.region & (np.maximum(np.abs(x), np.abs(y)) < WIDTH / 2 - margin)
    chosen = rng.choice(np.flatnonzero(free))
    return np.array([x.flat[chosen], y.flat[chosen]])


def _path(rng: np.random.Generator, start: Array, length: float, heading: float, bend: float, jag: float) -> Array:
    """A line of points half a design pixel apart.

    Args:
        rng: Source of randomness.
        start: Its middle, ``(x, y)``.
        length: In design pixels.
        heading: Direction in its middle, radians.
        bend: Curvature's standard deviation, radians in a design pixel; it changes slowly.
        jag: Standard deviation of sudden turns every few design pixels, radians.
    """
    steps = int(2 * length)
    slow = ndimage.gaussian_filter1d(rng.standard_normal(steps + 80), 20)[40:-40]
    headings = np.cumsum(0.5 * bend * slow / 0.12)  # 0.12 is what the filter leaves of a unit deviation
    headings += np.repeat(rng.normal(0.0, jag, steps // 8 + 1), 8)[:steps]
    headings += heading - headings[steps // 2]
    points = np.cumsum(0.5 * np.stack([np.cos(headings), np.sin(headings)], axis=1), axis=0)
    return start + points - points[steps // 2]


def _beside(size: int, path: Array, reach: float) -> tuple[Array, Array, Array]:
    """Where pixels lie in relation to a path.

    Returns:
        Distance to it (``inf`` beyond ``reach``), the same with a sign for the side, and the position along it from
        0 to 1; each of shape ``(size, size)``.
    """
    y, x = coordinates(size)
    points = np.stack([x, y], axis=-1)
    distance, index = KDTree(path).query(points, distance_upper_bound=reach)
    index = np.minimum(index, len(path) - 1)
    direction = np.gradient(path, axis=0)[index]
    offset = points - path[index]
    side = np.sign(direction[..., 0] * offset[..., 1] - direction[..., 1] * offset[..., 0])
    return distance, np.where(np.isfinite(distance), distance * side, np.inf), index / (len(path) - 1)


def _blend(colour: Array, other: Array, share: Array) -> Array:
    return colour + (other - colour) * share[..., None]


def _inside_line(distance: Array, half_width: Array | float) -> Array:
    """Coverage of pixels by a line, with soft edges."""
    return np.clip(half_width + 0.5 - distance, 0.0, 1.0)


def _scratch(category: str, surface: Surface, rng: np.random.Generator) -> Array:
    """A dark furrow with a bright burr on one side."""
    depth = rng.uniform(0.45, 0.95)
    # Along the brushing a scratch on metal would not be one.
    heading = np.pi / 2 + rng.uniform(-1.2, 1.2) if category == "brushed_metal" else rng.uniform(0, np.pi)
    path = _path(rng, _place(surface, rng, 30.0), rng.uniform(40, 130), heading, 0.008, 0.03)
    distance, signed, along = _beside(len(surface.region), path, 6.0)
    taper = np.sqrt(np.clip(4 * along * (1 - along), 0, 1))
    width = rng.uniform(0.5, 1.2) * taper
    colour = _blend(surface.colour, 0.25 * surface.colour, depth * _inside_line(distance, width) * taper)
    burr = _inside_line(np.abs(signed - width - 1.2), 0.7 * width) * taper
    return _blend(colour, 0.3 + 0.75 * surface.colour, depth * burr)


def _stain(category: str, surface: Surface, rng: np.random.Generator) -> Array:
    """Something spilt and dried: a tinted blot with a darker edge."""
    del category
    size = len(surface.region)
    y, x = coordinates(size)
    centre = _place(surface, rng, 30.0)
    radius, stretch, angle = rng.uniform(12, 34), rng.uniform(0.7, 1.4), rng.uniform(0, np.pi)
    dx, dy = x - centre[0], y - centre[1]
    along, across = dx * np.cos(angle) + dy * np.sin(angle), dy * np.cos(angle) - dx * np.sin(angle)
    level = 1.0 - np.hypot(along * stretch, across / stretch) / radius + 0.16 * noise(rng, size, 9)
    cover = smoothstep(level, 0.0, 0.15)
    edge = cover * (1.0 - smoothstep(level, 0.12, 0.35))
    tint = np.array([[0.55, 0.38, 0.22], [0.25, 0.24, 0.26], [0.62, 0.58, 0.30], [0.30, 0.38, 0.55]])[rng.integers(4)]
    strength = rng.uniform(0.25, 0.65)
    share = strength * np.clip(0.65 * cover + 0.5 * edge, 0.0, 1.0) * (1.0 + 0.10 * noise(rng, size, 4))
    return _blend(surface.colour, tint * (0.35 + 0.65 * surface.colour), share)


def _fibre(category: str, surface: Surface, rng: np.random.Generator) -> Array:
    """A loose thread that fell on the piece, with its shadow."""
    del category
    size = len(surface.region)
    path = _path(rng, _place(surface, rng, 35.0), rng.uniform(45, 140), rng.uniform(0, 2 * np.pi), 0.06, 0.0)
    dyes = np.array(
        [[0.75, 0.12, 0.12], [0.12, 0.20, 0.60], [0.94, 0.93, 0.90], [0.08, 0.08, 0.09], [0.85, 0.65, 0.15]]
    )
    contrast = np.abs(dyes - surface.colour[surface.region].mean(axis=0)).max(axis=1)
    dye = rng.choice(dyes[contrast > 0.25])
    width = rng.uniform(0.45, 1.1)
    shadow, _, _ = _beside(size, path + 1.8, 6.0)
    distance, signed, _ = _beside(size, path, 6.0)
    colour = _blend(surface.colour, 0.55 * surface.colour, 0.6 * np.clip(1.2 - 0.5 * shadow, 0.0, 1.0))
    rounded = 0.85 + 0.3 * np.clip(np.where(np.isfinite(signed), -signed, 0.0), -1, 1)
    return _blend(colour, dye * rounded[..., None], _inside_line(distance, width))


def _crack(category: str, surface: Surface, rng: np.random.Generator) -> Array:
    """A jagged, branching gap that runs out at its ends; wood splits along its grain."""
    size = len(surface.region)
    heading = rng.normal(0.0, 0.06) if category == "wood_grain" else rng.uniform(0, np.pi)
    jag = 0.15 if category == "wood_grain" else 0.55
    trunk = _path(rng, _place(surface, rng, 35.0), rng.uniform(50, 140), heading, 0.01, jag)
    fork = trunk[int(rng.uniform(0.3, 0.7) * len(trunk))]
    length = rng.uniform(25, 60)
    turn = heading + rng.choice([-1, 1]) * rng.uniform(0.3, 0.9) * (0.4 if category == "wood_grain" else 1.0)
    branch = _path(rng, fork + 0.5 * length * np.array([np.cos(turn), np.sin(turn)]), length, turn, 0.01, jag)
    branch += fork - branch[0]
    width, depth = rng.uniform(0.6, 1.5), rng.uniform(0.55, 0.95)
    distance, _, along = _beside(size, trunk, 6.0)
    share = _inside_line(distance, width * np.clip(4 * along * (1 - along), 0.1, 1.0))
    distance, _, along = _beside(size, branch, 6.0)
    share = np.maximum(share, _inside_line(distance, 0.8 * width * (1.0 - 0.8 * along)))
    return _blend(surface.colour, 0.15 * surface.colour, depth * share)


def _hole(category: str, surface: Surface, rng: np.random.Generator) -> Array:
    """A hole with a torn rim: dark inside, lit on its lower right edge."""
    size = len(surface.region)
    y, x = coordinates(size)
    centre, radius = _place(surface, rng, 24.0), rng.uniform(3.5, 11.0)
    dx, dy = x - centre[0], y - centre[1]
    torn = 1.4 if category == "weave" else 0.5
    depth = radius + torn * noise(rng, size, 2.0) - np.hypot(dx * rng.uniform(0.75, 1.3), dy)
    lit = (dx + dy) / (np.sqrt(2.0) * radius)
    rim = np.clip(1.0 - np.abs(depth + 0.6) / 1.4, 0.0, 1.0)
    colour = surface.colour * (1.0 + 0.55 * rim * np.clip(lit, -1, 1))[..., None]
    inner = np.array([0.07, 0.06, 0.05]) + 0.25 * surface.colour * smoothstep(lit, 0.3, 1.1)[..., None]
    return _blend(colour, inner, smoothstep(depth, -0.3, 1.2))


def _dent(category: str, surface: Surface, rng: np.random.Generator) -> Array:
    """A shallow bump pressed into sheet metal: only the light falls on it otherwise."""
    del category
    y, x = coordinates(len(surface.region))
    centre, radius = _place(surface, rng, 30.0), rng.uniform(7, 16)
    dx, dy = (x - centre[0]) / radius, (y - centre[1]) / (radius * rng.uniform(0.7, 1.3))
    slope = (dx + dy) * np.exp(-(dx**2 + dy**2))
    return surface.colour * (1.0 + rng.uniform(0.35, 0.75) * slope)[..., None]


def _misaligned(category: str, surface: Surface, rng: np.random.Generator) -> Array:
    """A patch of the same material that lies at another angle."""
    size = len(surface.region)
    turned = FAMILIES[category](rng, size, turn=rng.choice([-1, 1]) * np.deg2rad(rng.uniform(15, 75)))
    y, x = coordinates(size)
    centre, angle = _place(surface, rng, 40.0), rng.uniform(0, np.pi)
    dx, dy = x - centre[0], y - centre[1]
    along, across = dx * np.cos(angle) + dy * np.sin(angle), dy * np.cos(angle) - dx * np.sin(angle)
    # Between an ellipse and a rectangle.
    level = (np.abs(along / rng.uniform(16, 36)) ** 3 + np.abs(across / rng.uniform(12, 24)) ** 3) ** (1 / 3)
    tone = rng.choice([0.88, 1.10])  # no two batches have quite the same colour
    return _blend(surface.colour, tone * turned.colour, smoothstep(1.0 - level + 0.04 * noise(rng, size, 6), 0.0, 0.06))


def _missing_part(kind: str, surface: Surface, rng: np.random.Generator) -> Array:
    """One part of the surface taken away, or two."""
    parts = surface.parts[kind]
    # A sliver, at the border of the picture or of a part cut small, would be no defect anyone could find.
    pixels = np.bincount(np.where(surface.region, parts.labels, 0).ravel())
    pixels[0] = 0
    worthwhile = np.flatnonzero(pixels > 0.35 * pixels.max())
    gone = np.isin(parts.labels, rng.choice(worthwhile, size=min(rng.integers(1, 3), len(worthwhile)), replace=False))
    return np.where(gone[..., None], parts.without, surface.colour)


_PAINTERS: Mapping[str, Callable[[str, Surface, np.random.Generator], Array]] = {
    "crack": _crack,
    "dent": _dent,
    "fibre": _fibre,
    "hole": _hole,
    "misaligned": _misaligned,
    "scratch": _scratch,
    "stain": _stain,
}
