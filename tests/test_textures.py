"""The procedural textures: what is drawn, what is written, and what the data module makes of it."""

from __future__ import annotations

import errno
import json
import multiprocessing
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from anomalib.data import MVTecAD
from anomalib.data.datasets.image.mvtecad import CATEGORIES as MVTEC_CATEGORIES
from anomalib.data.utils import ValSplitMode
from jsonargparse import ArgumentParser
from skimage import io
from torchvision.transforms.v2 import RandomHorizontalFlip, Resize

from cflow_plugin.data import Textures, textures
from cflow_plugin.data.defects import DEFECTS
from cflow_plugin.data.textures import CATEGORIES, draw, generate_category
from cflow_plugin.errors import CflowError

SMALL = {
    "resolution": 64,
    "train_good": 4,
    "test_good": 3,
    "test_defect": 2,
    "val_good": 2,
    "val_defect": 1,
}
EVERY_DEFECT = [(category, kind) for category in CATEGORIES for kind in DEFECTS[category]]


def files(root: Path) -> dict[str, bytes]:
    return {str(path.relative_to(root)): path.read_bytes() for path in sorted(root.rglob("*")) if path.is_file()}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small data set of one category; not to be written to."""
    root = tmp_path_factory.mktemp("textures")
    generate_category(root, "weave", **SMALL)
    return root


@pytest.fixture
def copy(made: Path, tmp_path: Path) -> Path:
    """The same, to be spoilt."""
    return Path(shutil.copytree(made, tmp_path / "copy"))


# What is drawn


def test_categories_are_not_mistaken_for_those_of_mvtec_ad() -> None:
    assert len(CATEGORIES) >= 5
    assert not set(CATEGORIES) & set(MVTEC_CATEGORIES)
    assert set(DEFECTS) == set(CATEGORIES)
    assert all(len(kinds) >= 5 for kinds in DEFECTS.values())


@pytest.mark.parametrize(("category", "kind"), EVERY_DEFECT)
def test_the_mask_holds_the_changed_pixels_and_no_others(category: str, kind: str) -> None:
    for index in range(2):
        picture = draw(category, kind, "test", index, size=128)
        assert picture.image.dtype == picture.mask.dtype == np.uint8
        assert picture.image.shape == (128, 128, 3)
        assert picture.mask.shape == (128, 128)
        assert set(np.unique(picture.mask)) == {0, 255}
        change = np.abs(picture.image.astype(int) - picture.clean).max(axis=-1)
        inside = change[picture.mask == 255]
        assert not change[picture.mask == 0].any()
        # A blocked hole of the grille, the smallest defect there is, has 20 pixels here and 80 at full size.
        assert 16 <= inside.size < 0.2 * change.size
        assert (inside >= 4).mean() > 0.85  # not all: a patch of the same material agrees by chance here and there
        assert np.median(inside) >= 10


@pytest.mark.parametrize("category", CATEGORIES)
def test_good_pictures_vary_and_have_empty_masks(category: str) -> None:
    pictures = [draw(category, "good", "train", index, size=128) for index in range(2)]
    assert all(not picture.mask.any() for picture in pictures)
    assert all(picture.image.std() > 10 for picture in pictures)
    assert np.abs(pictures[0].image.astype(int) - pictures[1].image).mean() > 4


@pytest.mark.parametrize(("category", "kind"), EVERY_DEFECT)
def test_every_defect_can_be_drawn_at_the_smallest_size(category: str, kind: str) -> None:
    assert draw(category, kind, "val", 0, size=64).mask.any()


def test_each_picture_has_a_stream_of_its_own() -> None:
    keys = [(split, index, seed) for split in ("train", "val", "test") for index in (0, 1) for seed in (0, 1)]
    images = [draw("mosaic", "good", split, index, seed=seed, size=64).image for split, index, seed in keys]
    again = [draw("mosaic", "good", split, index, seed=seed, size=64).image for split, index, seed in reversed(keys)]
    assert len({image.tobytes() for image in images}) == len(keys)
    assert all(np.array_equal(one, other) for one, other in zip(images, reversed(again), strict=True))


# What is written


def test_layout(made: Path) -> None:
    found = set(files(made))
    wanted = {"weave/textures.json", "validation/weave/textures.json"}
    wanted |= {f"weave/train/good/{i:03}.png" for i in range(4)} | {f"weave/test/good/{i:03}.png" for i in range(3)}
    wanted |= {f"validation/weave/test/good/{i:03}.png" for i in range(2)}
    for kind in DEFECTS["weave"]:
        wanted |= {f"weave/test/{kind}/{i:03}.png" for i in range(2)}
        wanted |= {f"weave/ground_truth/{kind}/{i:03}_mask.png" for i in range(2)}
        wanted |= {f"validation/weave/test/{kind}/000.png", f"validation/weave/ground_truth/{kind}/000_mask.png"}
    assert found == wanted
    image = io.imread(made / "weave/test/hole/001.png")
    mask = io.imread(made / "weave/ground_truth/hole/001_mask.png")
    picture = draw("weave", "hole", "test", 1, size=64)
    assert np.array_equal(image, picture.image)
    assert np.array_equal(mask, picture.mask)


def test_the_same_settings_give_the_same_bytes(made: Path, tmp_path: Path) -> None:
    generate_category(tmp_path, "weave", **SMALL)
    assert files(tmp_path) == files(made)


def test_another_seed_gives_other_images(made: Path, tmp_path: Path) -> None:
    generate_category(tmp_path, "weave", **SMALL, seed=1)
    one, other = files(made), files(tmp_path)
    assert one.keys() == other.keys()
    assert all(one[name] != other[name] for name in one)


def test_what_is_there_is_not_drawn_again(made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(textures, "draw", None)
    generate_category(made, "weave", **SMALL)


@pytest.mark.parametrize("after", [0, 3, 10, 23])
def test_an_interrupted_run_is_not_taken_for_a_whole_one(
    after: int, made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn = 0

    def interrupted(*args: object, **kwargs: object) -> textures.Picture:
        nonlocal drawn
        if drawn == after:
            raise KeyboardInterrupt
        drawn += 1
        return draw(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(textures, "draw", interrupted)
        with pytest.raises(KeyboardInterrupt):
            generate_category(tmp_path, "weave", **SMALL)
    assert not (tmp_path / "weave").exists()
    assert not list(tmp_path.rglob(".*"))
    generate_category(tmp_path, "weave", **SMALL)
    assert files(tmp_path) == files(made)


def test_what_a_killed_run_leaves_is_not_in_the_way(made: Path, tmp_path: Path) -> None:
    # A process that is killed cannot clear up: its passing folder, whole or not, stays beside the final one.
    shutil.copytree(made / "weave", tmp_path / ".weave-01234567")
    generate_category(tmp_path, "weave", **SMALL)
    shutil.rmtree(tmp_path / ".weave-01234567")
    assert files(tmp_path) == files(made)


def test_two_processes_at_once(made: Path, tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=generate_category, args=(tmp_path, "weave"), kwargs=SMALL) for _ in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [0, 0]
    assert files(tmp_path) == files(made)


def test_the_later_of_two_runs_drops_its_own(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def overtaken(*args: object, **kwargs: object) -> textures.Picture:
        for part in ("weave", "validation/weave"):
            if not (tmp_path / part).exists():
                shutil.copytree(made / part, tmp_path / part)
        return draw(*args, **kwargs)

    monkeypatch.setattr(textures, "draw", overtaken)
    generate_category(tmp_path, "weave", **SMALL)
    assert files(tmp_path) == files(made)


@pytest.mark.parametrize("setting", ["resolution", "seed", "train_good", "val_defect"])
def test_other_settings_are_refused_and_the_files_kept(setting: str, copy: Path) -> None:
    before = files(copy)
    other = {"seed": 0, **SMALL}
    other[setting] += 1
    with pytest.raises(
        CflowError, match=rf"{setting}={other[setting] - 1} where {other[setting]} .* Delete that folder"
    ):
        generate_category(copy, "weave", **other)
    assert files(copy) == before


def test_an_older_generator_is_refused(copy: Path) -> None:
    manifest = copy / "weave" / "textures.json"
    manifest.write_text(json.dumps({**json.loads(manifest.read_text()), "generator": 0}))
    with pytest.raises(CflowError, match="generator=0"):
        generate_category(copy, "weave", **SMALL)


@pytest.mark.parametrize("content", [None, "{", "[]"])
def test_a_folder_of_something_else_is_refused(content: str | None, copy: Path) -> None:
    manifest = copy / "weave" / "textures.json"
    manifest.unlink()
    if content is not None:
        manifest.write_text(content)
    with pytest.raises(CflowError, match="set root to another"):
        generate_category(copy, "weave", **SMALL)


def test_a_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(textures.io, "imsave", full)
    with pytest.raises(CflowError, match=r"No space left on device.*Free some space"):
        generate_category(tmp_path, "weave", **SMALL)
    assert not files(tmp_path)


def test_a_root_that_cannot_be_written_to(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(CflowError, match="set root to a folder"):
        generate_category(tmp_path / "file", "weave", **SMALL)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"category": "carpet"}, "choose one of brushed_metal, grille, mosaic, terrazzo, weave, wood_grain"),
        ({"category": "weave", "resolution": 63}, "at least 64"),
        ({"category": "weave", "seed": -1}, "0 or more"),
        ({"category": "weave", "val_defect": 0}, "set val_defect to 1 or more"),
    ],
)
def test_what_cannot_be_drawn_is_refused_before_anything_is_written(
    settings: dict, message: str, tmp_path: Path
) -> None:
    with pytest.raises(CflowError, match=message):
        generate_category(tmp_path, **settings)
    with pytest.raises(CflowError, match=message):
        Textures(root=tmp_path, **settings)
    assert not list(tmp_path.iterdir())


# The data module


def test_a_batch(tmp_path: Path) -> None:
    datamodule = Textures(root=tmp_path, category="grille", train_batch_size=3, eval_batch_size=50, **SMALL)
    datamodule.prepare_data()
    datamodule.setup()
    train = next(iter(datamodule.train_dataloader()))
    assert train.image.shape == (3, 3, 64, 64)
    assert 0 <= train.image.min() < train.image.max() <= 1
    assert not train.gt_label.any()
    test = next(iter(datamodule.test_dataloader()))
    assert len(test.image) == 3 + 2 * 5
    assert test.gt_mask.shape == (13, 64, 64)
    assert torch.equal(test.gt_mask.flatten(1).any(dim=1), test.gt_label.bool())
    assert [Path(path).parent.name for path in test.image_path].count("missing_screw") == 2
    assert datamodule.task == "segmentation"


def test_thresholds_come_from_images_that_are_not_tested_on(made: Path) -> None:
    datamodule = Textures(root=made, category="weave", **SMALL)
    datamodule.prepare_data()
    datamodule.setup("fit")
    splits = [datamodule.train_data, datamodule.val_data, datamodule.test_data]
    assert [len(split) for split in splits] == [4, 2 + 5, 3 + 2 * 5]
    assert [split.has_anomalous for split in splits] == [False, True, True]
    assert all(split.has_normal for split in splits)
    paths = [path for split in splits for path in split.samples.image_path]
    assert len(paths) == len({Path(path).read_bytes() for path in paths})


def test_other_sources_of_validation_images(made: Path) -> None:
    datamodule = Textures(
        root=made, category="weave", val_split_mode=ValSplitMode.FROM_TEST, val_split_ratio=0.4, **SMALL
    )
    datamodule.setup()
    val, test = ({Path(p) for p in split.samples.image_path} for split in (datamodule.val_data, datamodule.test_data))
    assert not val & test
    assert len(val | test) == 13
    assert all(made / "weave" / "test" in path.parents for path in val)


def test_synthetic_test_images(made: Path) -> None:
    datamodule = Textures(root=made, category="weave", test_split_mode="synthetic", **SMALL)
    datamodule.setup()
    anomalous = datamodule.test_data.samples.query("label_index == 1")
    assert len(anomalous) == 1  # half of the three, rounded down
    assert all(made not in Path(path).parents for path in anomalous.image_path)


def test_augmentations(made: Path) -> None:
    datamodule = Textures(
        root=made,
        category="weave",
        train_augmentations=RandomHorizontalFlip(),
        val_augmentations=Resize((48, 48)),
        augmentations=Resize((32, 32)),
        **SMALL,
    )
    datamodule.setup()
    assert isinstance(datamodule.train_data.augmentations, RandomHorizontalFlip)
    assert datamodule.val_data[0].image.shape[-2:] == datamodule.val_data[0].gt_mask.shape == (48, 48)
    assert datamodule.test_data[0].image.shape[-2:] == (32, 32)


def test_anomalib_reads_it_as_mvtec_ad(made: Path) -> None:
    datamodule = MVTecAD(root=made, category="weave", num_workers=0)
    datamodule.prepare_data()
    datamodule.setup()
    assert [len(datamodule.train_data), len(datamodule.test_data)] == [4, 13]


def test_it_can_be_set_from_a_command_line(tmp_path: Path) -> None:
    parser = ArgumentParser()
    parser.add_class_arguments(Textures, "data")
    arguments = [f"--data.root={tmp_path}", "--data.category=terrazzo", "--data.val_split_mode=from_test"]
    datamodule = parser.instantiate_classes(parser.parse_args(arguments)).data
    assert datamodule.recipe.category == "terrazzo"
    assert datamodule.val_split_mode is ValSplitMode.FROM_TEST
