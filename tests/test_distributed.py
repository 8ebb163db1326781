import csv
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import cv2
import pytest
import torch
import yaml

from cflow_plugin.data.textures import draw
from cflow_plugin.training.distributed import share_of_batch
from cflow_plugin.training.feature_bank import VectorBatch

from .conftest import QUICK, run_command


def config_file(folder: Path) -> str:
    config = {
        "seed_everything": 3,
        "model": {
            "class_path": "CflowPlugin",
            "init_args": {
                **QUICK,
                "image_size": [64, 64],
                "epochs": 2,
                "steps_per_epoch": 5,
                "target_false_alarm_rate": 0.25,
            },
        },
        # Nine test images, and seven to train on: two processes cannot share them evenly.
        "data": {
            "class_path": "Textures",
            "init_args": {"resolution": 64, "train_good": 10, "test_good": 4, "test_defect": 1, "num_workers": 0},
        },
        "trainer": {"accelerator": "cpu", "logger": False},
    }
    (folder / "train.yaml").write_text(yaml.safe_dump(config))
    return "train.yaml"


def results_of(folder: Path) -> tuple[dict, dict, set[str]]:
    [run] = [path for path in (folder / "CflowPlugin/Textures/weave").iterdir() if not path.is_symlink()]
    assert (run.parent / "latest").resolve() == run.resolve()
    weights = torch.load(run / "weights/lightning/model.ckpt", weights_only=True)["state_dict"]
    files = {str(path.relative_to(run)) for path in run.rglob("*") if path.is_file()}
    return weights, json.loads((run / "metrics.json").read_text()), files


@pytest.fixture(scope="module")
def one(tmp_path_factory):
    """What a training in one process left."""
    folder = tmp_path_factory.mktemp("in one process")
    run_command("anomalib", "train", "--config", config_file(folder), "--default_root_dir", "one", cwd=folder)
    return folder / "one"


@pytest.mark.long
def test_two_processes_do_what_one_does(one, tmp_path):
    name = config_file(tmp_path)
    ddp = ["--trainer.strategy", "ddp", "--trainer.devices", "2"]
    said = run_command("anomalib", "train", "--config", name, "--default_root_dir", "two", *ddp, cwd=tmp_path)
    assert len(re.findall(r"Extracting the features of\s+\d+\s+training\s+images", said)) == 1
    weights, metrics, files = results_of(one)
    others, other_metrics, other_files = results_of(tmp_path / "two")
    assert others.keys() == weights.keys()
    for key, value in weights.items():
        torch.testing.assert_close(others[key], value, rtol=0, atol=1e-6, equal_nan=True, msg=key)
    assert other_metrics == pytest.approx(metrics, abs=1e-5)
    assert other_files == files
    assert sum(file.endswith(".png") for file in files) == 9
    [checkpoint] = (tmp_path / "two/CflowPlugin/Textures/weave/latest").rglob("model.ckpt")
    images, count = tmp_path / "images", 7
    images.mkdir()
    for number in range(count):
        picture = draw("weave", "hole" if number % 3 == 0 else "good", "test", number, size=64).image
        cv2.imwrite(str(images / f"{number}.png"), picture)
    predict = ["anomalib", "predict", "--model", "CflowPlugin", "--data", images, "--ckpt_path", checkpoint]
    said = run_command(*predict, "--default_root_dir", "predicted", *ddp, cwd=tmp_path)
    [table] = {found.resolve() for found in (tmp_path / "predicted").rglob("predictions.csv")}
    rows = list(csv.DictReader(table.open()))
    assert len(rows) == len({row["image"] for row in rows}) == count
    anomalous = sum(row["anomalous"] == "1" for row in rows)
    assert f"{count} images, {anomalous} anomalous" in " ".join(said.split())


@pytest.mark.long
def test_an_interrupt_of_two_processes_ends_in_a_sentence(tmp_path):
    command = [Path(sys.executable).parent / "anomalib", "train", "--config", config_file(tmp_path)]
    command += ["--trainer.strategy", "ddp", "--trainer.devices", "2", "--trainer.max_epochs", "1000"]
    with (tmp_path / "log").open("w") as log:
        run = subprocess.Popen(command, cwd=tmp_path, stdout=log, stderr=subprocess.STDOUT, start_new_session=True)
    try:
        while not list((tmp_path / "results").rglob("last.ckpt")) and run.poll() is None:
            time.sleep(0.5)
        os.killpg(run.pid, signal.SIGINT)  # what a terminal does
        assert run.wait(120) == 1
    finally:
        if run.poll() is None:
            os.killpg(run.pid, signal.SIGKILL)
    said = " ".join((tmp_path / "log").read_text().split())
    assert said.count("of several processes none sets thresholds then") == 1
    assert "pass it with --ckpt_path" in said
    assert "Traceback" not in said


@pytest.mark.long
def test_anomalib_s_command_line_keeps_the_seed(one, tmp_path):
    name = config_file(tmp_path)
    run_command("anomalib", "train", "--config", name, "--default_root_dir", "second", cwd=tmp_path)
    other = ["--default_root_dir", "third", "--seed_everything", "4"]
    run_command("anomalib", "train", "--config", name, *other, cwd=tmp_path)
    first, second, third = (results_of(folder)[0] for folder in (one, tmp_path / "second", tmp_path / "third"))
    assert all(torch.equal(first[key].nan_to_num(), second[key].nan_to_num()) for key in first)
    assert not all(torch.equal(first[key].nan_to_num(), third[key].nan_to_num()) for key in first)


@pytest.mark.parametrize(("images", "processes"), [(8, 2), (7, 3), (2, 4), (5, 1)])
def test_shares_make_up_the_batch(images, processes):
    vectors = torch.arange(images * 6.0).reshape(images, 3, 2)
    batch = VectorBatch([vectors], [torch.arange(3)], [vectors + 100], [(1, 3)])
    shares = [share_of_batch(batch, rank, processes) for rank in range(processes)]
    if images < processes:
        assert all(torch.equal(share.vectors[0], vectors) for share in shares)
        return
    weighted = torch.stack([share.weight * share.vectors[0].mean() for share in shares])
    torch.testing.assert_close(weighted.mean(), vectors.mean())
    rows = torch.cat([share.vectors[0] for share in shares])
    assert sorted(rows.flatten().tolist()) == vectors.flatten().tolist()
    for share in shares:
        assert torch.equal(share.noise[0], share.vectors[0] + 100)
        assert torch.equal(share.positions[0], batch.positions[0])
