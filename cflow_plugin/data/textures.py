"""A procedural texture data set in the MVTec AD layout: something to train on before anything is downloaded."""

from __future__ import annotations

__all__ = ["CATEGORIES", "Picture", "Recipe", "draw", "generate_category"]

import json
import secrets
import shutil
import zlib
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from rich.progress import track
from skimage import io

from cflow_plugin.data.defects import DEFECTS, spoil
from cflow_plugin.data.surfaces import FAMILIES, WIDTH, coordinates
from cflow_plugin.errors import CflowError

if TYPE_CHECKING:
    from numpy.typing import NDArray

CATEGORIES: tuple[str, ...] = tuple(FAMILIES)
# To be raised with every change to what is drawn, so that no data set of an older drawing is taken for today's.
_VERSION = 1
_MANIFEST = "textures.json"
_SMALLEST = 64


class Picture(NamedTuple):
    """One picture of a piece.

    Attributes:
        image: RGB, shape ``(size, size, 3)``, 8 bits.
        mask: 255 where a defect changed the piece and 0 elsewhere, shape ``(size, size)``, 8 bits.
        clean: The same picture of the same piece, were it not for the defect. Outside the mask it equals ``image``.
    """

    image: NDArray[np.uint8]
    mask: NDArray[np.uint8]
    clean: NDArray[np.uint8]


@dataclass(frozen=True)
class Recipe:
    """All that a category's files depend on.

    Attributes:
        category: One of ``CATEGORIES``.
        resolution: Width and height of the images in pixels, at least 64.
        seed: Not negative. Another seed gives other pieces of the same materials.
        train_good: Number of training images; there are no defects among them.
        test_good: Number of test images without a defect.
        test_defect: Number of test images for each kind of defect.
        val_good: Number of validation images without a defect.
        val_defect: Number of validation images for each kind of defect.

    Raises:
        CflowError: If the category is unknown or a number out of range.
    """

    category: str
    resolution: int = 256
    seed: int = 0
    train_good: int = 40
    test_good: int = 16
    test_defect: int = 6
    val_good: int = 10
    val_defect: int = 3

    def __post_init__(self) -> None:
        """Refuse what cannot be drawn before anything is written."""
        if self.category not in CATEGORIES:
            msg = f"There is no texture category {self.category!r}; choose one of {', '.join(CATEGORIES)}."
            raise CflowError(msg)
        if self.resolution < _SMALLEST:
            msg = f"Textures need a resolution of at least {_SMALLEST} pixels; {self.resolution} were asked for."
            raise CflowError(msg)
        if self.seed < 0:
            msg = f"The textures' seed must be 0 or more; choose another than {self.seed}."
            raise CflowError(msg)
        for name in ("train_good", "test_good", "test_defect", "val_good", "val_defect"):
            if getattr(self, name) < 1:
                msg = f"Textures need at least one image of each sort; set {name} to 1 or more."
                raise CflowError(msg)


def draw(category: str, kind: str, split: str, index: int, *, seed: int = 0, size: int = 256) -> Picture:
    """Draw one picture.

    Every picture has a random stream of its own, keyed by all arguments but ``size``: it does not depend on which other
    pictures are drawn, and no two splits share a piece.

    Args:
        category: One of ``CATEGORIES``.
        kind: ``"good"`` or one of the category's ``DEFECTS``.
        split: ``"train"``, ``"val"`` or ``"test"``.
        index: Number of the picture.
        seed: Seed of the data set.
        size: Width and height in pixels.

    Returns:
        The picture, its mask and its defect-free double.
    """
    stream = np.random.SeedSequence([seed, zlib.crc32(f"{category}/{split}/{kind}".encode()), index])
    for_piece, for_defect, for_camera = (np.random.default_rng(each) for each in stream.spawn(3))
    surface = FAMILIES[category](for_piece, size)
    light, grain = _light(for_camera, size), 0.008 * for_camera.standard_normal((size, size, 3))

    def photograph(colour: NDArray[np.float64]) -> NDArray[np.uint8]:
        return np.rint(255 * np.clip(colour * light + grain, 0.0, 1.0)).astype(np.uint8)

    clean = photograph(surface.colour)
    if kind == "good":
        return Picture(clean, np.zeros((size, size), np.uint8), clean)
    colour, mask = spoil(category, kind, surface, for_defect)
    return Picture(photograph(colour), 255 * mask.astype(np.uint8), clean)


def _light(rng: np.random.Generator, size: int) -> NDArray[np.float64]:
    """Illumination: never quite as bright, nor from quite the same side, and weaker in the corners."""
    y, x = (axis / (WIDTH / 2) for axis in coordinates(size))
    falloff = rng.uniform(-0.08, 0.08) * x + rng.uniform(-0.08, 0.08) * y - 0.03 * (x**2 + y**2)
    return (rng.uniform(0.95, 1.05) + falloff)[..., None] * (1.0 + rng.uniform(-0.006, 0.006, 3))


def generate_category(root: Path | str, category: str, **settings: int) -> None:
    """Write a category's images, unless they are there already.

    The files follow the MVTec AD layout, in two folders because that layout knows no validation images::

        <root>/<category>/train/good/000.png
                          test/good/000.png
                          test/<defect>/000.png
                          ground_truth/<defect>/000_mask.png
                          textures.json
        <root>/validation/<category>/test/...
                                     ground_truth/...
                                     textures.json

    Each folder is drawn under a partial name beside its final one and renamed once it is complete, so a folder that
    is there is whole, whatever happened to the process that wrote it. Of two processes at work at once, the later one
    finds the folder in place, with the very files it has drawn itself, and drops its own.

    The same settings give the same bytes with the same versions of NumPy, SciPy and scikit-image.

    Args:
        root: Folder of the data set.
        category: One of ``CATEGORIES``.
        **settings: Fields of ``Recipe`` that shall differ from their defaults.

    Raises:
        CflowError: If the category is unknown; if there are files of other settings, which are never overwritten
            since somebody may be using them; or if the folder cannot be written.
    """
    recipe = Recipe(category, **settings)
    missing = [part for part in _parts(Path(root), recipe) if not _is_there(part.folder, recipe)]
    if not missing:
        return
    try:
        for part in missing:
            _write(part, recipe)
    except OSError as error:
        msg = (
            f"The textures could not be written to {root} ({error.strerror or error}). "
            "Free some space there, or set root to a folder that can be written to."
        )
        raise CflowError(msg) from error


class _Part(NamedTuple):
    """A folder in the MVTec AD layout."""

    folder: Path
    pictures: list[tuple[str, str, str, int]]  # folder of the split, split, kind, index


def _parts(root: Path, recipe: Recipe) -> list[_Part]:
    kinds = DEFECTS[recipe.category]
    val = [("test", "val", "good", i) for i in range(recipe.val_good)]
    val += [("test", "val", kind, i) for kind in kinds for i in range(recipe.val_defect)]
    main = [("train", "train", "good", i) for i in range(recipe.train_good)]
    main += [("test", "test", "good", i) for i in range(recipe.test_good)]
    main += [("test", "test", kind, i) for kind in kinds for i in range(recipe.test_defect)]
    return [_Part(root / "validation" / recipe.category, val), _Part(root / recipe.category, main)]


def _manifest(recipe: Recipe) -> dict[str, int | str]:
    return {"generator": _VERSION, **asdict(recipe)}


def _is_there(folder: Path, recipe: Recipe) -> bool:
    """Whether a folder holds what the recipe asks for.

    Raises:
        CflowError: If it holds something else.
    """
    if not folder.exists():
        return False
    try:
        found = json.loads((folder / _MANIFEST).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        found = None
    if found == _manifest(recipe):
        return True
    if not isinstance(found, dict):
        difference = f"is not a folder of generated textures: it has no readable {_MANIFEST}"
    else:
        wanted = _manifest(recipe)
        keys = [key for key in wanted if found.get(key) != wanted[key]]
        listed = ", ".join(f"{key}={found.get(key)} where {wanted[key]} is asked for" for key in keys)
        difference = f"was generated with other settings: {listed}"
    msg = f"{folder} {difference}. Delete that folder to have it generated anew, or set root to another one."
    raise CflowError(msg)


def _write(part: _Part, recipe: Recipe) -> None:
    part.folder.parent.mkdir(parents=True, exist_ok=True)
    # The leading dot keeps the partial folder out of sight; the token keeps two processes, on two machines too, apart.
    partial = part.folder.with_name(f".{part.folder.name}-{secrets.token_hex(4)}")
    try:
        for folder, split, kind, index in track(part.pictures, f"Drawing {part.folder}", transient=True):
            picture = draw(recipe.category, kind, split, index, seed=recipe.seed, size=recipe.resolution)
            _save(partial / folder / kind / f"{index:03}.png", picture.image)
            if kind != "good":
                _save(partial / "ground_truth" / kind / f"{index:03}_mask.png", picture.mask)
        (partial / _MANIFEST).write_text(json.dumps(_manifest(recipe), indent=2) + "\n", encoding="utf-8")
        try:
            partial.rename(part.folder)
        except OSError:
            if not _is_there(part.folder, recipe):
                raise
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _save(path: Path, image: NDArray[np.uint8]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    io.imsave(path, image, check_contrast=False)
