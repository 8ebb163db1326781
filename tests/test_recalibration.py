"""Thresholds set anew in an exported file: against ranks counted by hand in the old file's scores."""

import logging
import math

import cv2
import numpy as np
import openvino as ov
import pytest
from scipy import ndimage

from cflow_plugin import CflowError
from cflow_plugin.commands.check import check
from cflow_plugin.commands.recalibrate import recalibrate
from cflow_plugin.decisions.reference_scores import read_reference_scores
from cflow_plugin.deploy.recalibration import recalibrate_file
from cflow_plugin.deploy.runtime import compile_exported

from .brightness import save_brightness_model
from .conftest import make_engine, make_textures, once, run_command
from .test_check import small_model


@pytest.fixture(scope="module")
def made(common):
    """A folder with a file of a trained model whose regions have 5 pixels at least, and good and bad images."""

    def make(folder):
        data = make_textures(folder / "data", train_good=30, test_good=60)
        data.prepare_data()
        data.setup()
        model = small_model(smallest_region=5)
        make_engine(folder / "run").fit(model, datamodule=data)
        model.eval().to_openvino(folder, ov_kwargs={"camera_bytes": True})

    return once(common / "recalibrated", make)


def outcomes(file, images):
    """Scores, labels, maps and masks."""
    compiled = compile_exported(file, "CPU", "f32")
    results = []
    for path in images:
        found = compiled([cv2.imread(str(path))[None]])
        maps = (found[name][0, 0].copy() for name in ("anomaly_map", "pred_mask"))
        results.append((float(found["pred_score"][0]), bool(found["pred_label"][0]), *maps))
    return [list(values) for values in zip(*results, strict=True)]


def has_region(above, smallest):
    labels, count = ndimage.label(above, np.ones((3, 3)))
    return count > 0 and np.bincount(labels.ravel())[1:].max() >= smallest


@pytest.mark.long
def test_of_a_trained_model(made, tmp_path):
    old = made / "weights/openvino/model.xml"
    good = sorted((made / "data/weave/test/good").glob("*.png"))
    bad = sorted(path for path in (made / "data/weave/test").glob("*/*.png") if path.parent.name != "good")
    reference, new_ones = good[:39], [*good[39:], *bad]
    assert len(new_ones) > len(good[39:])
    before = old.read_bytes()
    done = recalibrate_file(old, reference, tmp_path / "new.xml", rate=0.1)
    assert old.read_bytes() == before
    old_scores, _, old_maps, _ = outcomes(old, reference)
    threshold = sorted(old_scores)[36 - 1]  # 40 * 0.9, counted from 1
    assert done == (tmp_path / "new.xml", 0.1, 39, pytest.approx(float(threshold), abs=1e-7), done.alarms, None)
    assert done.alarms == sum(score > 0.5 for score in old_scores)

    scores, labels, maps, masks = outcomes(tmp_path / "new.xml", reference)
    assert sum(labels) == 3  # those above the 36th
    np.testing.assert_allclose(np.sort(scores), read_reference_scores(tmp_path / "new.xml"), atol=1e-7)
    # The 36th of the levels is the highest at which a good map still has a region of five pixels.
    holding = [sum(has_region(one > level, 5) for one in old_maps) for level in np.linspace(0, 1, 21)]
    assert sum(has_region(one > 0.5, 5) for one in maps) == 3
    assert max(holding) >= 3 >= min(holding)
    assert all(not mask.any() for mask, label in zip(masks, labels, strict=True) if not label)

    old_scores, _, old_maps, _ = outcomes(old, new_ones)
    scores, labels, maps, masks = outcomes(tmp_path / "new.xml", new_ones)
    assert labels == [score > threshold for score in old_scores]
    assert len(set(scores)) == len(set(old_scores))  # nothing is cut off
    assert list(np.argsort(scores, kind="stable")) == list(np.argsort(old_scores, kind="stable"))
    for one, mask, label in zip(maps, masks, labels, strict=True):
        np.testing.assert_array_equal(mask, (one > 0.5) & label)
    new = tmp_path / "new.xml"
    assert check(new, images=str(reference[0].parent), output=tmp_path / "check", precisions=("f32",)) is None


@pytest.mark.long
def test_again_and_in_other_runtimes(made, tmp_path):
    """A second time from the first one's file, by the command; the file keeps its input and what it says of itself."""
    good = sorted((made / "data/weave/test/good").glob("*.png"))
    (tmp_path / "good").mkdir()
    for path in good[:25]:
        (tmp_path / "good" / path.name).write_bytes(path.read_bytes())
    old = made / "weights/openvino/model.xml"
    recalibrate_file(old, good[20:60], tmp_path / "first.xml", rate=0.05)
    command = ("cflow-plugin", "recalibrate", "--model", "first.xml", "--images", "good")
    text = run_command(*command, cwd=tmp_path)
    assert "false-alarm rate of 0.05 by 25 good images" in text
    models = [ov.Core().read_model(path) for path in (old, tmp_path / "first-recalibrated.xml")]
    assert models[0].input(0).partial_shape == models[1].input(0).partial_shape
    assert models[0].input(0).element_type == models[1].input(0).element_type
    for key in ("cflow_plugin_encoder", "cflow_plugin_bits"):
        assert models[0].get_rt_info(key).astype(str) == models[1].get_rt_info(key).astype(str)
    assert models[1].get_rt_info(["model_info", "image_threshold"]).astype(str) == "0.5"
    _, labels, _, _ = outcomes(tmp_path / "first-recalibrated.xml", good[:25])
    assert sum(labels) == 0  # of 26 ranks 1.3 may lie above: the highest image is the threshold itself
    run_command(*command, cwd=tmp_path, expect=1)  # the file is there already


def shades(folder, values):
    folder.mkdir()
    for number, value in enumerate(values):
        cv2.imwrite(str(folder / f"{number}.png"), np.full((8, 8, 3), value, np.uint8))
    return sorted(folder.iterdir())


def test_the_rate_is_kept(tmp_path):
    """Over many draws of the reference images, new ones of the same kind raise alarms at the rate, whatever it was."""
    generator, rate, alarms, total = np.random.default_rng(0), 0.2, 0, 0
    model = save_brightness_model(tmp_path / "model.xml")
    for draw in range(12):
        values = np.clip(generator.normal(180, 20, 60), 0, 255)  # with the old threshold nearly all are alarms
        images = shades(tmp_path / f"{draw}", values)
        new = tmp_path / f"new {draw}.xml"
        done = recalibrate_file(model, images[:24], new, rate)
        assert done.alarms >= 20
        _, labels, _, _ = outcomes(new, images[24:])
        alarms, total = alarms + sum(labels), total + len(labels)
    # Beta(5, 20) is the rate of one draw, so 12 draws of 36 images each have a standard deviation of about 0.03.
    spread = math.sqrt(0.2 * 0.8 / 26 / 12 + 0.2 * 0.8 / total)
    assert abs(alarms / total - rate) < 3.5 * spread + 1 / 255


def test_an_image_unlike_the_others_is_named(tmp_path, caplog):
    model = save_brightness_model(tmp_path / "model.xml")
    images = shades(tmp_path / "good", [*range(100, 129), 240])
    odd = next(path for path in images if cv2.imread(str(path)).max() == 240)
    assert recalibrate_file(model, images, tmp_path / "new.xml", rate=0.05).odd == odd
    # With a higher rate the threshold does not rest on it.
    assert recalibrate_file(model, images, tmp_path / "other.xml", rate=0.1).odd is None
    with caplog.at_level(logging.WARNING):
        recalibrate(model, str(tmp_path / "good"), tmp_path / "third.xml", rate=0.05)
    assert str(odd) in caplog.text


def test_what_is_refused(tmp_path):
    model = save_brightness_model(tmp_path / "model.xml")
    images = shades(tmp_path / "good", range(100, 130))
    (tmp_path / "other.bin").write_bytes(b"of another model")
    for settings, words in (
        ({"rate": None}, "without a false-alarm rate"),
        ({"rate": 0.01}, "needs at least 99"),
        ({"rate": 1.5}, "between 0 and 1"),
        ({"images": []}, "needs at least 9"),
        ({"target": tmp_path / "new.onnx"}, "OpenVINO's .xml"),
        ({"target": model}, "there already"),
        ({"target": tmp_path / "other.xml"}, "there already"),
        ({"images": shades(tmp_path / "white", [255] * 12)}, "end of their range"),
        ({"model": tmp_path / "none.xml"}, "no exported model"),
        ({"images": [*images, tmp_path / "model.xml"]}, "Take it out"),
    ):
        arguments = {"model": model, "images": images, "target": tmp_path / "new.xml", "rate": 0.1, **settings}
        with pytest.raises(CflowError, match=words):
            recalibrate_file(**arguments)
        assert not (tmp_path / "new.xml").exists()
        assert not list(tmp_path.glob(".*"))
