"""Checkpoints that are damaged, of something else or cannot be written."""

import errno
import logging
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from cflow_plugin import CflowError, CflowPlugin
from cflow_plugin.files import atomic_file, atomic_folder
from cflow_plugin.training.checkpoints import CheckpointFiles, translate_errors

from .conftest import QUICK, make_engine, run_command, run_in_small_space, sentence_of
from .test_training import StopAfter


def changed(checkpoint, target, **entries):
    torch.save({**torch.load(checkpoint, weights_only=True), **entries}, target)
    return target


def uses(path, textures, folder):
    """The ways in which a checkpoint is read."""
    yield lambda: CflowPlugin.load_from_checkpoint(path)
    yield lambda: make_engine(folder).test(CflowPlugin(**QUICK), datamodule=textures, ckpt_path=path)


def test_any_part_of_a_file_is_refused(checkpoint, textures, tmp_path):
    data = checkpoint.read_bytes()
    for share in (0, 0.01, 0.3, 0.9, 0.999):
        path = tmp_path / "part.ckpt"
        path.write_bytes(data[: int(share * len(data))])
        for use in uses(path, textures, tmp_path):
            with pytest.raises(CflowError, match=r"part\.ckpt (could not be read|holds other objects)"):
                use()


def test_other_files_and_no_file(textures, tmp_path):
    (tmp_path / "text.ckpt").write_text("hello")
    torch.save([1, 2], tmp_path / "list.ckpt")
    for name, message in (("text", "text.ckpt"), ("list", "list.ckpt"), ("absent", "no checkpoint at")):
        for use in uses(tmp_path / f"{name}.ckpt", textures, tmp_path):
            with pytest.raises(CflowError, match=message):
                use()


def test_a_checkpoint_of_another_model(checkpoint, textures, tmp_path):
    state = {"model.gaussian.mean": torch.zeros(3)}
    path = changed(checkpoint, tmp_path / "padim.ckpt", state_dict=state, hyper_parameters={"backbone": "resnet18"})
    with pytest.raises(CflowError, match="of another kind of model"):
        make_engine(tmp_path).test(CflowPlugin(**QUICK), datamodule=textures, ckpt_path=path)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite(checkpoint, textures, tmp_path, value):
    state = torch.load(checkpoint, weights_only=True)["state_dict"]
    name = next(name for name in state if name.startswith("model.decoders") and state[name].is_floating_point())
    spoilt = state[name].clone()
    spoilt.view(-1)[-1] = value
    path = changed(checkpoint, tmp_path / "spoilt.ckpt", state_dict={**state, name: spoilt})
    for use in uses(path, textures, tmp_path):
        with pytest.raises(CflowError, match="NaN or infinite"):
            use()


@pytest.mark.parametrize(
    "settings",
    [
        {"layers": ["scale1"]},
        {"image_size": (96, 64)},
        pytest.param({"coupling_blocks": 3}, marks=pytest.mark.long),
        pytest.param({"condition_dims": 0}, marks=pytest.mark.long),
    ],
    ids=str,
)
def test_other_settings_than_the_checkpoint_s(checkpoint, trained, textures, tmp_path, caplog, settings):
    """The checkpoint's are taken, and that is said."""
    model = CflowPlugin(**{**QUICK, **settings, "visualizer": False})
    images = textures.root / "weave/test/good"
    with caplog.at_level(logging.INFO):
        batches = make_engine(tmp_path).predict(model, data_path=images, ckpt_path=checkpoint)
    assert f"The checkpoint was made with {next(iter(settings))}=" in caplog.text
    expected = make_engine(tmp_path).predict(trained, data_path=images)
    for ours, theirs in zip(batches, expected, strict=True):
        torch.testing.assert_close(ours.pred_score, theirs.pred_score)


def test_another_release(checkpoint, tmp_path, caplog):
    noted = torch.load(checkpoint, weights_only=True)["cflow_plugin"]
    made = noted["versions"]
    assert set(made) == {"anomalib", "cflow-plugin"}
    with caplog.at_level(logging.WARNING, logger="cflow_plugin.training.checkpoints"):
        CflowPlugin.load_from_checkpoint(checkpoint)
        assert not caplog.records
        path = changed(
            checkpoint, tmp_path / "old.ckpt", cflow_plugin={**noted, "versions": {**made, "anomalib": "2.3.1"}}
        )
        CflowPlugin.load_from_checkpoint(path)
    assert "made with anomalib 2.3.1" in caplog.text


def test_an_older_file_stays_until_the_new_one_is_complete(tmp_path, monkeypatch):
    path = tmp_path / "last.ckpt"
    files = CheckpointFiles()
    files.save_checkpoint({"state": torch.zeros(3)}, path)
    before = path.read_bytes()

    def fail(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "replace", fail)
    with pytest.raises(OSError, match="No space"):
        files.save_checkpoint({"state": torch.ones(3)}, path)
    assert path.read_bytes() == before
    assert [found.name for found in tmp_path.iterdir()] == ["last.ckpt"]


def test_replacing_leaves_nothing_behind(tmp_path):
    def write_half():
        with atomic_file(tmp_path / "file") as passing:
            passing.write_text("half")
            raise ValueError("enough")

    with pytest.raises(ValueError, match="enough"):
        write_half()
    assert not list(tmp_path.iterdir())


def test_files_that_belong_together_arrive_together(tmp_path):
    (tmp_path / "model.xml").write_text("old")
    (tmp_path / "model.bin").write_text("old")

    def write_half():
        with atomic_folder(tmp_path, "model.xml") as passing:
            (passing / "model.bin").write_text("half")
            raise ValueError("enough")

    with pytest.raises(ValueError, match="enough"):
        write_half()
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {"model.xml": "old", "model.bin": "old"}
    (tmp_path / ".model.xml.0.partial").mkdir()  # a killed run's
    seen = []
    with atomic_folder(tmp_path, "model.xml") as passing:
        for name in ("model.xml", "model.bin"):
            (passing / name).write_text("new")
        seen = sorted(path.name for path in tmp_path.iterdir() if not path.name.startswith("."))
    assert seen == ["model.bin", "model.xml"]
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {"model.xml": "new", "model.bin": "new"}


@pytest.mark.parametrize(("free", "expected"), [(1000, OSError), (10**9, RuntimeError)])
def test_a_full_disk_is_named_whatever_a_library_says(tmp_path, monkeypatch, free, expected):
    monkeypatch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=free))
    with pytest.raises(expected) as caught, atomic_folder(tmp_path, "model.xml"):
        raise RuntimeError("basic_ios::clear: iostream error")
    assert (caught.value.args[0] == errno.ENOSPC) == (expected is OSError)
    assert not list(tmp_path.iterdir())


def test_the_file_that_others_are_found_by_is_never_there_with_another_s(tmp_path, monkeypatch):
    for name in ("model.xml", "model.bin"):
        (tmp_path / name).write_text("old")
    moves = []
    replace = Path.replace

    def watch(source, target):
        moves.append({path.name: path.read_text() for path in tmp_path.glob("model.*")})
        replace(source, target)

    monkeypatch.setattr(Path, "replace", watch)
    with atomic_folder(tmp_path, "model.xml") as passing:
        for name in ("model.xml", "model.bin"):
            (passing / name).write_text("new")
    assert moves == [{"model.bin": "old"}, {"model.bin": "new"}]


@pytest.mark.long
def test_a_killed_training_goes_on_to_the_same_weights(textures, tmp_path):
    command = [
        "anomalib", "train", "--model", "CflowPlugin", "--model.backbone", "gabor",
        "--model.layers", "[scale1]", "--model.image_size", "[64, 64]", "--model.coupling_blocks", "2",
        "--model.vectors_per_step", "64", "--model.epochs", "20", "--model.steps_per_epoch", "15",
        "--seed_everything", "3", "--data", "Textures", "--data.root", textures.root, "--data.resolution", "64",
        "--data.train_good", "12", "--data.test_good", "4", "--data.test_defect", "1", "--data.val_good", "2",
        "--data.val_defect", "1",
    ]  # fmt: skip
    folders = [tmp_path / "whole", tmp_path / "killed"]
    for folder in folders:
        folder.mkdir()
    run_command(*command, cwd=folders[0])
    with (tmp_path / "log.txt").open("w") as log:
        program = Path(sys.executable).with_name(command[0])
        process = subprocess.Popen(
            [program, *command[1:]], cwd=folders[1], stdout=log, stderr=log, start_new_session=True
        )
        while process.poll() is None and not (found := list(folders[1].rglob("last.ckpt"))):
            time.sleep(0.02)
        os.killpg(process.pid, signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
    [last] = {path.resolve() for path in found}
    assert CheckpointFiles().load_checkpoint(last)["epoch"] < 19
    run_command(*command, "--ckpt_path", last, cwd=folders[1])
    states, metrics = [], []
    for folder in folders:
        [path] = folder.glob("results/CflowPlugin/Textures/weave/latest/weights/lightning/model.ckpt")
        states.append(torch.load(path, weights_only=True)["state_dict"])
        metrics.append((path.parents[2] / "metrics.json").read_text())
    assert metrics[0] == metrics[1]
    assert states[0].keys() == states[1].keys()
    for name, value in states[0].items():
        torch.testing.assert_close(states[1][name], value, rtol=0, atol=0, equal_nan=True, msg=name)
    assert not list(folders[1].rglob("*.partial"))


@pytest.mark.long
def test_what_was_trained_is_tested(textures, tmp_path):
    """anomalib's ``Engine.train`` would test the checkpoint that training went on from."""
    settings = {**QUICK, "steps_per_epoch": 10, "visualizer": False}
    make_engine(tmp_path / "begun", callbacks=[StopAfter(1)]).fit(
        CflowPlugin(**settings, epochs=3, target_false_alarm_rate=0.25), datamodule=textures
    )
    [last] = (tmp_path / "begun").rglob("last.ckpt")
    model, engine = CflowPlugin(**settings, epochs=3, target_false_alarm_rate=0.25), make_engine(tmp_path / "run")
    [metrics] = engine.train(model, datamodule=textures, ckpt_path=last)
    [checkpoint] = {path.resolve() for path in (tmp_path / "run").rglob("model.ckpt")}
    trained = torch.load(checkpoint, weights_only=True)["state_dict"]
    for name, value in model.state_dict().items():
        torch.testing.assert_close(value, trained[name], rtol=0, atol=0, equal_nan=True, msg=name)
    fresh = CflowPlugin.load_from_checkpoint(checkpoint)
    [expected] = make_engine(tmp_path / "test").test(fresh, datamodule=textures)
    assert metrics == pytest.approx(expected)
    # Asked for by name, another state is tested.
    other = torch.load(last, weights_only=True)
    name = next(name for name in other["state_dict"] if "subnet" in name)
    other["state_dict"][name] += 1
    torch.save(other, tmp_path / "other.ckpt")
    engine.test(model, datamodule=textures, ckpt_path=tmp_path / "other.ckpt")
    assert torch.equal(model.state_dict()[name], other["state_dict"][name])


def test_a_run_that_goes_on_needs_no_weights_file(textures, tmp_path):
    settings = {"backbone": "resnet18", "layers": ["layer1"], "image_size": (64, 64), "coupling_blocks": 1, "epochs": 2}
    settings |= {"steps_per_epoch": 2, "visualizer": False}
    begun = CflowPlugin(**settings, pre_trained=False)
    make_engine(tmp_path / "begun", callbacks=[StopAfter(1)]).fit(begun, datamodule=textures)
    [last] = (tmp_path / "begun").rglob("last.ckpt")
    model = CflowPlugin(**settings, weights="absent.pth")
    make_engine(tmp_path / "run").fit(model, datamodule=textures, ckpt_path=last)
    for name, value in begun.model.encoder.state_dict().items():
        assert torch.equal(model.model.encoder.state_dict()[name], value), name
    with pytest.raises(CflowError, match="no weights file"):
        make_engine(tmp_path / "new").fit(CflowPlugin(**settings, weights="absent.pth"), datamodule=textures)


def test_a_run_resumed_after_its_last_epoch_leaves_a_model(textures, tmp_path):
    settings = {**QUICK, "epochs": 2, "steps_per_epoch": 3, "visualizer": False}
    make_engine(tmp_path / "first").train(CflowPlugin(**settings), datamodule=textures)
    [last] = (tmp_path / "first").rglob("last.ckpt")
    make_engine(tmp_path / "second").train(CflowPlugin(**settings), datamodule=textures, ckpt_path=last)
    states = []
    for folder in ("first", "second"):
        [path] = {path.resolve() for path in (tmp_path / folder).rglob("model.ckpt")}
        states.append(torch.load(path, weights_only=True)["state_dict"])
    assert states[0].keys() == states[1].keys()
    for name, value in states[0].items():
        torch.testing.assert_close(states[1][name], value, rtol=0, atol=0, equal_nan=True, msg=name)


@pytest.mark.long
def test_a_full_disk_ends_training_in_asentence_of(textures, tmp_path):
    program = Path(sys.executable).with_name("anomalib")
    result = run_in_small_space(
        tmp_path, "400k",
        [program, "train", "--model", "CflowPlugin", "--model.backbone", "gabor", "--model.epochs", "1",
         "--data", "Textures", "--data.root", textures.root, "--data.resolution", "64", "--data.train_good", "12",
         "--data.test_good", "4", "--data.test_defect", "1", "--data.val_good", "2", "--data.val_defect", "1"],
    )  # fmt: skip
    sentence = sentence_of(result)
    assert "No space left on device" in sentence
    assert "Free some space" in sentence


@pytest.mark.long
def test_a_folder_that_cannot_be_written_to(textures, tmp_path):
    """Read-only for everybody, root too."""
    program = Path(sys.executable).with_name("anomalib")
    result = run_in_small_space(
        tmp_path, "400k",
        ["sh", "-c", "mount -o remount,ro . && exec \"$@\"", "sh", program, "train", "--model", "CflowPlugin",
         "--model.backbone", "gabor", "--data", "Textures", "--data.root", textures.root],
    )  # fmt: skip
    sentence = sentence_of(result)
    assert "Read-only file system" in sentence
    assert "--default_root_dir" in sentence


def test_the_run_before_one_that_failed_is_named(tmp_path):
    for number in range(3):
        (tmp_path / f"bottle/v{number}/weights").mkdir(parents=True)
    for number in range(2):
        (tmp_path / f"bottle/v{number}/weights/model.ckpt").touch()
        os.utime(tmp_path / f"bottle/v{number}/weights/model.ckpt", (number, number))
    (tmp_path / "bottle/latest").symlink_to("v2")
    with (
        pytest.raises(CflowError, match=r"an earlier one has .*bottle/v1/weights/model\.ckpt"),
        translate_errors(tmp_path / "bottle/latest/weights/model.ckpt"),
    ):
        pass
