import csv
import json
import logging
import subprocess
import sys
import threading
import time
from contextlib import nullcontext
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from sklearn.metrics import roc_auc_score

from cflow_plugin import CflowError
from cflow_plugin.anomalib_patches.error_hook import explain
from cflow_plugin.commands.cli import main
from cflow_plugin.commands.watch.timeline import Smoother
from cflow_plugin.commands.watch.watch import watch
from cflow_plugin.data.textures import draw


@pytest.fixture(scope="module")
def exported(export):
    return export(None)


@pytest.fixture(
    scope="module", params=[pytest.param((64, 64), marks=pytest.mark.long), None], ids=["fixed", "any size"]
)
def of_each_kind(request, export):
    return export(request.param)


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


@pytest.fixture
def clip(tmp_path):
    """Twelve frames in a folder, their numbers not padded, and which of them are said to be anomalous."""
    folder = tmp_path / "clip"
    folder.mkdir()
    truth = np.isin(np.arange(12), [2, 3, 4, 9])
    for number, kind in enumerate(np.where(truth, "hole", "good")):
        picture = draw("weave", str(kind), "test", number, size=64).image
        cv2.imwrite(str(folder / f"{number}.png"), picture[..., ::-1])
    np.save(tmp_path / "truth.npy", truth.astype(np.uint8))
    (tmp_path / "truth.csv").write_text("start,end\n2,4\n9,9\n")
    return folder, truth


def test_a_folder(of_each_kind, trained, pictures, tmp_path):
    watch(of_each_kind, str(pictures), tmp_path / "out")
    scores = read_scores(tmp_path / "out")
    assert set(scores) == {"a.png", "deeper/ü.png"}
    for name, row in scores.items():
        picture = cv2.imdecode(np.fromfile(pictures / name, np.uint8), cv2.IMREAD_COLOR)
        with torch.no_grad():
            expected = trained(torch.from_numpy(picture[..., ::-1].copy()).permute(2, 0, 1)[None] / 255)
        assert float(row["score"]) == pytest.approx(expected.pred_score.item(), abs=1e-4)
        assert int(row["anomalous"]) == expected.pred_label.item()
        overlay = cv2.imdecode(np.fromfile(tmp_path / "out/overlays" / name, np.uint8), cv2.IMREAD_COLOR)
        assert overlay.shape == picture.shape


def test_a_video(of_each_kind, tmp_path):
    film = cv2.VideoWriter(str(tmp_path / "film.avi"), cv2.VideoWriter.fourcc(*"MJPG"), 10, (80, 60))
    for shade in range(5):
        film.write(np.full((60, 80, 3), 40 * shade, np.uint8))
    film.release()
    watch(of_each_kind, str(tmp_path / "film.avi"), tmp_path / "out", limit=4)
    assert list(read_scores(tmp_path / "out")) == ["000000", "000001", "000002", "000003"]
    overlay = cv2.VideoCapture(str(tmp_path / "out" / "overlay.avi"))
    assert overlay.get(cv2.CAP_PROP_FRAME_COUNT) == 4


def test_an_image_whose_score_is_not_a_number(export_blind_to_black, pictures, tmp_path, caplog):
    cv2.imwrite(str(pictures / "black.png"), np.zeros((64, 64, 3), np.uint8))
    with pytest.raises(CflowError, match=r"1 image could not be scored \(black.png"):
        watch(export_blind_to_black, str(pictures), tmp_path / "out", overlays=False)
    assert set(read_scores(tmp_path / "out")) == {"a.png", "deeper/ü.png"}
    assert "black.png: its score is not a finite number" in caplog.text


def test_overlays_of_images_that_differ_by_their_suffix(exported, pictures, tmp_path):
    picture = cv2.imdecode(np.fromfile(pictures / "a.png", np.uint8), cv2.IMREAD_COLOR)
    for name in ("a.jpg", "a.BMP", "score_over_time.png"):
        cv2.imwrite(str(pictures / name), picture)
    watch(exported, str(pictures), tmp_path / "out")
    overlays = {str(path.relative_to(tmp_path / "out/overlays")) for path in (tmp_path / "out/overlays").rglob("*.*")}
    assert overlays == {"a.png", "a.jpg.png", "a.BMP.png", "score_over_time.png", "deeper/ü.png"}


@pytest.mark.long
def test_an_earlier_run_s_table_is_kept(exported, clip, tmp_path):
    watch(exported, str(clip[0]), tmp_path / "out", overlays=False, limit=7)
    watch(exported, str(clip[0]), tmp_path / "out", overlays=False, limit=2)
    watch(exported, str(clip[0]), tmp_path / "out", overlays=False)
    tables = sorted((tmp_path / "out").glob("scores*.csv"), key=lambda path: path.stat().st_mtime)
    assert [len(path.read_text().splitlines()) - 1 for path in tables] == [7, 2, 12]
    assert tables[-1].name == "scores.csv"


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs Linux's /dev/full")
@pytest.mark.parametrize("file", ["overlays/a.png", "score_over_time.png"])
def test_a_full_disk(exported, pictures, tmp_path, monkeypatch, file):
    full = tmp_path / "out" / file
    full.parent.mkdir(parents=True)
    if file.endswith("a.png"):
        full.symlink_to("/dev/full")
    else:
        monkeypatch.setattr(
            "cflow_plugin.commands.watch.score_plot.atomic_file", lambda _: nullcontext(Path("/dev/full"))
        )
    with pytest.raises(OSError, match="No space left") as caught:
        watch(exported, str(pictures), tmp_path / "out")
    assert "Free some space" in explain(caught.value)
    assert "a.png" in (tmp_path / "out/scores.csv").read_text()


def test_a_camera_that_is_lost(exported, tmp_path, monkeypatch):
    film = str(tmp_path / "film.avi")
    writer = cv2.VideoWriter(film, cv2.VideoWriter.fourcc(*"MJPG"), 10, (80, 60))
    for shade in range(5):
        writer.write(np.full((60, 80, 3), 40 * shade, np.uint8))
    writer.release()
    opened = cv2.VideoCapture(film)  # gives five images, and then none
    monkeypatch.setattr(cv2, "VideoCapture", lambda source: {7: opened}[source])
    with pytest.raises(CflowError, match="Camera 7 gave no more images after 5"):
        watch(exported, "7", tmp_path / "out")
    assert len(read_scores(tmp_path / "out")) == 5
    assert (tmp_path / "out/score_over_time.png").is_file()


def test_streams(exported, tmp_path):
    """A film from a web server has an end, and the same scores as the file; an address that leads nowhere is named."""
    film = tmp_path / "film.avi"
    writer = cv2.VideoWriter(str(film), cv2.VideoWriter.fourcc(*"MJPG"), 10, (80, 60))
    for shade in range(5):
        writer.write(np.full((60, 80, 3), 40 * shade, np.uint8))
    writer.release()
    watch(exported, str(film), tmp_path / "file", overlays=False)
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(SimpleHTTPRequestHandler, directory=str(tmp_path)))
    address = f"127.0.0.1:{server.server_port}"
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        watch(exported, f"http://{address}/film.avi", tmp_path / "stream", overlays=False)
    finally:
        server.shutdown()
        server.server_close()
    stream, file = (read_scores(tmp_path / name) for name in ("stream", "file"))
    assert [(row["time"], row["score"]) for row in stream.values()] == [
        (row["time"], row["score"]) for row in file.values()
    ]
    with pytest.raises(CflowError, match=r"http://…@127\S+ as a stream could not be opened: check") as caught:
        watch(exported, f"http://user:secret@{address}/film.avi", tmp_path / "out", overlays=False)
    assert "secret" not in str(caught.value)


def test_a_device_node_is_a_camera(exported, tmp_path):
    with pytest.raises(CflowError, match="camera /dev/null could not be opened"):
        watch(exported, "/dev/null", tmp_path / "out")


def test_a_video_that_is_cut_off(exported, tmp_path, caplog):
    film = tmp_path / "film.avi"
    writer = cv2.VideoWriter(str(film), cv2.VideoWriter.fourcc(*"MJPG"), 10, (80, 60))
    for image in np.random.default_rng(2).integers(0, 255, (20, 60, 80, 3), dtype=np.uint8):
        writer.write(image)
    writer.release()
    film.write_bytes(film.read_bytes()[: film.stat().st_size // 2])
    with caplog.at_level(logging.WARNING):
        watch(exported, str(film), tmp_path / "out", overlays=False)
    scored = len(read_scores(tmp_path / "out"))
    assert 5 < scored < 20
    assert f"ends after {scored} frames, though its header speaks of 20" in caplog.text


@pytest.mark.long
def test_a_run_that_is_killed_leaves_a_video_that_plays(exported, tmp_path):
    film = cv2.VideoWriter(str(tmp_path / "film.avi"), cv2.VideoWriter.fourcc(*"MJPG"), 10, (320, 240))
    for image in np.random.default_rng(3).integers(0, 255, (10, 240, 320, 3), dtype=np.uint8):
        for _ in range(100):
            film.write(image)
    film.release()
    out = tmp_path / "out"
    program = Path(sys.executable).parent / "cflow-plugin"
    process = subprocess.Popen(
        [program, "watch", "--model", exported, "--source", tmp_path / "film.avi", "--output", out]
    )
    try:
        while process.poll() is None and (len(read_scores(out)) if (out / "scores.csv").exists() else 0) < 200:
            time.sleep(0.01)
    finally:
        process.kill()
    assert process.wait() == -9
    overlay, frames = cv2.VideoCapture(str(out / "overlay.avi")), 0
    while overlay.read()[0]:
        frames += 1
    assert frames > 100  # FFmpeg holds some back


def test_a_damaged_image_costs_only_itself(exported, pictures, tmp_path):
    (pictures / "broken.png").write_bytes(b"not an image")
    with pytest.raises(CflowError, match=r"1 image could not be scored \(broken.png"):
        watch(exported, str(pictures), tmp_path / "out", overlays=False)
    assert set(read_scores(tmp_path / "out")) == {"a.png", "deeper/ü.png"}
    assert [path.name for path in (tmp_path / "out").rglob("*.png")] == ["score_over_time.png"]


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


@pytest.mark.parametrize("file", ["truth.npy", "truth.csv"])
def test_a_clip_with_its_truth(exported, clip, tmp_path, file):
    folder, truth = clip
    command = ["watch", "--model", str(exported), "--source", str(folder), "--output", str(tmp_path / "out")]
    command += ["--overlays", "false", "--frame_rate", "10", "--smoothing", "0.2", "--threshold", "0.4"]
    main([*command, "--truth", str(tmp_path / file)])
    rows = read_scores(tmp_path / "out")
    assert list(rows) == [f"{number}.png" for number in range(12)]
    assert [int(row["frame"]) for row in rows.values()] == list(range(12))
    assert [float(row["time"]) for row in rows.values()] == pytest.approx(np.arange(12) / 10)
    scores, smoothed = ([float(row[name]) for row in rows.values()] for name in ("score", "smoothed"))
    smoother = Smoother(0.2)
    assert smoothed == pytest.approx([smoother(index / 10, score) for index, score in enumerate(scores)], abs=2e-6)
    assert [row["anomalous"] == "1" for row in rows.values()] == [value > 0.4 for value in smoothed]
    metrics = json.loads((tmp_path / "out/metrics.json").read_text())
    assert metrics["frame_AUROC"] == pytest.approx(roc_auc_score(truth, scores))
    assert metrics["frame_AUROC_smoothed"] == pytest.approx(roc_auc_score(truth, smoothed))
    assert cv2.imread(str(tmp_path / "out/score_over_time.png")).std() > 0


def test_smoothing_does_not_look_ahead(exported, clip, tmp_path):
    whole, part = tmp_path / "whole", tmp_path / "part"
    watch(exported, str(clip[0]), whole, overlays=False, smoothing=0.1)
    watch(exported, str(clip[0]), part, overlays=False, smoothing=0.1, limit=7)
    rows = read_scores(whole)
    assert len(rows) == 12
    assert [row["smoothed"] for row in read_scores(part).values()] == [row["smoothed"] for row in rows.values()][:7]
    assert len({row["score"] == row["smoothed"] for row in rows.values()}) == 2


def test_an_unreadable_frame_keeps_its_number(exported, clip, tmp_path):
    (clip[0] / "3.png").write_bytes(b"")
    with pytest.raises(CflowError, match=r"1 image could not be scored \(3.png"):
        watch(exported, str(clip[0]), tmp_path / "out", overlays=False, truth=tmp_path / "truth.npy")
    rows = read_scores(tmp_path / "out")
    assert [int(row["frame"]) for row in rows.values()] == [0, 1, 2, *range(4, 12)]
    expected = roc_auc_score(np.delete(clip[1], 3), [float(row["score"]) for row in rows.values()])
    assert json.loads((tmp_path / "out/metrics.json").read_text())["frame_AUROC"] == pytest.approx(expected)


def test_truth_of_another_clip(exported, clip, tmp_path):
    np.save(tmp_path / "truth.npy", np.zeros(13))
    with pytest.raises(CflowError, match=r"13 frames, but .* 12 images"):
        watch(exported, str(clip[0]), tmp_path / "out", truth=tmp_path / "truth.npy")
    assert not (tmp_path / "out").exists()


def test_a_video_longer_than_its_truth(exported, tmp_path, caplog):
    film = cv2.VideoWriter(str(tmp_path / "film.avi"), cv2.VideoWriter.fourcc(*"MJPG"), 10, (80, 60))
    for image in np.random.default_rng(2).integers(0, 255, (6, 6, 8, 3), dtype=np.uint8):
        film.write(cv2.resize(image, (80, 60)))
    film.release()
    np.save(tmp_path / "truth.npy", np.array([0, 1, 0, 1]))
    with caplog.at_level(logging.WARNING):
        watch(exported, str(tmp_path / "film.avi"), tmp_path / "out", truth=tmp_path / "truth.npy")
    assert "ends at frame 3" in caplog.text
    rows = list(read_scores(tmp_path / "out").values())
    assert [float(row["time"]) for row in rows] == pytest.approx(np.arange(6) / 10)
    expected = roc_auc_score([0, 1, 0, 1], [float(row["score"]) for row in rows[:4]])
    assert json.loads((tmp_path / "out/metrics.json").read_text())["frame_AUROC"] == pytest.approx(expected)
    assert cv2.VideoCapture(str(tmp_path / "out/overlay.avi")).get(cv2.CAP_PROP_FPS) == pytest.approx(10)


@pytest.mark.long
def test_metrics_of_an_earlier_run_do_not_stay(exported, clip, tmp_path, caplog):
    watch(exported, str(clip[0]), tmp_path / "out", overlays=False, truth=tmp_path / "truth.npy")
    assert (tmp_path / "out/metrics.json").is_file()
    np.save(tmp_path / "truth.npy", np.zeros(12))
    with caplog.at_level(logging.WARNING):
        watch(exported, str(clip[0]), tmp_path / "out", overlays=False, truth=tmp_path / "truth.npy")
    assert "no anomaly" in caplog.text
    assert not (tmp_path / "out/metrics.json").exists()


@pytest.mark.long
def test_rows_are_there_while_it_runs(exported, tmp_path):
    film = cv2.VideoWriter(str(tmp_path / "film.avi"), cv2.VideoWriter.fourcc(*"MJPG"), 10, (64, 64))
    for shade in range(400):
        film.write(np.full((64, 64, 3), shade % 250, np.uint8))
    film.release()
    arguments = (exported, str(tmp_path / "film.avi"), tmp_path / "out")
    watching = threading.Thread(target=watch, args=arguments, kwargs={"overlays": False}, daemon=True)
    watching.start()
    table, seen = tmp_path / "out/scores.csv", 0
    while watching.is_alive() and seen < 1:
        time.sleep(0.001)
        seen = len(table.read_text().splitlines()) - 1 if table.exists() else 0
    assert 0 < seen < 400
    watching.join()
    assert len(read_scores(tmp_path / "out")) == 400


@pytest.mark.parametrize(("settings", "words"), [({"smoothing": -1.0}, "Smoothing"), ({"frame_rate": 0.0}, "rate")])
def test_settings_out_of_range(exported, clip, tmp_path, settings, words):
    with pytest.raises(CflowError, match=words):
        watch(exported, str(clip[0]), tmp_path / "out", **settings)
