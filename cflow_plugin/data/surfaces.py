"""Clean surfaces: six families of material, drawn from random numbers.

Lengths are in design pixels: a picture is 256 of them wide whatever its resolution, so that the same number of threads,
chips or tiles is seen at every ``resolution``. Colours are display values between 0 and 1. Families with a direction
take a ``turn``, in radians, by which a piece lies off the usual one.
"""

from __future__ import annotations

__all__ = ["FAMILIES", "WIDTH", "RemovableParts", "Surface", "connected_regions", "coordinates", "noise", "smoothstep"]

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
from scipy import fft, ndimage
from scipy.spatial import KDTree

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from numpy.typing import NDArray

    Array = NDArray[np.float64]

WIDTH = 256.0  # design pixels across a picture


@dataclass(frozen=True)
class RemovableParts:
    """Parts of a surface that can be missing one by one.

    Attributes:
        labels: The part each pixel belongs to, shape ``(H, W)``; 0 where there is none.
        without: What is seen in their place, shape ``(H, W, 3)``.
    """

    labels: NDArray[np.int64]
    without: Array


@dataclass(frozen=True)
class Surface:
    """A piece of material before light falls on it and a camera takes its picture.

    Attributes:
        colour: Shape ``(H, W, 3)``.
        region: Where the piece lies in the picture, shape ``(H, W)``. Defects are placed there.
        parts: What can be missing, under the name of the defect that takes it away.
    """

    colour: Array
    region: NDArray[np.bool_]
    parts: Mapping[str, RemovableParts] = field(default_factory=dict)


def coordinates(size: int) -> tuple[Array, Array]:
    """Pixel centres in design pixels.

    Args:
        size: Width and height of the picture in pixels.

    Returns:
        ``y`` and ``x``, each of shape ``(size, size)``, with 0 in the middle of the picture.
    """
    axis = (np.arange(size, dtype=np.float64) + 0.5) * (WIDTH / size) - WIDTH / 2
    y, x = np.meshgrid(axis, axis, indexing="ij")
    return y, x


def connected_regions(mask: NDArray[np.bool_]) -> tuple[NDArray[np.int32], int]:
    """Number the connected regions of a mask; pixels that meet at a corner alone are not connected.

    Args:
        mask: Shape ``(H, W)``.

    Returns:
        The region each pixel belongs to, shape ``(H, W)``, counted from 1, with 0 outside; and how many there are.
    """
    labels = np.zeros(mask.shape, np.int32)
    count = ndimage.label(mask, output=labels)
    return labels, int(np.asarray(count))


def smoothstep(value: Array, low: float, high: float) -> Array:
    """Rise smoothly from 0 at ``low`` to 1 at ``high``."""
    t = np.clip((value - low) / (high - low), 0.0, 1.0)
    return t * t * (3.0 - 2.0 * t)


def noise(rng: np.random.Generator, size: int, along: float, across: float | None = None, angle: float = 0.0) -> Array:
    r"""Gaussian noise with a Gaussian autocorrelation, of zero mean and unit variance.

    It is filtered in the frequency domain, where a turned, stretched kernel costs no more than a round one:
    :math:`e^{-2\pi^2(\sigma_a^2 f_a^2 + \sigma_c^2 f_c^2)}`.

    Args:
        rng: Source of randomness.
        size: Width and height of the picture in pixels.
        along: Standard deviation of the kernel along ``angle``, in design pixels.
        across: The same at right angles; a round kernel if left out.
        angle: Direction of the longer axis, radians from the x axis.

    Returns:
        Shape ``(size, size)``; it continues at the opposite edge.
    """
    step = WIDTH / size
    fy = fft.fftfreq(size, step)[:, None]
    fx = fft.rfftfreq(size, step)[None, :]
    f_along = fx * np.cos(angle) + fy * np.sin(angle)
    f_across = fy * np.cos(angle) - fx * np.sin(angle)
    exponent = (along * f_along) ** 2 + ((along if across is None else across) * f_across) ** 2
    spectrum = fft.rfft2(rng.standard_normal((size, size))) * np.exp(-2 * np.pi**2 * exponent)
    spectrum[0, 0] = 0.0
    values = np.asarray(fft.irfft2(spectrum, s=(size, size)))
    return values / values.std()


def _turned(size: int, angle: float) -> tuple[Array, Array]:
    """Coordinates along (``u``) and across (``v``) a direction."""
    y, x = coordinates(size)
    return x * np.cos(angle) + y * np.sin(angle), y * np.cos(angle) - x * np.sin(angle)


def _mix(below: Array, above: Array, share: Array) -> Array:
    """Blend colours, ``share`` (shape ``(H, W)``) of ``above``."""
    return below + (above - below) * share[..., None]


def _tilt(rng: np.random.Generator, degrees: float) -> float:
    """How far a piece lies from straight on the table, in radians."""
    return float(np.deg2rad(rng.uniform(-degrees, degrees)))


def _per_item(rng: np.random.Generator, index: NDArray[np.int64], spread: float) -> Array:
    """A brightness factor for every numbered thread, chip or tile."""
    table = 1.0 + spread * rng.standard_normal(4096)
    return table[index % table.size]


def weave(rng: np.random.Generator, size: int, turn: float = 0.0) -> Surface:
    """Twill cloth: dark warp threads over and under pale weft threads, two by two."""
    angle = turn + _tilt(rng, 3.0)
    pitch = 9.0 * rng.uniform(0.97, 1.03)
    u, v = _turned(size, angle)
    u = (u + rng.uniform(0, 4 * pitch) + 1.2 * noise(rng, size, 32)) / pitch
    v = (v + rng.uniform(0, 4 * pitch) + 1.2 * noise(rng, size, 32)) / pitch
    warp_index, weft_index = np.floor(u).astype(np.int64), np.floor(v).astype(np.int64)
    warp_bow = np.sqrt(1.0 - (1.9 * (u - warp_index - 0.5)) ** 2)
    weft_bow = np.sqrt(1.0 - (1.9 * (v - weft_index - 0.5)) ** 2)
    # Each thread swings once in four crossings, one crossing later than its neighbour.
    warp_height = warp_bow + 0.9 * np.cos(np.pi / 2 * (v + warp_index - 1.0))
    weft_height = weft_bow - 0.9 * np.cos(np.pi / 2 * (u + weft_index - 1.0))
    lead = warp_height - weft_height

    twist = 1.0 + 0.07 * noise(rng, size, 2.5, 0.6, angle + 1.1)
    warp = np.array([0.20, 0.29, 0.44]) * (0.45 + 0.65 * warp_bow * twist * _per_item(rng, warp_index, 0.06))[..., None]
    weft = np.array([0.80, 0.78, 0.72]) * (0.40 + 0.55 * weft_bow * twist * _per_item(rng, weft_index, 0.04))[..., None]
    colour = _mix(weft, warp, smoothstep(lead, -0.12, 0.12))
    colour *= (0.72 + 0.28 * smoothstep(np.abs(lead), 0.0, 0.8))[..., None]  # the upper thread shades the lower one

    # A broken warp thread bares the slack weft for a length of its own.
    length = rng.uniform(5.0, 14.0, 4096)[warp_index % 4096]
    piece = np.floor(v / length).astype(np.int64)
    labels = (warp_index % 512) * 512 + piece % 512 + 1
    bared = np.array([0.93, 0.86, 0.70]) * (0.45 + 0.55 * weft_bow * twist)[..., None]
    return Surface(np.clip(colour, 0, 1), np.ones((size, size), bool), {"broken_thread": RemovableParts(labels, bared)})


def brushed_metal(rng: np.random.Generator, size: int, turn: float = 0.0) -> Surface:
    """Steel sheet brushed in one direction."""
    angle = turn + _tilt(rng, 4.0)
    _, v = _turned(size, angle)
    value = 0.60 + 0.030 * noise(rng, size, 120, 3.0, angle)
    value += 0.055 * noise(rng, size, 50, 0.35, angle) + 0.045 * noise(rng, size, 14, 0.3, angle)
    value += 0.05 * np.cos((v + rng.uniform(-40, 40)) / 70.0)  # the broad sheen of a lamp
    return Surface(np.clip(value[..., None] * np.array([0.97, 1.0, 1.04]), 0, 1), np.ones((size, size), bool))


def wood_grain(rng: np.random.Generator, size: int, turn: float = 0.0) -> Surface:
    """A planed board: year rings cut lengthwise, fibres and pores."""
    angle = turn + _tilt(rng, 4.0)
    u, v = _turned(size, angle)
    v = v + 9.0 * noise(rng, size, 90, 34, angle) + 1.2 * noise(rng, size, 22, 5, angle)
    centre, bow = rng.uniform(-90, 90), rng.uniform(0.03, 0.12)
    ring = np.hypot(v - centre, bow * (u - rng.uniform(-150, 150)))
    phase = (ring / 15.0 + 0.35 * noise(rng, size, 70, 16, angle)) % 1.0
    # Early wood darkens slowly into late wood, and the next year begins abruptly.
    late = phase**2.2 * (1.0 - smoothstep(phase, 0.93, 1.0))
    fibre = noise(rng, size, 26, 0.5, angle)
    pores = smoothstep(noise(rng, size, 7, 0.45, angle), 2.0, 2.6)
    colour = _mix(np.array([0.80, 0.62, 0.41]), np.array([0.53, 0.33, 0.18]), 0.85 * late)
    colour *= (1.0 + 0.045 * fibre + 0.03 * noise(rng, size, 60) - 0.40 * pores)[..., None]
    return Surface(np.clip(colour, 0, 1), np.ones((size, size), bool))


def terrazzo(rng: np.random.Generator, size: int) -> Surface:
    """Stone chips of many sizes and five colours, cast in cement and ground flat."""
    stones = np.array(
        [[0.93, 0.91, 0.87], [0.66, 0.64, 0.61], [0.74, 0.56, 0.36], [0.50, 0.27, 0.21], [0.25, 0.29, 0.27]]
    )
    cement = (
        np.array([0.80, 0.77, 0.72]) * (1.0 + 0.035 * noise(rng, size, 0.7) + 0.02 * noise(rng, size, 12))[..., None]
    )
    crumbs = noise(rng, size, 1.2)
    crumb_index, crumb_count = connected_regions(crumbs > 1.3)
    kinds = rng.integers(0, len(stones), crumb_count + 1)
    colour = _mix(cement, stones[kinds][crumb_index], smoothstep(crumbs, 1.4, 1.8))

    # A chip fills its Voronoi cell up to a joint of cement, or up to its own size.
    count = 300
    half = 1.2 * WIDTH / 2  # beyond the edge, so that chips are cut by it
    y, x = coordinates(size)
    where = np.stack([y + 1.1 * noise(rng, size, 2.5), x + 1.1 * noise(rng, size, 2.5)], axis=-1)
    found = KDTree(rng.uniform(-half, half, (count, 2))).query(where, k=2)
    distance, index = (np.asarray(part) for part in found)
    joint, chip = distance[..., 1] - distance[..., 0] - 2.4, index[..., 0]
    radius = np.where(rng.random(count) < 0.65, rng.uniform(7.0, 14.0, count), -1.0)[chip]
    inside = smoothstep(np.minimum(joint, radius - distance[..., 0]), 0.0, 0.9)
    stone = stones[rng.integers(0, len(stones), count)][chip]
    stone = stone * (_per_item(rng, chip, 0.06) * (1.0 + 0.03 * noise(rng, size, 1.5)))[..., None]
    colour = _mix(colour, stone, inside)

    labels = np.where(inside > 0.4, chip + 1, 0)
    shadow = 0.25 + 0.35 * smoothstep(joint, 1.0, 7.0)  # a chip leaves a bowl
    pit = np.array([0.62, 0.56, 0.48]) * (shadow * (1.0 + 0.12 * noise(rng, size, 0.8)))[..., None]
    return Surface(
        np.clip(colour, 0, 1), np.ones((size, size), bool), {"missing_chip": RemovableParts(labels, np.clip(pit, 0, 1))}
    )


def mosaic(rng: np.random.Generator, size: int) -> Surface:
    """Glazed square tiles in grey grout."""
    angle = _tilt(rng, 2.5)
    pitch = 43.0
    u, v = _turned(size, angle)
    u, v = (u + rng.uniform(0, pitch)) / pitch, (v + rng.uniform(0, pitch)) / pitch
    column, row = np.floor(u).astype(np.int64), np.floor(v).astype(np.int64)
    tile = (row % 64) * 64 + column % 64
    # Tiles are laid by hand: each sits a little off its place.
    shift = rng.normal(0.0, 0.012, (2, 4096))
    a, b = u - column - 0.5 - shift[0][tile], v - row - 0.5 - shift[1][tile]
    edge = 0.5 - 0.052 - np.maximum(np.abs(a), np.abs(b))  # distance to the tile's border, in pitches
    corner = np.hypot(np.maximum(np.abs(a) - 0.38, 0), np.maximum(np.abs(b) - 0.38, 0))
    edge = np.minimum(edge, 0.068 - corner) * pitch

    glazes = np.array([[0.20, 0.45, 0.50], [0.28, 0.53, 0.55], [0.16, 0.37, 0.47]])
    glaze = glazes[rng.integers(0, 3, 4096)][tile] * _per_item(rng, tile, 0.05)[..., None]
    bevel = (1.0 - smoothstep(edge, 0.0, 3.0)) * np.where(np.abs(a) > np.abs(b), -np.sign(a), -np.sign(b))
    gleam = 0.10 * np.exp(-((a + 0.14) ** 2 + (b + 0.18) ** 2) / 0.035)
    glaze = glaze * (1.0 + 0.28 * bevel + 0.035 * noise(rng, size, 5) + 0.02 * noise(rng, size, 0.6))[..., None]
    glaze = glaze + gleam[..., None]
    grout = np.array([0.66, 0.64, 0.60]) * (1.0 + 0.07 * noise(rng, size, 0.8) + 0.03 * noise(rng, size, 6))[..., None]
    inside = smoothstep(edge, -0.6, 0.6)
    colour = _mix(grout, glaze, inside)

    # One corner of a tile breaks off along a line and bares the clay.
    heading = rng.uniform(0, 2 * np.pi, 4096)[tile]
    broken = a * np.cos(heading) + b * np.sin(heading) + 0.03 * noise(rng, size, 2.0)
    broken = broken > rng.uniform(0.05, 0.38, 4096)[tile]
    labels = np.where(broken & (edge > 0.0), tile + 1, 0)
    clay = np.array([0.72, 0.45, 0.32]) * (1.0 + 0.06 * noise(rng, size, 1.0))[..., None]
    return Surface(
        np.clip(colour, 0, 1), np.ones((size, size), bool), {"broken_tile": RemovableParts(labels, np.clip(clay, 0, 1))}
    )


def grille(rng: np.random.Generator, size: int) -> Surface:
    """A round perforated cover with four screws, always in the same place: here position carries meaning."""
    angle = _tilt(rng, 2.0)
    u, v = _turned(size, angle)
    u, v = u + rng.uniform(-3, 3), v + rng.uniform(-3, 3)
    radius = np.hypot(u, v)
    plate = (
        np.array([0.70, 0.71, 0.70]) * (1.0 + 0.025 * noise(rng, size, 0.5) + 0.015 * noise(rng, size, 20))[..., None]
    )
    lit = -(u + v) / (np.sqrt(2.0) * np.maximum(radius, 1.0))  # 1 towards the lamp, at the upper left
    groove = np.exp(-(((radius - 91.0) / 2.0) ** 2))
    rim = np.exp(-(((radius - 117.0) / 3.0) ** 2))
    plate = plate * (1.0 - 0.22 * groove * (1.0 + lit) + 0.18 * rim * lit)[..., None]
    blocked = np.array([0.60, 0.60, 0.58]) * (1.0 + 0.06 * noise(rng, size, 1.0))[..., None]

    # The holes' centres form a triangular lattice: two rectangular ones, of which the nearer centre counts.
    pitch, rise, hole = 15.0, 15.0 * np.sqrt(0.75), 4.9
    candidates = []
    for odd in (0, 1):
        row = 2 * np.rint((v / rise - odd) / 2) + odd
        column = np.rint(u / pitch - odd / 2) + odd / 2
        candidates.append((column, row, np.hypot(u - column * pitch, v - row * rise)))
    (even_column, even_row, even), (odd_column, odd_row, odd) = candidates
    column, row = np.where(even < odd, even_column, odd_column), np.where(even < odd, even_row, odd_row)
    drilled = np.hypot(column * pitch, row * rise) < 80.0
    depth = np.where(drilled, hole - np.minimum(even, odd), -hole)
    holes = np.where(depth > -0.4, (row + 16) * 64 + 2 * column + 33, 0).astype(np.int64)
    inner = (u - column * pitch + v - row * rise) / (np.sqrt(2.0) * hole)  # the far wall of a hole catches the light
    dark = np.array([0.07, 0.07, 0.08]) + 0.33 * smoothstep(inner, 0.55, 1.0)[..., None]
    colour = _mix(plate, dark, smoothstep(depth, -0.6, 0.6))

    screws, bare = np.zeros((size, size), np.int64), colour
    for number, turned in enumerate(np.deg2rad([45.0, 135.0, 225.0, 315.0]), start=1):
        du, dv = u - 104.0 * np.cos(turned), v - 104.0 * np.sin(turned)
        distance = np.hypot(du, dv)
        slot = rng.uniform(0, np.pi)
        across = np.abs(dv * np.cos(slot) - du * np.sin(slot))
        head = np.array([0.50, 0.49, 0.46]) * (1.05 - 0.035 * (du + dv))[..., None]
        head = head * (1.0 - 0.7 * (1.0 - smoothstep(across, 0.7, 1.7)) * (distance < 5.6))[..., None]
        head = head * (0.6 + 0.4 * smoothstep(7.4 - distance, 0.0, 1.4))[..., None]
        colour = _mix(colour, head, smoothstep(7.4 - distance, -0.5, 0.5))
        empty = np.array([0.10, 0.10, 0.11]) + 0.25 * smoothstep((du + dv) / 6.0, 0.6, 1.3)[..., None]
        bare = _mix(bare, empty, smoothstep(4.2 - distance, -0.5, 0.5))
        screws[distance < 7.9] = number

    mat = np.array([0.17, 0.20, 0.25]) * (1.0 + 0.16 * noise(rng, size, 0.8))[..., None]
    shadow = 0.45 + 0.55 * smoothstep(np.hypot(u - 3.0, v - 3.0), 116.0, 126.0)
    on = smoothstep(119.5 - radius, -0.6, 0.6)
    colour, bare = (_mix(mat * shadow[..., None], each, on) for each in (colour, bare))
    parts = {
        "blocked_hole": RemovableParts(holes, np.clip(blocked, 0, 1)),
        "missing_screw": RemovableParts(screws, np.clip(bare, 0, 1)),
    }
    return Surface(np.clip(colour, 0, 1), radius < 112.0, parts)


FAMILIES: Mapping[str, Callable[..., Surface]] = {
    "brushed_metal": brushed_metal,
    "grille": grille,
    "mosaic": mosaic,
    "terrazzo": terrazzo,
    "weave": weave,
    "wood_grain": wood_grain,
}
