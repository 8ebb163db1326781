"""Images, masks and labels that belong together, and what is wrong where they do not match."""

__all__ = ["check_pairs", "check_roles", "check_table", "match_beside", "match_folders", "pair_masks"]

import re
from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path

from pandas import DataFrame

from cflow_plugin.errors import CflowError
from cflow_plugin.images.listing import IMAGES, is_hidden

_SHOWN = 3
_LABELS = ("normal", "abnormal", "normal_test")
_SPLITS = ("train", "test", "val")
_GOOD = ("good", "ok")
_NAMED = "A mask has its image's name, or that with a word before or behind: 000.png or 000_mask.png for 000.png."


def pair_masks(images: Sequence[Path], masks: Sequence[Path]) -> dict[Path, Path]:
    """Find each image's mask by its name.

    A mask is called as its image, or has a word such as ``_mask`` before or behind. Where images of several folders
    have the same name, their folders' names have to match as well.

    Args:
        images: Images of defects.
        masks: Their masks.

    Returns:
        The mask of each image.

    Raises:
        CflowError: If an image has no mask, or several, or a mask no image.

    Example:
        >>> pair_masks([Path("bad/1.png"), Path("bad/11.png")], [Path("masks/11_mask.png"), Path("masks/1_mask.png")])[
        ...     Path("bad/1.png")
        ... ].name
        '1_mask.png'
    """
    by_stem: dict[str, list[Path]] = defaultdict(list)
    for mask in masks:
        for stem in _stems_in(mask.stem):
            by_stem[stem].append(mask)
    folders = {image.parent.name for image in images}
    several = {stem for stem, count in _count(image.stem for image in images).items() if count > 1}
    found: dict[Path, Path] = {}
    lacking: list[Path] = []
    for image in images:
        candidates = by_stem.get(image.stem, [])
        exact = [mask for mask in candidates if mask.stem == image.stem]
        candidates = exact or candidates
        if image.stem in several or len(candidates) > 1:
            beside = [mask for mask in candidates if mask.parent.name == image.parent.name]
            candidates = beside or [mask for mask in candidates if mask.parent.name not in folders]
        if len(candidates) > 1:
            names = _names(candidates)
            message = f"{len(candidates)} masks could belong to {image}: {names}. {_NAMED}"
            raise CflowError(message)
        if candidates:
            found[image] = candidates[0]
        else:
            lacking.append(image)
    unused = [mask for mask in masks if mask not in set(found.values())]
    twice = [mask for mask, count in _count(found.values()).items() if count > 1]
    if twice:
        shared = [image for image, mask in found.items() if mask == twice[0]]
        message = f"{twice[0]} could be the mask of {len(shared)} images: {_names(shared)}. {_NAMED}"
        raise CflowError(message)
    _complain_of(lacking, unused)
    return found


def _complain_of(lacking: Sequence[Path], unused: Sequence[Path]) -> None:
    parts = []
    if lacking:
        parts.append(f"no mask for {_number(lacking, 'image')} of defects ({_names(lacking)})")
    if unused:
        parts.append(f"no image of a defect for {_number(unused, 'mask')} ({_names(unused)})")
    if parts:
        message = f"Images and masks do not match: there is {' and '.join(parts)}. {_NAMED}"
        raise CflowError(message)


def _stems_in(stem: str) -> set[str]:
    """What an image may be called whose mask is called so: whatever is left when words at the ends are taken away."""
    pieces = re.findall(r"[0-9]+|[^\W\d_]+|[\W_]", stem)
    starts = range(len(pieces))
    return {"".join(pieces[start:end]) for start in starts for end in range(start + 1, len(pieces) + 1)}


def check_roles(roles: Mapping[str, Sequence[Path]]) -> None:
    """Refuse images that are in two roles at once.

    Args:
        roles: Files by the setting that names their folder.

    Raises:
        CflowError: If a file is in two roles, or there are masks and no images of defects.
    """
    if roles.get("mask_dir") and not roles.get("abnormal_dir"):
        message = "--data.mask_dir names masks, but --data.abnormal_dir no images of defects that they belong to."
        raise CflowError(message)
    role_of: dict[Path, str] = {}
    for role, files in roles.items():
        for file in files:
            other = role_of.setdefault(file, role)
            if other != role:
                message = (
                    f"{file} is among the images of --data.{other} and of --data.{role}: name folders that do not lie "
                    "in one another."
                )
                raise CflowError(message)


def match_folders(root: Path, suffixes: Collection[str] = IMAGES) -> None:
    """Compare images of defects with masks in the folders that most published data sets have.

    These are ``test/KIND/NAME.png`` and ``ground_truth/KIND/NAME_mask.png``, or ``NAME`` as a folder of several masks.

    Args:
        root: Folder with ``test`` and ``ground_truth``; one that is not there is left to anomalib.
        suffixes: What counts as an image.

    Raises:
        CflowError: If they do not match.
    """
    images, masks = _by_kind(root, "test", suffixes), _by_kind(root, "ground_truth", suffixes)
    lacking: list[Path] = []
    unused: list[Path] = []
    for kind in sorted(images.keys() | masks.keys()) if images else ():
        of_kind = images.get(kind, []), masks.get(kind, [])
        if all(of_kind):
            _pair_in_order(*of_kind)
        elif kind not in _GOOD or of_kind[1]:
            lacking += of_kind[0]
            unused += of_kind[1]
    _complain_of(lacking, unused)


def match_beside(root: Path) -> None:
    """Compare images with masks that lie beside them, as BMP beside JPEG, or in folders called ``label``.

    Args:
        root: Folder with all of them; of one that has no such masks nothing is said.

    Raises:
        CflowError: If they do not match.
    """
    files = [file for file in sorted(root.rglob("*")) if file.suffix.lower() in IMAGES]
    files = [file for file in files if not is_hidden(file.relative_to(root))]
    masks = [file for file in files if file.parent.name == "label" or file.suffix.lower() == ".bmp"]
    if 0 < len(masks) < len(files):
        _pair_in_order([file for file in files if file not in set(masks)], masks)


def _pair_in_order(images: Sequence[Path], masks: Sequence[Path]) -> None:
    """Refuse what anomalib, which pairs the first image with the first mask, would pair otherwise than names do."""
    paired = pair_masks(images, masks)
    for image, mask in zip(images, masks, strict=True):
        if paired[image] != mask:
            _complain_of_order(image, mask)


def _complain_of_order(image: Path, mask: Path) -> None:
    message = (
        f"{image} would get the mask {mask}, which by its name is another image's: names are sorted in different "
        "orders. Fill numbers up with zeros, 001.png and 001_mask.png for example."
    )
    raise CflowError(message)


def _by_kind(root: Path, split: str, suffixes: Collection[str]) -> dict[str, list[Path]]:
    """Images, or folders of masks, by the folder that they lie in."""
    found: dict[str, list[Path]] = defaultdict(list)
    for file in sorted((root / split).glob("*/*")):
        is_taken = file.suffix.lower() in suffixes or (split == "ground_truth" and file.is_dir())
        if is_taken and not is_hidden(file.relative_to(root)):
            found[file.parent.name].append(file)
    if split == "test":
        for kind in _GOOD:
            found.pop(kind, None)
    return found


def check_pairs(samples: DataFrame) -> None:
    """Check the masks that a data set gives to its images of defects.

    Args:
        samples: Columns ``image_path``, ``mask_path`` (a path, several, or none) and ``label_index``.

    Raises:
        CflowError: If a mask is not there, or is by its name another image's.
    """
    if not {"mask_path", "label_index"} <= set(samples.columns):
        return
    pairs = [
        (Path(image), Path(mask))
        for image, masks, label in zip(samples["image_path"], samples["mask_path"], samples["label_index"], strict=True)
        for mask in (masks if isinstance(masks, list) else [masks])
        if label == 1 and isinstance(mask, str) and mask
    ]
    if absent := [mask for _, mask in pairs if not mask.is_file()]:
        message = f"There is no mask {_names(absent)}, which {_number(absent, 'image')} of defects should have."
        raise CflowError(message)
    stems = {Path(image).stem for image in samples["image_path"]}
    for image, mask in pairs:
        names = _stems_in(mask.stem) | {mask.parent.name}
        if image.stem not in names and names & stems:
            _complain_of_order(image, mask)


def check_table(samples: DataFrame, root: Path | None) -> None:
    """Check a table of images and labels, as ``Tabular`` takes it.

    Args:
        samples: Columns ``image_path``, and ``label``, ``label_index`` or ``split``; perhaps ``mask_path``.
        root: Folder that paths are relative to.

    Raises:
        CflowError: If a column is absent, a label is none, or a file is absent or listed twice.
    """
    columns = ", ".join(map(str, samples.columns))
    if "image_path" not in samples or not {"label", "label_index", "split"} & set(samples.columns):
        message = (
            f"The table has the columns {columns}: it needs image_path, and label (normal, abnormal or normal_test), "
            "label_index (0 or 1) or split (train or test); a CSV's columns are separated by commas."
        )
        raise CflowError(message)
    if samples.empty:
        message = "The table of images has no row."
        raise CflowError(message)
    for column, allowed in {"label": _LABELS, "label_index": (0, 1, "0", "1"), "split": _SPLITS}.items():
        if column in samples:
            wrong = [
                f"{path} ({value!r})"
                for path, value in zip(samples["image_path"], samples[column], strict=True)
                if getattr(value, "value", value) not in allowed
            ]
            _refuse(wrong, f"has no {column} that is one of {', '.join(map(str, dict.fromkeys(map(str, allowed))))}")
    paths = [str(path) for path in samples["image_path"]]
    _refuse([path for path, count in _count(paths).items() if count > 1], "is listed more than once")
    for column in ("image_path", "mask_path"):
        given = [str(path) for path in samples.get(column, []) if isinstance(path, str | Path) and str(path)]
        absent = [path for path in given if not ((root or Path()) / path).is_file()]
        _refuse(absent, f"of the column {column} is not there (paths are relative to {root or Path.cwd()})")
    wrong = [path for path in paths if Path(path).suffix.lower() not in IMAGES]
    _refuse(wrong, "is no image by its suffix")
    if "mask_path" in samples and "label_index" in samples:
        masks, labels = list(samples["mask_path"]), list(samples["label_index"])
        has = [isinstance(mask, str | Path) and bool(str(mask)) for mask in masks]
        rows = list(zip(paths, has, map(int, labels), strict=True))
        if any(has):
            _refuse([path for path, mask, label in rows if label and not mask], "is of a defect and has no mask")
        _refuse([path for path, mask, label in rows if mask and not label], "is normal and has a mask")


def _refuse(wrong: Sequence[str], what: str) -> None:
    if wrong:
        more = f" and {len(wrong) - _SHOWN} more" if len(wrong) > _SHOWN else ""
        message = f"The table of images cannot be used: {', '.join(wrong[:_SHOWN])}{more} {what}."
        raise CflowError(message)


def _count(values: Iterable) -> dict:
    found: dict = defaultdict(int)
    for value in values:
        found[value] += 1
    return found


def _number(paths: Sequence[Path], what: str) -> str:
    return f"1 {what}" if len(paths) == 1 else f"{len(paths)} {what}s"


def _names(paths: Sequence[Path]) -> str:
    names = ", ".join(map(str, paths[:_SHOWN]))
    return f"{names}, …" if len(paths) > _SHOWN else names
