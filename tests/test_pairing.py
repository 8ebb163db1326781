"""Which files are taken for images, and what is said where images, masks and labels do not match."""

import importlib.util
import logging
import shutil

import pandas as pd
import pytest
from anomalib.data import MPDD, VAD, AutoVI, BTech, Folder, Kolektor, MVTecAD, PredictDataset, Tabular
from anomalib.data.datasets.image import folder as anomalib_folder
from anomalib.data.utils import image as anomalib_images
from PIL import Image

from cflow_plugin import CflowError
from cflow_plugin.commands.score.listing import list_images
from cflow_plugin.commands.watch.sources import open_source
from cflow_plugin.images import listing
from cflow_plugin.images.listing import list_folder
from cflow_plugin.images.pairing import pair_masks

HIDDEN = [
    ".ipynb_checkpoints/0-checkpoint.png", "._0.png", ".DS_Store", "@eaDir/0.png/SYNOPHOTO_THUMB_M.png",
    "__MACOSX/._0.png", "$RECYCLE.BIN/0.png", "Thumbs.db", "deeper/.Trash-1000/files/0.png",
]  # fmt: skip


def write(root, *names):
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("L", (8, 8), 90).save(root / name, format="PNG")
    return root


@pytest.fixture(autouse=True)
def nothing_said(monkeypatch):
    monkeypatch.setattr(listing, "_said", set())


# Hidden files


def test_hidden_files_are_passed_over(tmp_path, caplog):
    root = write(tmp_path / ".cache/good", "0.png", "1.png", *HIDDEN)
    expected = [root / "0.png", root / "1.png"]
    with caplog.at_level(logging.WARNING):
        assert list_folder(root) == expected
        assert PredictDataset(root).image_filenames == expected
        assert list_images(str(root)) == [str(path) for path in expected]
        assert [frame.name for frame in open_source(str(root), 1.0).frames] == ["0.png", "1.png"]
    said = [record.getMessage() for record in caplog.records if record.name.startswith("cflow_plugin")]
    assert len(said) == 1
    assert said[0].startswith("6 hidden images are passed over in")


def test_hidden_files_are_not_trained_on(tmp_path, caplog):
    root = write(tmp_path, *(f"good/{number}.png" for number in range(8)), "bad/0.png", "masks/0.png")
    for folder in ("good", "bad", "masks"):
        write(root / folder, *HIDDEN)
    with caplog.at_level(logging.WARNING, "cflow_plugin"):
        data = Folder(name="x", root=root, normal_dir="good", abnormal_dir="bad", mask_dir="masks")
        data.setup()
    samples = pd.concat([data.train_data.samples, data.test_data.samples])
    assert {path.rpartition("/")[2] for path in samples["image_path"]} == {f"{number}.png" for number in range(8)}
    assert len(samples) == 9
    assert sum("passed over in" in record.getMessage() for record in caplog.records) == 3


def test_hidden_files_in_mvtec_ad(tmp_path):
    root = write(tmp_path, *(f"bottle/train/good/{number:03d}.png" for number in range(4)), "bottle/test/good/000.png")
    write(root / "bottle", "test/hole/000.png", "ground_truth/hole/000_mask.png")
    for folder in ("train/good", "test/good", "test/hole", "ground_truth/hole", "."):
        write(root / "bottle" / folder, ".ipynb_checkpoints/000-checkpoint.png", "._000.png")
    data = MVTecAD(root=root, category="bottle")
    data.setup()
    assert len(data.train_data) == 4
    assert len(data.test_data) == 2


def test_only_hidden_files(tmp_path):
    root = write(tmp_path, ".a/0.png")
    with pytest.raises(CflowError, match=r"no image in .* but hidden ones"):
        PredictDataset(root)
    with pytest.raises(CflowError, match="no image"):
        list_images(str(root))


def test_without_the_change_they_are_taken(tmp_path):
    """anomalib by itself; when this fails, ours can go."""
    spec = importlib.util.spec_from_file_location("fresh", anomalib_images.__file__)
    theirs = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(theirs)
    assert len(theirs.get_image_filenames_from_dir(write(tmp_path, "0.png", ".ipynb_checkpoints/0.png"))) == 2


# Masks


def paired(images, masks, root):
    found = pair_masks([root / name for name in images], [root / name for name in masks])
    return [found[root / name].relative_to(root).as_posix() for name in images]


@pytest.mark.parametrize(
    ("images", "masks"),
    [
        (["b/0.png", "b/1.png"], ["m/0.png", "m/1.png"]),
        (["b/1.png", "b/2.png", "b/11.png"], ["m/1_mask.png", "m/2_mask.png", "m/11_mask.png"]),
        (["b/1.png", "b/10.png"], ["m/mask_1.png", "m/mask_10.png"]),
        (["b/part1.jpg", "b/part12.jpg"], ["m/part1-gt.png", "m/part12-gt.png"]),
        (["hole/0.png", "cut/0.png"], ["m/hole/0.png", "m/cut/0.png"]),
        (["b/a.png", "b/a_b.png"], ["m/a.png", "m/a_b.png"]),
    ],
)
def test_masks_are_found_by_name(images, masks, tmp_path):
    assert paired(images, masks, tmp_path) == masks
    assert paired(images[::-1], masks, tmp_path) == masks[::-1]


@pytest.mark.parametrize(
    ("images", "masks", "words"),
    [
        (["b/0.png", "b/1.png"], ["m/0.png"], r"no mask for 1 image of defects \(\S*b/1\.png\)"),
        (["b/0.png"], ["m/0.png", "m/1.png"], r"no image of a defect for 1 mask \(\S*m/1\.png\)"),
        (["b/0.png", "b/1.png"], ["m/0.png", "m/2.png"], r"b/1\.png\) and no image of a defect for 1 mask \(\S*m/2"),
        (["b/1.png"], ["m/11.png"], r"no mask for 1 image"),
        (["b/0.png"], ["m/0_a.png", "m/0_b.png"], r"2 masks could belong to \S*b/0\.png"),
        (["x/0.png", "y/0.png"], ["m/0.png"], r"m/0\.png could be the mask of 2 images"),
        ([f"b/{n}.png" for n in range(9)], [f"m/{n}x.png" for n in range(20, 29)], r"for 9 images.*…\).*for 9 masks"),
    ],
)
def test_masks_that_do_not_match(images, masks, words, tmp_path):
    with pytest.raises(CflowError, match=words):
        paired(images, masks, tmp_path)


@pytest.fixture
def root(tmp_path):
    write(tmp_path, "bad/1.png", "bad/11.png", "masks/1_mask.png", "masks/11_mask.png")
    return write(tmp_path, *(f"good/{number}.png" for number in range(8)))


def folder_of(root, **settings):
    data = Folder(name="x", root=root, **{"normal_dir": "good", "abnormal_dir": "bad", "mask_dir": "masks", **settings})
    data.setup()
    return data


def test_a_folder_whose_masks_are_sorted_otherwise(root):
    """anomalib pairs the first image with the first mask, which here is another's."""
    data = folder_of(root)
    rows = data.test_data.samples
    rows = rows[rows["label_index"] == 1]
    masks = [path.rpartition("/")[2] for path in rows["mask_path"]]
    assert masks == [path.rpartition("/")[2].replace(".png", "_mask.png") for path in rows["image_path"]]
    assert data.test_data.task == data.train_data.task == "segmentation"
    assert data.test_data[len(data.test_data) - 1].gt_mask is not None
    original = anomalib_folder.make_folder_dataset.__wrapped__
    with pytest.raises(Exception, match="Mismatch"):
        original("good", root, "bad", None, "masks")


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"normal_dir": "."}, r"among the images of --data.normal_dir and of --data.abnormal_dir"),
        ({"mask_dir": "bad"}, r"--data.abnormal_dir and of --data.mask_dir"),
        ({"normal_test_dir": "good"}, r"--data.normal_dir and of --data.normal_test_dir"),
        ({"abnormal_dir": None}, r"--data.mask_dir names masks, but --data.abnormal_dir no images"),
    ],
)
def test_folders_in_two_roles(root, settings, words):
    with pytest.raises(CflowError, match=words):
        folder_of(root, **settings)


def test_a_folder_lacks_a_mask(root):
    (root / "masks/11_mask.png").unlink()
    with pytest.raises(CflowError, match=r"no mask for 1 image of defects \(\S*bad/11\.png\)"):
        folder_of(root)


GONE, EXTRA = "no mask for 1 image of defects", "no image of a defect for 1 mask"


@pytest.mark.parametrize(
    ("kind", "change", "words"),
    [
        (MVTecAD, lambda root: shutil.rmtree(root / "ground_truth"), r"no mask for 2.*test/hole/001.png"),
        (MVTecAD, lambda root: (root / "ground_truth/hole/001_mask.png").unlink(), rf"{GONE}.*001\.png"),
        (MVTecAD, lambda root: (root / "test/hole/001.png").unlink(), f"{EXTRA}.*001_mask"),
        (MVTecAD, lambda root: (root / "ground_truth/hole").rename(root / "ground_truth/holes"),
         "no mask for 2.*no image.*2"),
        (MVTecAD, lambda root: write(root, "test/hole/1.png", "test/hole/11.png", "ground_truth/hole/1_mask.png",
                                     "ground_truth/hole/11_mask.png"), r"1\.png would get the mask \S*11_mask\.png"),
        (MPDD, lambda root: (root / "ground_truth/hole/001_mask.png").unlink(), rf"{GONE}.*001\.png"),
        (VAD, lambda root: (root / "test/hole/001.png").unlink(), f"{EXTRA}.*001_mask"),
        (AutoVI, lambda root: shutil.rmtree(root / "ground_truth/hole/001"), rf"{GONE}.*001\.png"),
        (BTech, lambda root: (root / "ground_truth/hole/002.png").unlink(), rf"{GONE}.*002\.png"),
        (Kolektor, lambda root: write(root, "kos1/Part10.jpg", "kos1/Part10_label.bmp"),
         r"Part1\.jpg would get the mask \S*Part10_label\.bmp.*another image's"),
        (Kolektor, lambda root: (root / "kos1/Part1_label.bmp").unlink(), rf"{GONE}.*kos1/Part1\.jpg"),
        (Kolektor, lambda root: (root / "kos2/Part0.jpg").unlink(), f"{EXTRA}.*kos2/Part0_label"),
    ],
)  # fmt: skip
def test_published_data_sets_that_do_not_match(tmp_path, kind, change, words):
    """As they are, with hidden files among them, and changed."""
    category = "pipe_clip" if kind is AutoVI else "bottle"
    root, settings = tmp_path / category, {"category": category}
    good = "ok" if kind is BTech else "good"
    mask = {BTech: "ground_truth/hole/{}.png", AutoVI: "ground_truth/hole/{}/0000.png"}
    if kind is Kolektor:
        settings = {}
        root = write(
            tmp_path, *(f"kos{n}/Part{i}{end}" for n in (1, 2) for i in range(3) for end in (".jpg", "_label.bmp"))
        )
        for number in (1, 2):
            Image.new("L", (8, 8), 0).save(root / f"kos{number}/Part2_label.bmp")
            Image.new("L", (8, 8), 0).save(root / f"kos{number}/Part0_label.bmp")
    else:
        write(root, *(f"{part}/{good}/{number:03d}.png" for part in ("train", "test") for number in range(2)))
        for number in ("001", "002"):
            write(root, f"test/hole/{number}.png", mask.get(kind, "ground_truth/hole/{}_mask.png").format(number))
    for file in list(root.rglob("*.*")):
        write(file.parent, f"._{file.name}")
    kind(root=tmp_path, **settings).setup()
    change(root)
    with pytest.raises(CflowError, match=words):
        kind(root=tmp_path, **settings).setup()


# Tables

TABLE = {
    "image_path": ["good/0.png", "good/1.png", "good/2.png", "bad/1.png"],
    "label": ["normal", "normal", "normal_test", "abnormal"],
    "mask_path": ["", "", "", "masks/1_mask.png"],
}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"label": None}, "has the columns image_path, mask_path"),
        ({"image_path": None}, "needs image_path"),
        ({"label": ["normal", "good", "normal", "abnormal"]}, r"good/1\.png \('good'\) has no label that is one of"),
        ({"label": ["normal", None, "normal", "abnormal"]}, r"good/1\.png \((None|nan)\) has no label"),
        ({"split": ["train", "train", "tset", "test"]}, r"good/2\.png \('tset'\) has no split"),
        ({"label_index": [0, 0, 2, 1]}, r"good/2\.png \(2\) has no label_index"),
        ({"image_path": ["good/0.png", "good/9.png", "good/2.png", "bad/1.png"]}, r"good/9\.png of the column image"),
        ({"image_path": ["good/0.png", "good/0.png", "good/2.png", "bad/1.png"]}, r"good/0\.png is listed more than"),
        ({"mask_path": ["", "", "", "masks/7.png"]}, r"masks/7\.png of the column mask_path is not there"),
        ({"label_index": [0, 0, 0, 1], "mask_path": ["", "masks/1_mask.png", "", "masks/1_mask.png"]},
         r"good/1\.png is normal and has a mask"),
    ],
)  # fmt: skip
def test_tables_that_cannot_be_used(root, change, words):
    Tabular(name="x", samples=dict(TABLE), root=root).setup()
    wrong = {name: values for name, values in {**TABLE, **change}.items() if values is not None}
    with pytest.raises(CflowError, match=words):
        Tabular(name="x", samples=wrong, root=root).setup()


def test_a_csv_with_semicolons(root):
    pd.DataFrame(TABLE).to_csv(root / "table.csv", sep=";", index=False)
    with pytest.raises(CflowError, match="separated by commas"):
        Tabular.from_file(name="x", file_path=root / "table.csv", root=root).setup()
