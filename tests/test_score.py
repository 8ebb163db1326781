import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import cv2
import numpy as np
import pandas as pd
import pytest
from anomalib.deploy import OpenVINOInferencer

from cflow_plugin import CflowError
from cflow_plugin.commands.cli import main
from cflow_plugin.commands.score import score
from cflow_plugin.commands.score.listing import list_images
from cflow_plugin.commands.score.parts import Row, ScoreTable
from cflow_plugin.data.textures import draw

from .conftest import run_command


@pytest.fixture(scope="module")
def exported(export):
    return export(None)


@pytest.fixture(
    scope="module", params=[pytest.param((64, 64), marks=pytest.mark.long), None], ids=["fixed", "any size"]
)
def of_each_kind(request, export):
    return export(request.param)


def draw_pictures(folder: Path, count: int) -> Path:
    """Textures, every third with a hole, in two folders and two kinds of files."""
    (folder / "deeper").mkdir(parents=True)
    for number in range(count):
        picture = draw("weave", "hole" if number % 3 == 0 else "good", "test", number, size=64).image[..., ::-1]
        name = f"deeper/ü {number}.png" if number % 2 else f"{number}.BMP"
        cv2.imencode(Path(name).suffix, picture)[1].tofile(folder / name)
    return folder


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    return draw_pictures(tmp_path_factory.mktemp("pictures") / "all", 7)


def read(folder: Path) -> pd.DataFrame:
    return pd.read_parquet(folder).set_index("path").sort_index()


def test_scores_are_those_of_anomalib(of_each_kind, pictures, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # the inferencer's cache goes into the working directory
    command = ["score", "--model", str(of_each_kind), "--source", str(pictures), "--output", str(tmp_path / "out")]
    main([*command, "--batch", "3", "--maps", "true"])
    table = read(tmp_path / "out")
    assert set(table.index) == {str(path) for path in pictures.rglob("*.*")}
    assert len(list((tmp_path / "out").glob("*.parquet"))) == 3
    inferencer = OpenVINOInferencer(of_each_kind, device="CPU", config={"INFERENCE_PRECISION_HINT": "f32"})
    for path, row in table.iterrows():
        picture = cv2.imdecode(np.fromfile(path, np.uint8), cv2.IMREAD_COLOR)
        expected = inferencer.predict(picture[..., ::-1])
        assert row["score"] == pytest.approx(np.asarray(expected.pred_score).item(), abs=1e-5)
        assert row["anomalous"] == np.asarray(expected.pred_label).item()
        assert pd.isna(row["error"])
        packed = cv2.imdecode(np.frombuffer(row["anomaly_map"], np.uint8), cv2.IMREAD_UNCHANGED)
        np.testing.assert_allclose(packed / 255, np.squeeze(np.asarray(expected.anomaly_map)), atol=0.5 / 255 + 1e-5)
    assert table["score"].nunique() > len(table) // 2


def test_what_cannot_be_read_has_a_row_that_says_why(exported, pictures, tmp_path, caplog):
    folder = tmp_path / "pictures"
    shutil.copytree(pictures, folder)
    whole = (folder / "0.BMP").read_bytes()
    (folder / "broken.png").write_bytes(b"not an image")
    (folder / "empty.png").write_bytes(b"")
    (folder / "folder.png").mkdir()
    (folder / "gone.png").symlink_to("nowhere.png")
    score(exported, str(folder), tmp_path / "out", batch=4)
    table = read(tmp_path / "out")
    wrong = table[table["error"].notna()]
    assert [Path(path).name for path in wrong.index] == ["broken.png", "empty.png", "gone.png"]
    assert list(wrong["error"].str.contains("No such file")) == [False, False, True]
    assert wrong["score"].isna().all()
    assert wrong["anomalous"].isna().all()
    assert table.drop(wrong.index)["score"].notna().all()
    assert len(table) == 7 + 3
    assert "3 images could not be scored" in caplog.text
    assert whole == (folder / "0.BMP").read_bytes()


def test_an_image_whose_score_is_not_a_number(export_blind_to_black, pictures, tmp_path):
    folder = tmp_path / "pictures"
    shutil.copytree(pictures, folder)
    cv2.imwrite(str(folder / "black.png"), np.zeros((64, 64, 3), np.uint8))
    score(export_blind_to_black, str(folder), tmp_path / "out")
    table = read(tmp_path / "out")
    [wrong] = table.index[table["error"].notna()]
    assert Path(wrong).name == "black.png"
    assert "not a finite number" in table.loc[wrong, "error"]
    assert table["score"].isna().sum() == table["anomalous"].isna().sum() == 1


def test_nothing_but_damage(exported, tmp_path):
    (tmp_path / "broken.png").write_bytes(b"not an image")
    with pytest.raises(CflowError, match="None of the 1 images"):
        score(exported, str(tmp_path), tmp_path / "out")


def test_listing(pictures, tmp_path):
    everything = sorted(str(path) for path in pictures.rglob("*.*"))
    assert list_images(str(pictures)) == everything
    assert list_images(str(pictures / "**" / "*.png")) == [path for path in everything if path.endswith("png")]
    assert list_images(str(pictures / "*.BMP")) == [path for path in everything if path.endswith("BMP")]
    assert list_images(everything[0]) == everything[:1]
    tables = tmp_path / "tables"
    tables.mkdir()
    pd.DataFrame({"part": [1, 2, 3], "path": ["b.png", "a.png", "b.png"]}).to_parquet(tables / "one.parquet")
    assert list_images(str(tables / "one.parquet")) == ["b.png", "a.png"]
    pd.DataFrame({"path": ["c.png"]}).to_parquet(tables / "two.parquet")
    assert set(list_images(str(tables))) == {"a.png", "b.png", "c.png"}


def test_a_table_of_relative_paths(exported, pictures, tmp_path, monkeypatch):
    monkeypatch.chdir(pictures)
    pd.DataFrame({"path": ["2.BMP", "0.BMP"]}).to_parquet(tmp_path / "list.parquet")
    score(exported, str(tmp_path / "list.parquet"), tmp_path / "out")
    assert list(pd.read_parquet(tmp_path / "out")["path"]) == ["2.BMP", "0.BMP"]
    assert read(tmp_path / "out")["score"].notna().all()


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("absent", "nothing at"),
        ("*.gif", "no image in"),
        ("empty", "no image in"),
        ("other.parquet", "column 'path'"),
        ("numbers.parquet", "a text in every row"),
        ("note.txt", "could not be read as Parquet"),
    ],
)
def test_what_cannot_be_listed(tmp_path, source, words):
    (tmp_path / "empty").mkdir()
    (tmp_path / "note.txt").write_text("a.png")
    pd.DataFrame({"image": ["a.png"]}).to_parquet(tmp_path / "other.parquet")
    pd.DataFrame({"path": [1]}).to_parquet(tmp_path / "numbers.parquet")
    with pytest.raises(CflowError, match=words):
        list_images(str(tmp_path / source))


def test_going_on(exported, pictures, tmp_path):
    out = tmp_path / "out"
    folder = tmp_path / "pictures"
    shutil.copytree(pictures, folder)
    score(exported, str(folder), out, batch=3)
    first = {path: path.stat().st_mtime_ns for path in out.glob("*.parquet")}
    before = read(out)
    shutil.copy(folder / "0.BMP", folder / "00.BMP")  # sorts into the middle of a batch
    damaged = sorted(first)[0]
    lost = set(pd.read_parquet(damaged)["path"])
    damaged.write_bytes(damaged.read_bytes()[:100])
    (out / ".part-0-1.partial").write_bytes(b"half a part")
    score(exported, str(folder), out, batch=3)
    after = read(out)
    assert set(after.index) == set(before.index) | {str(folder / "00.BMP")}
    assert not after.index.has_duplicates
    pd.testing.assert_frame_equal(after.loc[before.index], before)
    assert {path for path, time in first.items() if path.exists() and path.stat().st_mtime_ns == time} == set(first) - {
        damaged
    }
    assert lost <= set(after.index)
    assert not list(out.glob("*.partial"))
    table = (out / "_regions.csv").read_text()
    for file in ("_regions.csv", "_regions.coco.json"):  # as after a kill behind the last part
        (out / file).unlink()
    score(exported, str(folder), out, batch=3)
    assert (out / "_regions.csv").read_text() == table
    assert (out / "_regions.coco.json").is_file()


def test_what_was_mended_or_changed_is_scored_again(exported, pictures, tmp_path, caplog):
    caplog.set_level("INFO")
    folder, out = tmp_path / "pictures", tmp_path / "out"
    shutil.copytree(pictures, folder)
    whole = (folder / "0.BMP").read_bytes()
    (folder / "0.BMP").write_bytes(whole[:-500])
    score(exported, str(folder), out, batch=3, maps=True)
    before = read(out)
    assert list(before.index[before["error"].notna()]) == [str(folder / "0.BMP")]
    (folder / "0.BMP").write_bytes(whole)
    shutil.copy2(folder / "deeper/ü 1.png", folder / "deeper/ü 3.png")  # with the time of the other one
    caplog.clear()
    score(exported, str(folder), out, batch=3, maps=True)
    assert "2 images in" in caplog.text
    after = read(out)
    assert after["error"].isna().all()
    assert set(after.index) == set(before.index)
    assert not after.index.has_duplicates
    one, other = (after.loc[str(folder / f"deeper/ü {number}.png")] for number in (1, 3))
    assert one["score"] == pytest.approx(other["score"], abs=1e-6)
    untouched = after.index.difference([str(folder / "0.BMP"), str(folder / "deeper/ü 3.png")])
    pd.testing.assert_frame_equal(after.loc[untouched], before.loc[untouched], check_dtype=False)


def test_a_batch_that_comes_twice_is_one_part(tmp_path):
    parts = ScoreTable(tmp_path, maps=False)
    rows = [Row("a", 0.25, True), Row("b", 0.75, False)]
    for _ in range(2):
        parts.write(["a", "b"], rows)
    assert pd.read_parquet(tmp_path)["path"].tolist() == ["a", "b"]
    assert parts.missing(["a", "b", "c", "d", "e"], 2) == [["c", "d"], ["e"]]
    assert parts.missing(["0", "a", "b", "c"], 2) == [["0"], ["c"]]


@pytest.mark.long
def test_folders_of_other_scores_are_refused(exported, export, pictures, tmp_path):
    score(exported, str(pictures / "0.BMP"), tmp_path / "out")
    with pytest.raises(CflowError, match="made with another maps"):
        score(exported, str(pictures), tmp_path / "out", maps=True)
    another = export((96, 160))
    with pytest.raises(CflowError, match="made with another model"):
        score(another, str(pictures), tmp_path / "out")
    assert len(read(tmp_path / "out")) == 1
    (tmp_path / "tables").mkdir()
    pd.DataFrame({"path": ["a.png"]}).to_parquet(tmp_path / "tables" / "list.parquet")
    with pytest.raises(CflowError, match="something else"):
        score(exported, str(pictures), tmp_path / "tables")
    with ScoreTable(tmp_path / "busy", maps=False).opened({}), pytest.raises(CflowError, match="Another run"):
        score(exported, str(pictures), tmp_path / "busy")
    with pytest.raises(CflowError, match="cannot be written"):
        score(exported, str(pictures), pictures / "0.BMP" / "out")
    with pytest.raises(CflowError, match="for --engine ray"):
        score(exported, str(pictures), tmp_path / "out", workers=2)
    with pytest.raises(CflowError, match="at least 1"):
        score(exported, str(pictures), tmp_path / "out", batch=0)


def test_without_ray_a_sentence(exported, pictures, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(CflowError, match=r'pip install "cflow-plugin\[ray\]"'):
        score(exported, str(pictures), tmp_path / "out", engine="ray")


@pytest.mark.long
def test_killed_and_started_again(exported, tmp_path):
    folder = draw_pictures(tmp_path / "pictures", 40)
    for number in range(1, 25):  # enough that the kill comes in time
        shutil.copytree(folder / "deeper", folder / f"copy {number}")
    (folder / "broken.png").write_bytes(b"not an image")
    expected = {str(path) for path in folder.rglob("*.*")}
    command = ["cflow-plugin", "score", "--model", exported, "--source", folder, "--output", "out", "--batch", "8"]
    command += ["--threads", "1"]
    out = tmp_path / "out"
    program = Path(sys.executable).parent / command[0]
    process = subprocess.Popen([program, *map(str, command[1:])], cwd=tmp_path, start_new_session=True)
    deadline = time.monotonic() + 120
    while len(list(out.glob("*.parquet"))) < 3 and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.001)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    first = read(out)
    assert 0 < len(first) < len(expected), "it must be killed on its way"
    scored = first["error"].isna().sum()  # the broken one is tried again
    assert f"{scored} of {len(expected)} images are scored already" in run_command(*command, cwd=tmp_path)
    table = read(out)
    assert not table.index.has_duplicates
    assert set(table.index) == expected
    pd.testing.assert_frame_equal(table.loc[first.index], first)
    assert list(table.index[table["error"].notna()]) == [str(folder / "broken.png")]
