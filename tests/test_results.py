"""What a prediction leaves: a table, on the screen too, and a picture for each image."""

import csv
import logging
from pathlib import Path

import numpy as np
import pytest
from anomalib.data import PredictDataset
from anomalib.visualization import ImageVisualizer
from PIL import Image
from torch.utils.data import DataLoader

from cflow_plugin import CflowPlugin
from cflow_plugin.decisions.score_tables import read_scores
from cflow_plugin.training.results import _never_twice

from .conftest import make_engine, run_command

LINES = ["lineA/cam1/000.png", "lineB/cam1/000.png", "lineB/cam2/000.png", "lineB/cam2/000.jpg"]


@pytest.fixture
def lines(tmp_path):
    for number, name in enumerate(LINES):
        (tmp_path / "new" / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (64, 64), (60 * number, 90, 120)).save(tmp_path / "new" / name)
    return tmp_path / "new"


def table_in(folder: Path) -> list[dict[str, str]]:
    with (folder / "predictions.csv").open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def predict(checkpoint, data, folder, **settings):
    model = CflowPlugin.load_from_checkpoint(checkpoint, map_location="cpu", **settings).eval()
    return model, make_engine(folder).predict(model, data_path=data)


def test_every_image_has_a_row_and_a_picture(checkpoint, lines, tmp_path, caplog):
    with caplog.at_level(logging.INFO, "cflow_plugin"):
        _, batches = predict(checkpoint, lines, tmp_path / "runs")
    [table] = (tmp_path / "runs").rglob("predictions.csv")
    assert table.parent.name == "new"
    rows = table_in(table.parent)
    expected = {batch.image_path[0]: batch for batch in batches}
    assert [row["image"] for row in rows] == [batch.image_path[0] for batch in batches]
    assert {Path(row["image"]) for row in rows} == {lines / name for name in LINES}
    for row in rows:
        batch = expected[row["image"]]
        assert float(row["score"]) == pytest.approx(float(batch.pred_score[0]), abs=1e-6)
        assert row["anomalous"] == str(int(batch.pred_label[0]))
        assert row["p_value"] == ""  # trained without a false-alarm rate
        assert Path(row["picture"]) == table.parent / Path(row["image"]).relative_to(lines)
    pictures = [np.asarray(Image.open(row["picture"])) for row in rows]
    assert len({picture.tobytes() for picture in pictures}) == len(LINES)
    assert (
        f"4 images, {sum(row['anomalous'] == '1' for row in rows)} anomalous. Table and pictures are in" in caplog.text
    )
    assert len(read_scores(table).scores) == 4


def test_another_prediction_overwrites_nothing(checkpoint, lines, tmp_path):
    for line in ("lineA", "lineB"):
        predict(checkpoint, lines / line / "cam1", tmp_path / "runs")
    tables = sorted((tmp_path / "runs").rglob("predictions.csv"))
    assert [table.parent.name for table in tables] == ["cam1", "cam1_2"]
    for table, line in zip(tables, ("lineA", "lineB"), strict=True):
        [row] = table_in(table.parent)
        assert Path(row["image"]) == lines / line / "cam1/000.png"
        assert Path(row["picture"]).is_file()


def test_several_loaders_and_no_pictures(checkpoint, lines, tmp_path):
    model = CflowPlugin.load_from_checkpoint(checkpoint, map_location="cpu", visualizer=False).eval()
    datasets = [PredictDataset(lines / line) for line in ("lineA", "lineB")]
    loaders = [DataLoader(dataset, batch_size=2, collate_fn=dataset.collate_fn) for dataset in datasets]
    make_engine(tmp_path / "runs").predict(model, dataloaders=loaders)
    [table] = (tmp_path / "runs").rglob("predictions.csv")
    rows = table_in(table.parent)
    assert {Path(row["image"]) for row in rows} == {lines / name for name in LINES}
    assert not any(row["picture"] for row in rows)
    assert {file.suffix for file in table.parent.iterdir()} == {".csv", ".jsonl", ".json"}


def test_a_visualizer_of_the_user_s(checkpoint, lines, tmp_path):
    own = ImageVisualizer(fields=["image"], field_size=(40, 40), output_dir=tmp_path / "mine")
    predict(checkpoint, lines, tmp_path / "runs", visualizer=own)
    rows = table_in(tmp_path / "mine/new")
    assert len({row["picture"] for row in rows}) == len(LINES)
    assert Image.open(rows[0]["picture"]).size == (120, 40)


def test_names_that_differ_in_capitals_alone():
    find = _never_twice(lambda path: Path("out") / Path(path).name, ["a/0.png", "b/0.PNG"])
    assert [find(path).as_posix() for path in ("b/0.PNG", "a/0.png", "c/0.png", "a/0.png")] == [
        "out/0_2.PNG", "out/0.png", "out/0_3.png", "out/0.png",
    ]  # fmt: skip


def test_pictures_of_a_test(textures, checkpoint, tmp_path):
    model = CflowPlugin.load_from_checkpoint(checkpoint, map_location="cpu").eval()
    make_engine(tmp_path).test(model, datamodule=textures)
    pictures = list(tmp_path.rglob("images/**/*.png"))
    assert len(pictures) == len(textures.test_data)
    assert {path.parent.name for path in pictures} == {
        Path(path).parent.name for path in textures.test_data.samples.image_path
    }


@pytest.mark.long
def test_the_command_shows_a_table(checkpoint, lines, tmp_path):
    command = ["anomalib", "predict", "--model", "CflowPlugin", "--ckpt_path", checkpoint, "--data", lines]
    out = run_command(*command, cwd=tmp_path)
    for word in ("Predictions", "000.png", "score", "decision", "p-value"):
        assert word in out
    assert "Table and pictures are in" in out
    [table] = tmp_path.rglob("predictions.csv")
    assert len(table_in(table.parent)) == len(LINES)
