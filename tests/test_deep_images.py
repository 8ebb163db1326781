"""Grey cameras with more than 8 bits: the same scores wherever an image goes, and no image of another depth."""

import csv
from pathlib import Path

import cv2
import numpy as np
import pandas as pd
import pytest
import tifffile
import torch
from anomalib.data import Folder
from anomalib.data.utils import read_image as anomalib_read_image
from anomalib.deploy import OpenVINOInferencer, TorchInferencer
from anomalib.visualization.image import item_visualizer
from onnxruntime import InferenceSession
from PIL import Image

from cflow_plugin import CflowError, CflowPlugin, Spade
from cflow_plugin.commands.score import score
from cflow_plugin.commands.watch.watch import watch
from cflow_plugin.data.textures import draw
from cflow_plugin.deploy.runtime import bits_of, compile_exported, read_exported
from cflow_plugin.images.pre_processing import CflowPreProcessor
from cflow_plugin.images.reading import ImageFileError, bits_in, read_image

from .conftest import QUICK, make_engine

HIGHEST = {10: 1023, 12: 4095, 14: 16_383, 16: 65_535}


def picture(number: int, highest: int, dim: float = 1.0) -> np.ndarray:
    """A grey texture whose brightest value is ``highest``."""
    kind = "hole" if number % 2 else "good"
    grey = draw("weave", kind, "test", number, size=64).image.astype(float).mean(2)
    return np.round(dim * highest * grey / grey.max()).astype(np.uint16)


def write(path: Path, values: np.ndarray) -> Path:
    cv2.imwrite(str(path), values)
    return path


@pytest.mark.parametrize("bits", HIGHEST)
@pytest.mark.parametrize("suffix", [".png", ".tif", ".pgm"])
def test_every_value_is_read(tmp_path, suffix, bits):
    values = picture(0, HIGHEST[bits])
    path = write(tmp_path / f"0{suffix}", values)
    found = read_image(path, bits)
    assert found.dtype == np.uint16
    np.testing.assert_array_equal(found, np.repeat(values[..., None], 3, 2))
    np.testing.assert_array_equal(found, np.repeat(cv2.imread(str(path), cv2.IMREAD_UNCHANGED)[..., None], 3, 2))
    assert bits_in([path]) == bits
    np.testing.assert_allclose(anomalib_read_image(path), found / 65_535, atol=1e-12)
    tensor = anomalib_read_image(path, as_tensor=True)
    np.testing.assert_allclose(tensor.permute(1, 2, 0).numpy(), found / 65_535, atol=1e-7)


@pytest.mark.parametrize("settings", [{"byteorder": ">"}, {"compression": "zlib"}, {"tile": (16, 16)}])
def test_files_of_other_programs(tmp_path, settings):
    values = picture(0, 4095)
    tifffile.imwrite(tmp_path / "0.tif", values, **settings)
    np.testing.assert_array_equal(read_image(tmp_path / "0.tif", 12)[..., 0], values)


def test_a_contradiction_is_named(tmp_path):
    deep, shallow = write(tmp_path / "12.png", picture(0, 4095)), write(tmp_path / "8.png", np.zeros((4, 4), np.uint8))
    for path, bits, words in (
        (deep, 10, "values reach 4095.*10 bits, which end at 1023"),
        (deep, 8, "more than 8 bits a value.*images of 8"),
        (shallow, 12, "it has 8 bits a value.*images of 12"),
        (shallow, 16, "it has 8 bits a value.*images of 16"),
    ):
        with pytest.raises(ImageFileError, match=words):
            read_image(path, bits)
    with pytest.raises(ImageFileError, match=r"12\.png.*more than 8 bits.*8\.png"):
        bits_in([shallow, deep, shallow])
    assert bits_in([write(tmp_path / "one more.png", np.full((4, 4), 4096, np.uint16)), deep]) == 14


def test_the_highest_value_of_the_camera_becomes_1():
    for bits, highest in HIGHEST.items():
        pre_processor = CflowPreProcessor(bits=bits)
        images = torch.tensor([0, highest // 3, highest]).view(1, 1, 1, 3) / 65_535
        expected = torch.tensor([0, (highest // 3) / highest, 1]).view(1, 1, 1, 3)
        torch.testing.assert_close(pre_processor(images), expected)
        if bits < 16:
            with pytest.raises(CflowError, match=f"values up to {highest + 1}.*{bits} bits, which end at {highest}"):
                pre_processor(torch.full((1, 1, 2, 2), (highest + 1) / 65_535))
    with pytest.raises(CflowError, match="between 8 and 16"):
        CflowPreProcessor(bits=7)
    given = CflowPreProcessor.of((64, 64), (0.5,) * 3, (0.5,) * 3)
    given.bits = 12
    assert CflowPlugin(**QUICK, pre_processor=given).pre_processor.bits == 12
    assert CflowPlugin(**QUICK, pre_processor=given, bits=10).pre_processor.bits == 10


def test_pictures_show_more_than_white(tmp_path):
    values = picture(0, 4095)
    shown = np.asarray(item_visualizer.Image.open(write(tmp_path / "0.png", values)))
    assert shown.dtype == np.uint8
    assert shown.max() == 255
    assert np.corrcoef(shown[..., 0].ravel(), values.ravel())[0, 1] > 0.999


def folder_of(root: Path, count: int, highest: int) -> Path:
    (root / "good").mkdir(parents=True)
    for number in range(count):
        suffix = ".png" if number % 2 else ".tif"
        write(root / f"good/{number}{suffix}", picture(2 * number, highest))
    return root


def test_the_same_score_everywhere(trained_on_12_bits, tmp_path, monkeypatch):
    """And as if the camera had 8 bits: the same picture, scaled down by hand and rounded, scores nearly the same."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TRUST_REMOTE_CODE", "1")
    new = tmp_path / "new"
    new.mkdir()
    for number in range(4):
        write(new / f"{number}.{'png' if number % 2 else 'tif'}", picture(100 + number, 4095, dim=1 - number / 10))
    model = CflowPlugin.load_from_checkpoint(trained_on_12_bits / "model.ckpt", map_location="cpu").eval()
    assert model.pre_processor.bits == 12
    predicted = {}
    for batch in make_engine(tmp_path).predict(model, data_path=new):
        predicted[Path(batch.image_path[0]).name] = float(batch.pred_score[0])
    assert len(set(predicted.values())) == 4

    files = {kind: next(trained_on_12_bits.rglob(kind)) for kind in ("*.xml", "*.onnx", "*.pt")}
    for kind in ("*.xml", "*.onnx"):
        assert bits_of(read_exported(files[kind])) == 12
    score(files["*.xml"], str(new), tmp_path / "scores", threads=1)
    table = pd.read_parquet(tmp_path / "scores")
    watch(files["*.xml"], str(new), tmp_path / "watched")
    with (tmp_path / "watched/scores.csv").open() as file:
        rows = list(csv.DictReader(file))
    watched = {row["image"]: float(row["score"]) for row in rows}
    p_of_watch = {row["image"]: float(row["p_value"]) for row in rows}
    [table_of_predict] = tmp_path.rglob("predictions.csv")
    with table_of_predict.open() as file:
        p_of_predict = {Path(row["image"]).name: float(row["p_value"]) for row in csv.DictReader(file)}
    reference = model.post_processor.normalized_reference_scores.double().numpy()
    config = {"INFERENCE_PRECISION_HINT": "f32"}
    openvino = OpenVINOInferencer(files["*.xml"], device="CPU", config=config)
    torch_inferencer = TorchInferencer(files["*.pt"], device="cpu")
    onnx = InferenceSession(files["*.onnx"], providers=["CPUExecutionProvider"])
    for name, value in predicted.items():
        tensor = anomalib_read_image(new / name, as_tensor=True)[None].numpy()
        row = table[table["path"] == str(new / name)].iloc[0]
        # The one formula, by counting: score and watch agree to the digits of a table, in double precision.
        expected = (1 + (reference >= np.float64(row["score"])).sum()) / (len(reference) + 1)
        assert row["p_value"] == expected
        assert p_of_predict[name] == pytest.approx(expected, abs=5e-7)
        assert p_of_watch[name] == pytest.approx(expected, abs=5e-7)
        assert row["anomalous"] == (row["p_value"] <= 0.2)
        found = {
            "score": row["score"],
            "watch": watched[name],
            "OpenVINO": np.asarray(openvino.predict(new / name).pred_score).item(),
            "torch": float(torch_inferencer.predict(new / name).pred_score),
            "ONNX Runtime": onnx.run(["pred_score"], {"input": tensor})[0].item(),
        }
        for where, other in found.items():
            assert other == pytest.approx(value, abs=2e-4), (name, where)
        eight = np.round(cv2.imread(str(new / name), cv2.IMREAD_UNCHANGED) / 4095 * 255) / 255
        model.pre_processor.bits = 8
        by_hand = model(torch.from_numpy(eight).float().expand(1, 3, 64, 64)).pred_score
        model.pre_processor.bits = 12
        assert float(by_hand) == pytest.approx(value, abs=0.02)
    overlay = np.asarray(Image.open(next((tmp_path / "watched/overlays").glob("0*.png"))))
    assert overlay.std() > 20


def test_other_images_are_refused_by_name(trained_on_12_bits, tmp_path):
    model = CflowPlugin.load_from_checkpoint(trained_on_12_bits / "model.ckpt", map_location="cpu").eval()
    write(tmp_path / "bright.png", picture(0, 5000))
    with pytest.raises(CflowError, match=r"bright\.png has values up to 5000.*12 bits, which end at 4095"):
        make_engine(tmp_path).predict(model, data_path=tmp_path / "bright.png")
    write(tmp_path / "8.png", (picture(0, 255)).astype(np.uint8))
    with pytest.raises(CflowError, match=r"8\.png cannot be used.*it has 8 bits"):
        make_engine(tmp_path).predict(model, data_path=tmp_path / "8.png")
    file = next(trained_on_12_bits.rglob("*.xml"))
    good = write(tmp_path / "good.png", picture(0, 4000))
    score(file, str(tmp_path), tmp_path / "scores", threads=1)
    rows = pd.read_parquet(tmp_path / "scores").set_index("path")
    assert "values reach 5000" in rows.loc[str(tmp_path / "bright.png"), "error"]
    assert "it has 8 bits" in rows.loc[str(tmp_path / "8.png"), "error"]
    assert rows.loc[str(good), "score"] >= 0
    with pytest.raises(CflowError, match="2 images could not be scored"):
        watch(file, str(tmp_path), tmp_path / "watched", overlays=False)
    with pytest.raises(CflowError, match="12 bits a value; a camera or video gives 8"):
        watch(file, "0", tmp_path / "watched", overlays=False)
    assert compile_exported(file, "CPU", "f32").bits == 12


def test_a_stated_number_of_bits(tmp_path):
    root = folder_of(tmp_path / "data", 5, 4000)
    data = Folder(name="deep", root=root, normal_dir="good", num_workers=0)
    model = CflowPlugin(**QUICK, epochs=1, steps_per_epoch=1, visualizer=False, bits=14, target_false_alarm_rate=None)
    make_engine(tmp_path / "runs").fit(model, datamodule=data)
    assert model.pre_processor.bits == 14
    model = CflowPlugin(**QUICK, epochs=1, steps_per_epoch=1, visualizer=False, bits=10, target_false_alarm_rate=None)
    with pytest.raises(CflowError, match="10 bits, which end at 1023"):
        make_engine(tmp_path / "runs").fit(model, datamodule=data)
    spade = Spade(backbone="resnet18", pre_trained=False, image_size=(64, 64), k=2, visualizer=False)
    make_engine(tmp_path / "runs").fit(spade, datamodule=data)
    assert spade.pre_processor.bits == 12


def test_the_file_says_8_bits_for_8(export):
    assert bits_of(read_exported(export(None))) == 8
    assert bits_of(read_exported(export(None, "onnx"))) == 8
