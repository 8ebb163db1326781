"""Regions: what is connected, thresholds set for them, and the same regions from every file and command."""

import csv
import json

import cv2
import numpy as np
import onnxruntime
import pandas as pd
import pytest
import torch
from lightning import seed_everything
from PIL import Image
from scipy import ndimage
from scipy.stats import betabinom
from skimage.measure import regionprops
from skimage.morphology import area_opening

from cflow_plugin import CflowError, CflowPlugin
from cflow_plugin.commands.score import score
from cflow_plugin.commands.watch.watch import watch
from cflow_plugin.decisions.conformal import threshold_rank
from cflow_plugin.decisions.post_processing import ConformalPostProcessor
from cflow_plugin.decisions.region_files import read_region_settings
from cflow_plugin.decisions.regions import RegionSettings, find_regions, region_level, shown_mask
from cflow_plugin.deploy.runtime import compile_exported
from cflow_plugin.images.reading import read_image

from .conftest import QUICK, make_engine, make_textures, once

SMALLEST, RATE = 12, 0.2


def smooth_map(seed, size=(40, 60), sigma=1.5):
    found = ndimage.gaussian_filter(np.random.default_rng(seed).random(size), sigma)
    return ((found - found.min()) / np.ptp(found)).astype(np.float32)


@pytest.mark.parametrize("smallest", [1, 2, 9, 500])
def test_the_level_is_that_of_an_area_opening(smallest):
    for seed in range(5):
        anomaly_map = smooth_map(seed)
        assert region_level(anomaly_map, smallest) == area_opening(anomaly_map, smallest, connectivity=2).max()
    with pytest.raises(CflowError, match="the map has 2400"):
        region_level(anomaly_map, 2401)


def test_regions_are_those_of_scikit_image():
    anomaly_map = smooth_map(7)
    mask = anomaly_map > 0.6
    settings = RegionSettings(smallest=4, mm_per_pixel=0.1, levels=np.linspace(0.5, 0.9, 19).tolist())
    size = (80, 180)  # of the picture: twice as high, three times as wide
    found = find_regions(anomaly_map, mask, settings, size)
    labels, _ = ndimage.label(mask, np.ones((3, 3)))
    expected = [part for part in regionprops(labels, anomaly_map) if part.area >= 4]
    assert len(found) == len(expected) > 3
    assert [region.peak for region in found] == sorted((region.peak for region in found), reverse=True)
    for region, part in zip(found, sorted(expected, key=lambda part: -part.intensity_max), strict=True):
        top, left, bottom, right = part.bbox
        assert region.box == (3 * left, 2 * top, 3 * (right - left), 2 * (bottom - top))
        assert region.area == 6 * part.area
        assert region.area_mm2 == pytest.approx(0.06 * part.area)
        assert region.peak == pytest.approx(part.intensity_max, abs=1e-6)
        level = area_opening(np.where(labels == part.label, anomaly_map, 0), 4, connectivity=2).max()
        assert region.p_value == (1 + sum(value >= level for value in settings.levels)) / 20
        outline = cv2.contourArea(np.array(region.contour, np.float32))
        assert 0.4 * region.area < outline <= 6 * part.area_filled
    most = find_regions(anomaly_map, mask, RegionSettings(smallest=4, most=2), size)
    assert [region.box for region in most] == [region.box for region in found[:2]]
    shown = shown_mask(anomaly_map, mask, RegionSettings(smallest=4, most=2))
    assert shown.sum() == sum(region.area / 6 for region in most)


@pytest.mark.parametrize("settings", [{"smallest": 0}, {"most": 0}, {"mm_per_pixel": 0.0}])
def test_settings_out_of_range(settings):
    with pytest.raises(CflowError, match="must be"):
        RegionSettings(**settings)


@pytest.mark.long
def test_false_alarms_are_what_the_user_sees():
    """Over 200 splits: images called anomalous, and images with a region shown, as often as the theory says."""
    generator = np.random.default_rng(0)
    held_out, new, splits = 24, 20, 200
    maps = torch.from_numpy(np.stack([smooth_map(seed, (24, 24), 1.0) * (0.3 + 0.7 * generator.random())
                                      for seed in range(1500)]))[:, None]  # fmt: skip
    scores = maps.flatten(1).topk(10).values.mean(1)
    levels = ConformalPostProcessor(RATE, smallest_region=SMALLEST).levels(maps)
    alarms, by_regions_alone = [], []
    for _ in range(splits):
        chosen = torch.from_numpy(generator.choice(len(maps), held_out + new, replace=False))
        reference, tested = chosen[:held_out], chosen[held_out:]
        processor = ConformalPostProcessor(RATE, smallest_region=SMALLEST)
        processor.calibrate(scores[reference], levels[reference])
        above = maps[tested] > processor.pixel_threshold
        seen = [any(find_regions(m[0], a[0], RegionSettings(SMALLEST))) for m, a in
                zip(maps[tested].numpy(), above.numpy(), strict=True)]  # fmt: skip
        by_regions_alone.append(sum(seen))
        label = scores[tested] > processor.image_threshold
        alarms.append(int(label.sum()))
    extreme = held_out + 1 - threshold_rank(held_out, RATE)
    theory = betabinom(new, extreme, held_out + 1 - extreme)
    for counted in (alarms, by_regions_alone):
        assert abs(np.mean(counted) - theory.mean()) < 4 * theory.std() / splits**0.5
    assert theory.mean() / new <= RATE


# From training to files


@pytest.fixture(scope="module")
def regional(common, tmp_path_factory):
    """A model whose thresholds are set for regions, its data, and its two files."""
    data = make_textures(tmp_path_factory.mktemp("data"), train_good=16, test_good=6, test_defect=2)

    def train(folder):
        seed_everything(0)
        model = CflowPlugin(**{**QUICK, "epochs": 2, "steps_per_epoch": 5}, target_false_alarm_rate=RATE,
                            smallest_region=SMALLEST, mm_per_pixel=0.1)  # fmt: skip
        make_engine(folder).fit(model, datamodule=data)
        model.eval().to_openvino(folder, input_size=None)
        model.to_onnx(folder, input_size=None)
        [written] = {path.resolve() for path in folder.rglob("model.ckpt")}
        written.rename(folder / "model.ckpt")

    folder = once(common / "regional", train)
    pictures = tmp_path_factory.mktemp("pictures")
    data.prepare_data()
    data.setup()
    for path in data.test_data.samples.image_path:  # twice as wide as high, so that both scales are seen
        name = "_".join(path.split("/")[-2:])
        Image.open(path).resize((192, 96)).save(pictures / name)
    return CflowPlugin.load_from_checkpoint(folder / "model.ckpt", map_location="cpu").eval(), folder, pictures


@pytest.mark.long
def test_thresholds_are_of_regions_that_count(regional):
    model, *_ = regional
    processor = model.post_processor
    assert processor.region_settings.smallest == SMALLEST  # from the checkpoint
    maxima, rank = processor.reference_maxima, threshold_rank(len(processor.reference_maxima), RATE)
    assert processor.pixel_threshold == maxima[rank - 1]
    again = processor.checkpoint_config()
    other = ConformalPostProcessor(smallest_region=SMALLEST + 1, most_regions=3)
    other.load_checkpoint_config(again)
    assert (other.region_settings.smallest, other.region_settings.most) == (SMALLEST, 3)


@pytest.mark.long
def test_regions_are_equal_in_every_runtime_and_command(regional, tmp_path):
    model, folder, pictures = regional
    paths = sorted(pictures.glob("*.png"))
    onnx_file, xml_file = next(folder.rglob("model.onnx")), next(folder.rglob("model.xml"))
    session = onnxruntime.InferenceSession(onnx_file)
    names = [output.name for output in session.get_outputs()]
    settings = read_region_settings(onnx_file)
    assert settings == read_region_settings(xml_file) == compile_exported(xml_file, "CPU", "f32").regions
    assert (settings.smallest, len(settings.levels)) == (SMALLEST, len(model.post_processor.reference_maxima))
    expected, in_onnx = {}, {}
    for path in paths:
        images = torch.from_numpy(read_image(path)[..., ::-1].copy()).permute(2, 0, 1)[None] / 255
        with torch.no_grad():
            result = model(images)
        [expected[path.name]] = model.post_processor.find_regions(result.anomaly_map, result.pred_mask, [(96, 192)])
        outputs = dict(zip(names, session.run(None, {session.get_inputs()[0].name: images.numpy()}), strict=True))
        found = find_regions(outputs["anomaly_map"][0, 0], outputs["pred_mask"][0, 0], settings, (96, 192))
        in_onnx[path.name] = found
    assert sum(map(len, expected.values())) >= 2
    make_engine(tmp_path / "runs").predict(model, data_path=pictures)
    watch(xml_file, str(pictures), tmp_path / "watched")
    score(xml_file, str(pictures), tmp_path / "scored")
    [predicted] = (tmp_path / "runs").rglob("regions.jsonl")
    ways = [in_onnx]
    for file in (predicted, tmp_path / "watched/regions.jsonl", tmp_path / "scored/_regions.jsonl"):
        lines = [json.loads(line) for line in file.read_text().splitlines()]
        assert len(lines) == len(paths)
        assert {(line["width"], line["height"]) for line in lines} == {(192, 96)}
        ways.append({line["image"].split("/")[-1]: line["regions"] for line in lines})
    for way in ways:
        for name, regions in expected.items():
            assert len(way[name]) == len(regions)
            for found, region in zip(way[name], regions, strict=True):
                found = found if isinstance(found, dict) else found._asdict()
                assert tuple(found["box"]) == region.box
                assert found["area"] == region.area
                assert found["area_mm2"] == pytest.approx(region.area * 0.01)
                assert found["peak"] == pytest.approx(region.peak, abs=1e-4)
                assert found["p_value"] == region.p_value <= RATE
    with predicted.with_name("regions.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == sum(map(len, expected.values()))
    for name, regions in expected.items():  # a picture for each image with regions, in its own size
        [drawn] = [*(predicted.parent / "regions").glob(f"{name}.jpg")] or [None]
        assert (drawn is not None) == bool(regions)
        assert drawn is None or Image.open(drawn).size == (192, 96)
    coco = json.loads((tmp_path / "watched/regions.coco.json").read_text())
    assert [image["id"] for image in coco["images"]] == list(range(len(paths)))
    assert len(coco["annotations"]) == len(rows)
    for annotation in coco["annotations"]:
        left, top, width, height = annotation["bbox"]
        corners = np.array(annotation["segmentation"]).reshape(-1, 2)
        assert ((corners >= (left, top)) & (corners <= (left + width, top + height))).all()
    assert pd.read_parquet(tmp_path / "scored")["regions"].notna().all()
