import csv

import cv2
import numpy as np
import pytest
import torch

from cflow_plugin import CflowError
from cflow_plugin.watch import watch


@pytest.fixture(scope="module", params=[(64, 64), None], ids=["fixed size", "any size"])
def exported(request, trained, tmp_path_factory):
    return trained.to_openvino(tmp_path_factory.mktemp("exported"), input_size=request.param)


@pytest.fixture
def pictures(tmp_path):
    folder = tmp_path / "pictures"
    (folder / "deeper").mkdir(parents=True)
    generator = np.random.default_rng(0)
    for name, size in (("a.png", (64, 64)), ("deeper/ü.png", (120, 80))):
        coarse = generator.integers(0, 255, (6, 6, 3), dtype=np.uint8)
        cv2.imencode(".png", cv2.resize(coarse, size[::-1]))[1].tofile(folder / name)
    return folder


def read_scores(folder):
    with (folder / "scores.csv").open() as file:
        return {row["image"]: row for row in csv.DictReader(file)}


def test_a_folder(exported, trained, pictures, tmp_path):
    watch(exported, str(pictures), tmp_path / "out")
    scores = read_scores(tmp_path / "out")
    assert set(scores) == {"a.png", "deeper/ü.png"}
    for name, row in scores.items():
        picture = cv2.imdecode(np.fromfile(pictures / name, np.uint8), cv2.IMREAD_COLOR)
        with torch.no_grad():
            expected = trained(torch.from_numpy(picture[..., ::-1].copy()).permute(2, 0, 1)[None] / 255)
        assert float(row["score"]) == pytest.approx(expected.pred_score.item(), abs=1e-4)
        assert int(row["anomalous"]) == expected.pred_label.item()
        overlay = cv2.imdecode(np.fromfile(tmp_path / "out" / name, np.uint8), cv2.IMREAD_COLOR)
        assert overlay.shape == picture.shape


def test_a_video(exported, tmp_path):
    film = cv2.VideoWriter(str(tmp_path / "film.avi"), cv2.VideoWriter.fourcc(*"MJPG"), 10, (80, 60))
    for shade in range(5):
        film.write(np.full((60, 80, 3), 40 * shade, np.uint8))
    film.release()
    watch(exported, str(tmp_path / "film.avi"), tmp_path / "out", limit=4)
    assert list(read_scores(tmp_path / "out")) == ["000000", "000001", "000002", "000003"]
    overlay = cv2.VideoCapture(str(tmp_path / "out" / "overlay.mp4"))
    assert overlay.get(cv2.CAP_PROP_FRAME_COUNT) == 4


def test_a_damaged_image_costs_only_itself(exported, pictures, tmp_path):
    (pictures / "broken.png").write_bytes(b"not an image")
    with pytest.raises(CflowError, match=r"1 images could not be read \(broken.png"):
        watch(exported, str(pictures), tmp_path / "out", overlays=False)
    assert set(read_scores(tmp_path / "out")) == {"a.png", "deeper/ü.png"}
    assert not list((tmp_path / "out").glob("*.png"))


@pytest.mark.parametrize(
    ("model", "source", "words"),
    [
        ("absent.xml", ".", "no exported model"),
        ("damaged.xml", ".", "could not be read as"),
        (None, "absent", "nothing at"),
        (None, "empty", "no image in"),
        (None, "damaged.xml", "as a video"),
        (None, "99", "camera 99"),
    ],
)
def test_what_cannot_be_watched(exported, tmp_path, model, source, words):
    (tmp_path / "damaged.xml").write_text("<nothing/>")
    (tmp_path / "empty").mkdir()
    path = exported if model is None else tmp_path / model
    source = source if source.isdigit() else str(tmp_path / source)
    with pytest.raises(CflowError, match=words):
        watch(path, source, tmp_path / "out")
