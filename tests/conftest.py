"""What several test files share: small data, a quickly trained model, and where the real images and weights are."""

from __future__ import annotations

import functools
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

# Two processes run the tests. If each computed in several threads, they would wait for each other most of the time.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np  # noqa: E402
import openvino  # noqa: E402
import openvino.opset13 as opset  # noqa: E402
import pytest  # noqa: E402
from anomalib.engine import Engine  # noqa: E402
from lightning import seed_everything  # noqa: E402

from cflow_plugin import CflowPlugin  # noqa: E402
from cflow_plugin.data import Textures  # noqa: E402

ROOT = Path(__file__).parent.parent
SHARED = Path(os.environ.get("CFLOW_SHARED", ROOT.parent / "shared"))

# A model that trains in seconds: few cells, short vectors, no download.
QUICK = {"backbone": "gabor", "layers": ["scale1", "scale2"], "image_size": (64, 64), "coupling_blocks": 2}

ROOM = 2 * 2**30  # bytes that the tests may need at a time


def pytest_sessionstart() -> None:
    folder = tempfile.gettempdir()
    if shutil.disk_usage(folder).free < ROOM:
        pytest.exit(f"The tests need {ROOM / 2**30:.0f} GiB of disk in {folder}; or set TMPDIR.", returncode=3)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if not SHARED.is_dir():
        skip = pytest.mark.skip(reason=f"no real images and weights at {SHARED}; set CFLOW_SHARED")
        for item in items:
            if "shared" in item.keywords:
                item.add_marker(skip)


def make_textures(root: Path, **settings: object) -> Textures:
    few = {"resolution": 64, "train_good": 12, "test_good": 4, "test_defect": 1, "val_good": 2, "val_defect": 1}
    return Textures(**{"root": root, "train_batch_size": 4, "eval_batch_size": 4, **few, **settings})


def make_engine(root: Path, **settings: object) -> Engine:
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu", "logger": False}
    return Engine(default_root_dir=root, **{**quiet, **settings})


@pytest.fixture(scope="session")
def textures(tmp_path_factory: pytest.TempPathFactory) -> Textures:
    """A small data set, with defects and masks."""
    datamodule = make_textures(tmp_path_factory.mktemp("textures"))
    datamodule.prepare_data()
    datamodule.setup()
    return datamodule


@pytest.fixture(scope="session")
def trained(textures: Textures, tmp_path_factory: pytest.TempPathFactory) -> CflowPlugin:
    """A model trained for two short epochs; not to be trained any further."""
    seed_everything(0)
    model = CflowPlugin(**QUICK, epochs=2, steps_per_epoch=5)
    make_engine(tmp_path_factory.mktemp("trained")).fit(model, datamodule=textures)
    return model.eval()


@pytest.fixture(scope="session")
def export(trained: CflowPlugin, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """``export((64, 64))`` and ``export(None)`` give the trained model's OpenVINO file, each made once."""
    return functools.cache(
        lambda input_size: trained.to_openvino(tmp_path_factory.mktemp("exported"), input_size=input_size)
    )


@pytest.fixture(scope="session")
def export_blind_to_black(export: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The trained model's file, changed so that an all-black image gets NaN and every other its own score."""
    model = openvino.Core().read_model(export((64, 64)))
    brightness = opset.reduce_mean(model.input(0), np.array([0, 1, 2, 3]), keep_dims=False)
    [result] = [result for result in model.get_results() if "pred_score" in result.output(0).get_names()]
    changed = opset.add(result.input_value(0), opset.log(opset.divide(brightness, brightness)))
    changed.output(0).set_names({"pred_score"})
    result.input(0).replace_source_output(changed.output(0))
    path = tmp_path_factory.mktemp("blind") / "model.xml"
    openvino.save_model(model, path, compress_to_fp16=False)
    return path


@pytest.fixture(scope="session")
def checkpoint(trained: CflowPlugin, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The trained model's checkpoint, as training writes it."""
    path = tmp_path_factory.mktemp("checkpoint") / "model.ckpt"
    engine = make_engine(path.parent)
    engine._setup_trainer(trained)
    engine.trainer.strategy.connect(trained)
    engine.trainer.save_checkpoint(path, weights_only=True)
    return path


def run_command(*command: str | Path, cwd: Path, expect: int | None = 0, **environment: str) -> str:
    """Run a program of this environment as a user would, and return what it printed."""
    program = Path(sys.executable).parent / command[0]
    finished = subprocess.run(
        [program, *map(str, command[1:])],
        cwd=cwd,
        env={**os.environ, "COLUMNS": "200", **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=900,
    )
    if expect is not None:
        assert finished.returncode == expect, finished.stdout[-4000:]
    return finished.stdout


def run_in_small_space(folder, size: str, command: list) -> subprocess.CompletedProcess:
    """Run a command in a mount namespace of its own, where a folder is a file system of that size."""
    if shutil.which("unshare") is None:
        pytest.skip("there is no unshare here")
    script = f'mount -t tmpfs -o size={size} tmpfs {folder} && cd {folder} && exec "$@"'
    result = subprocess.run(
        ["unshare", "-rm", "sh", "-c", script, "sh", *map(str, command)], capture_output=True, text=True, timeout=600
    )
    if "unshare" in result.stderr or "mount:" in result.stderr:
        pytest.skip(f"a small file system cannot be made here: {result.stderr.strip()[:80]}")
    return result


def sentence_of(result: subprocess.CompletedProcess) -> str:
    """The one sentence that a failed command ends in."""
    assert result.returncode == 1
    assert "Traceback" not in result.stderr
    last = result.stderr.strip().splitlines()[-1]
    assert last.startswith("error: ")
    return last
