"""Every kind of image file: the same outcome in training, in prediction and in the exported model."""

import csv
import logging
import shutil
import struct
import zlib
from pathlib import Path

import cv2
import numpy as np
import pandas as pd
import pytest
import torch
from anomalib.data import Folder
from anomalib.data.utils import read_image as anomalib_read_image
from anomalib.deploy import OpenVINOInferencer
from PIL import Image
from tifffile import imwrite

from cflow_plugin import CflowError, CflowPlugin
from cflow_plugin.commands.score import score
from cflow_plugin.commands.watch.watch import watch
from cflow_plugin.data.textures import draw
from cflow_plugin.images.listing import list_folder
from cflow_plugin.images.reading import ImageFileError, read_image

from .conftest import QUICK, make_engine, run_command

PICTURE = Image.fromarray(draw("weave", "hole", "test", 3, size=96).image)


def save(image: Image.Image, **settings: object):
    return lambda path: image.save(path, **settings)


def rotated_by_exif(path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # orientation: to be turned by a quarter
    PICTURE.crop((0, 0, 96, 48)).save(path, exif=exif, quality=95)


def with_two_pages(path: Path) -> None:
    PICTURE.save(path, save_all=True, append_images=[Image.new("RGB", PICTURE.size)])


def colour_of_16_bits(path: Path) -> None:
    cv2.imwrite(str(path), np.asarray(PICTURE)[..., ::-1].astype(np.uint16) * 257)


TAKEN = {
    "grey.png": save(PICTURE.convert("L")),
    "one bit.png": save(PICTURE.convert("1")),
    "grey and transparent.png": save(PICTURE.convert("LA")),
    "transparent.png": save(PICTURE.convert("RGBA")),
    "palette.png": save(PICTURE.convert("P")),
    "transparent palette.png": save(PICTURE.convert("P"), transparency=3),
    "print colours.jpg": save(PICTURE.convert("CMYK"), quality=95),
    "rotated.jpg": rotated_by_exif,
    "16 bits a colour.png": colour_of_16_bits,
    "two pages.tif": with_two_pages,
    "one pixel.png": save(Image.new("RGB", (1, 1), (120, 130, 140))),
    "one line.bmp": save(PICTURE.crop((0, 0, 96, 1))),
    "black.webp": save(Image.new("RGB", (64, 64)), lossless=True),
    "mislabelled.jpg": save(PICTURE, format="PNG"),
    "größer – 大.ppm": save(PICTURE.resize((200, 150))),
}


def truncated(image_format: str):
    def write(path: Path) -> None:
        PICTURE.save(path, format=image_format)
        data = path.read_bytes()
        path.write_bytes(data[: len(data) // 2])

    return write


def enormous(path: Path) -> None:
    """A header that promises 3,600 million pixels."""
    header = b"IHDR" + struct.pack(">IIBBBBB", 60_000, 60_000, 8, 2, 0, 0, 0)
    path.write_bytes(
        b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + header + struct.pack(">I", zlib.crc32(header))
        + struct.pack(">I", 0) + b"IDAT" + struct.pack(">I", zlib.crc32(b"IDAT"))
    )  # fmt: skip


GREY = np.linspace(0, 60_000, 64 * 64).reshape(64, 64)
REFUSED = {
    "16 bits beside 8.png": (save(Image.fromarray(GREY.astype(np.uint16))), "more than 8 bits"),
    "16 bits beside 8.tif": (save(Image.fromarray(GREY.astype(np.uint16))), "more than 8 bits"),
    "white is 0.tif": (lambda path: imwrite(path, GREY.astype(np.uint16), photometric="miniswhite"), "white as 0"),
    "32 bits.tif": (save(Image.fromarray(GREY.astype(np.int32))), "32 bits"),
    "with NaN.tif": (save(Image.fromarray(np.full((64, 64), np.nan, np.float32))), "decimal point"),
    "text.png": (lambda path: path.write_text("hello"), "no known image format"),
    "empty.png": (lambda path: path.write_bytes(b""), "the file is empty"),
    "enormous.png": (enormous, "million pixels"),
}
CUT_OFF = {
    "cut off.png": (truncated("PNG"), "truncated|broken"),
    "cut off.jpg": (truncated("JPEG"), "truncated"),
    "cut off.bmp": (truncated("BMP"), "truncated"),
}


def folder_of_good(root: Path, count: int = 6, size: int = 64) -> Path:
    (root / "good").mkdir(parents=True)
    for number in range(count):
        Image.fromarray(draw("weave", "good", "train", number, size=size).image).save(root / f"good/{number}.png")
    return root


def quick_model(**settings: object) -> CflowPlugin:
    return CflowPlugin(**{**QUICK, "epochs": 1, "steps_per_epoch": 2, "visualizer": False, **settings})


def train(root: Path) -> CflowPlugin:
    data = Folder(name="mine", root=root, normal_dir="good", num_workers=0)
    model = quick_model()
    make_engine(root / "runs").fit(model, datamodule=data)
    return model.eval()


@pytest.fixture(scope="module")
def exported(export):
    return export(None)


@pytest.fixture(scope="module")
def taken(tmp_path_factory):
    folder = tmp_path_factory.mktemp("taken") / "ä b"
    folder.mkdir()
    for name, write in TAKEN.items():
        write(folder / name)
    return folder


@pytest.mark.parametrize("name", TAKEN)
def test_read_as_anomalib_reads(taken, name):
    ours = read_image(taken / name)
    theirs = 255 * anomalib_read_image(taken / name)
    np.testing.assert_array_equal(ours[..., ::-1], theirs.round().astype(np.uint8))


def test_pages_palettes_and_bits_mean_the_picture(taken):
    """Independent of Pillow's conversions: all of these are the same picture, but for their own losses."""
    expected = np.asarray(PICTURE)[..., ::-1].astype(int)
    for name, loss in (("two pages.tif", 0), ("16 bits a colour.png", 1), ("mislabelled.jpg", 0), ("palette.png", 60)):
        assert np.abs(read_image(taken / name) - expected).max() <= loss, name
    grey = cv2.cvtColor(np.asarray(PICTURE), cv2.COLOR_RGB2GRAY).astype(int)
    assert np.abs(read_image(taken / "grey.png") - grey[..., None]).max() <= 1
    assert read_image(taken / "rotated.jpg").shape == (48, 96, 3)


def test_the_same_score_everywhere(taken, trained, exported, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    predicted = {}
    for batch in make_engine(tmp_path).predict(trained, data_path=taken):
        for path, value in zip(batch.image_path, batch.pred_score, strict=True):
            predicted[Path(path).name] = float(value)
    assert set(predicted) == set(TAKEN)
    assert np.isfinite(list(predicted.values())).all()

    score(exported, str(taken), tmp_path / "scores", threads=1)
    table = pd.read_parquet(tmp_path / "scores")
    scored = {Path(path).name: value for path, value in zip(table["path"], table["score"], strict=True)}
    watch(exported, str(taken), tmp_path / "watched", overlays=False)
    with (tmp_path / "watched/scores.csv").open() as file:
        watched = {row["image"]: float(row["score"]) for row in csv.DictReader(file)}
    inferencer = OpenVINOInferencer(exported, device="CPU", config={"INFERENCE_PRECISION_HINT": "f32"})
    for name, value in predicted.items():
        found = np.asarray(inferencer.predict(taken / name).pred_score).item()
        assert scored[name] == pytest.approx(value, abs=2e-4), name
        assert watched[name] == pytest.approx(scored[name], abs=2e-6), name
        assert found == pytest.approx(value, abs=2e-4), name


def test_trained_on(taken, tmp_path):
    root = folder_of_good(tmp_path)
    shutil.copytree(taken, root / "good", dirs_exist_ok=True)
    model = train(root)
    assert torch.isfinite(model(torch.rand(1, 3, 64, 64)).anomaly_map).all()


def test_links_to_folders_are_named(tmp_path, caplog):
    root = folder_of_good(tmp_path)
    (root / "good/more").symlink_to(tmp_path / "elsewhere", target_is_directory=True)
    shutil.copytree(root / "good", tmp_path / "elsewhere", symlinks=True)
    count = len(list_folder(root / "good"))
    assert count == sum(1 for path in (root / "good").glob("*.*"))
    assert "good/more is a link to a folder" in caplog.text


@pytest.mark.parametrize("name", REFUSED)
def test_refused_before_anything_is_trained(name, trained, tmp_path):
    write, reason = REFUSED[name]
    root = folder_of_good(tmp_path)
    write(root / "good" / name)
    with pytest.raises(CflowError, match=rf"{name} cannot be used.*{reason}"):
        train(root)
    assert not list(root.rglob("*.ckpt"))
    (tmp_path / "new").mkdir()
    write(tmp_path / "new" / name)
    with pytest.raises(CflowError, match=rf"{name} cannot be used.*{reason}"):
        make_engine(tmp_path).predict(trained, data_path=tmp_path / "new")


@pytest.mark.parametrize("name", CUT_OFF)
def test_a_file_that_is_cut_off_is_named(name, tmp_path):
    write, reason = CUT_OFF[name]
    root = folder_of_good(tmp_path)
    write(root / "good" / name)
    data = Folder(name="mine", root=root, normal_dir="good", num_workers=0)
    with pytest.raises(Exception) as caught:  # noqa: PT011  in training or in the test, wherever it happens to be
        make_engine(tmp_path).train(quick_model(), datamodule=data)
    assert f"{name} cannot be used as an image" in caught.value.explanation
    with pytest.raises(ImageFileError, match=reason):
        read_image(root / "good" / name)


@pytest.mark.long
@pytest.mark.parametrize("workers", ["0", "2"])
def test_the_command_line_names_it_in_a_sentence(workers, tmp_path):
    root = folder_of_good(tmp_path)
    CUT_OFF["cut off.jpg"][0](root / "good/cut off.jpg")
    settings = ["--data.num_workers", workers, "--model.epochs", "1", "--model.steps_per_epoch", "2"]
    out = run_command(
        "anomalib", "train", "--model", "CflowPlugin", "--model.backbone", "gabor", "--data", "Folder",
        "--data.name", "mine", "--data.root", root, "--data.normal_dir", "good", *settings, cwd=tmp_path, expect=1,
    )  # fmt: skip
    assert "Traceback" not in out
    last = out.strip().splitlines()[-1]
    assert last.startswith("error: ")
    assert "cut off.jpg cannot be used as an image" in last


def test_a_wrong_file_in_use_costs_only_itself(exported, tmp_path, caplog):
    folder = folder_of_good(tmp_path / "new", count=2) / "good"
    wrong = {**REFUSED, **CUT_OFF}
    for name, (write, _) in wrong.items():
        write(folder / name)
    wrong["a link.png"] = (None, "No such file")
    (folder / "a link.png").symlink_to("nowhere")
    score(exported, str(folder), tmp_path / "scores", threads=1)
    table = pd.read_parquet(tmp_path / "scores").set_index("path")
    assert len(table) == len(wrong) + 2
    for name, (_, reason) in wrong.items():
        row = table.loc[str(folder / name)]
        assert pd.isna(row["score"])
        assert pd.Series(row["error"]).str.contains(reason).all(), name
    with (
        caplog.at_level(logging.WARNING),
        pytest.raises(CflowError, match=f"{len(wrong)} images could not be scored"),
    ):
        watch(exported, str(folder), tmp_path / "watched", overlays=False)
    warnings = [record.getMessage() for record in caplog.records if "left out" in record.getMessage()]
    assert len(warnings) == len(wrong)
    with (tmp_path / "watched/scores.csv").open() as file:
        assert len(list(csv.DictReader(file))) == 2


def test_images_of_many_sizes_and_a_mask_of_another(tmp_path):
    root = folder_of_good(tmp_path, count=3)
    for number, size in enumerate(((40, 90), (300, 20), (64, 64))):
        PICTURE.resize(size).save(root / f"good/other {number}.png")
    (root / "bad").mkdir()
    (root / "masks").mkdir()
    for number, side in enumerate((32, 128)):
        PICTURE.save(root / f"bad/{number}.png")
        mask = np.zeros((side, side), np.uint16)  # any number of bits
        mask[: side // 2] = 65_535
        Image.fromarray(mask).save(root / f"masks/{number}.png")
    data = Folder(
        name="mine", root=root, normal_dir="good", abnormal_dir="bad", mask_dir="masks", num_workers=0,
        train_batch_size=3,
    )  # fmt: skip
    model, engine = quick_model(), make_engine(tmp_path / "runs")
    engine.fit(model, datamodule=data)
    [metrics] = engine.test(model, datamodule=data)
    assert {"image_AUROC", "pixel_AUROC", "pixel_AUPRO"} <= set(metrics)
    for batch in data.test_dataloader():
        for mask, label in zip(batch.gt_mask, batch.gt_label, strict=True):
            assert mask.shape == (64, 64)
            assert mask.float().mean() == (0.5 if label else 0)


@pytest.mark.parametrize("kind", ["one image", "all black", "all the same"])
def test_training_images_that_teach_little(kind, tmp_path):
    root = folder_of_good(tmp_path, count=1)
    (root / "new").mkdir()
    PICTURE.save(root / "new/0.png")
    if kind != "one image":
        for number in range(5):
            picture = Image.new("RGB", (64, 64)) if kind == "all black" else Image.open(root / "good/0.png")
            picture.save(root / f"good/{number}.png")
    data = Folder(name="mine", root=root, normal_dir="good", normal_test_dir="new", num_workers=0)
    model = quick_model()
    make_engine(tmp_path / "runs").train(model, datamodule=data)
    result = model.eval()(torch.rand(2, 3, 64, 64))
    assert torch.isfinite(result.anomaly_map).all()
    assert torch.isfinite(result.pred_score).all()


@pytest.mark.long
@pytest.mark.parametrize(
    ("layout", "words"),
    [
        ("no folder", "Path does not exist"),  # others: test_error_hook
        ("a link to nowhere", "lead nowhere"),
    ],
)
def test_nothing_to_train_on(layout, words, tmp_path):
    if layout != "no folder":
        (tmp_path / "good").mkdir()
        (tmp_path / "good/notes.txt").write_text("a note")
        PICTURE.save(tmp_path / "good/1.png")
        for number in range(2, 6):
            (tmp_path / f"good/{number}.png").symlink_to("nowhere" if number == 2 else "1.png")
    out = run_command(
        "anomalib", "train", "--model", "CflowPlugin", "--model.backbone", "gabor", "--data", "Folder",
        "--data.name", "mine", "--data.root", tmp_path, "--data.normal_dir", "good", cwd=tmp_path, expect=1,
    )  # fmt: skip
    assert "Traceback" not in out
    last = out.strip().splitlines()[-1]
    assert last.startswith("error: ")
    assert words in last
