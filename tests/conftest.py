"""What several test files share: small data, a quickly trained model, and where the real images and weights are.

What takes long to import is imported in functions: the process that hands tests out to the workers needs none of it.
"""

from __future__ import annotations

import ctypes
import functools
import gc
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

import psutil
import pytest
from filelock import FileLock

from .warm import OURS, WarmProcess

if TYPE_CHECKING:
    from collections.abc import Callable

    from anomalib.engine import Engine

    from cflow_plugin import CflowPlugin
    from cflow_plugin.data import Textures

# Two processes run the tests. If each computed in several threads, they would wait for each other most of the time.
os.environ.setdefault("OMP_NUM_THREADS", "1")

# Not to be imported here: a program of its own, for the system's Python, and what changes torch for the whole process.
collect_ignore = ["rtsp_camera.py", "pretended_device.py"]

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


# Tests that one worker has to itself: what they share takes long to make, or they would be in each other's way.
# xdist's own marks for that (3.8) have no effect with pytest 9.2.
TOGETHER = (
    r"test_ray\.py",  # one cluster at a time
    r"test_startup\.py",  # one warm process
    r"test_comparison\.py::test_(the_command|one_failure|a_killed)",
    r"test_distributed\.py::test_(two_processes|anomalib_s|an_interrupt)",
    r"test_post_processing\.py::test_(exports_decide|an_exported_model)",
)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Callable) -> object | None:
    from xdist.scheduler import LoadScopeScheduling

    if config.getvalue("dist") != "loadscope":
        return None

    class Scheduling(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            return next((group for group in TOGETHER if re.search(group, nodeid)), nodeid)

    return Scheduling(config, log)


def pytest_collection_finish() -> None:
    """Spare the garbage collector what imports have left for good: exporting makes it run some 200 times."""
    gc.collect()
    gc.freeze()


# Memory: two workers have to fit beside each other, with what they start.

HIGH = 1.5 * 2**30  # bytes
peaks = pytest.StashKey[dict[str, float]]()


def give_memory_back() -> None:
    """Let go of what is no longer referred to; the C library would keep it."""
    gc.collect()
    if sys.platform == "linux":
        ctypes.CDLL(None).malloc_trim(0)


def pytest_runtest_teardown(nextitem: pytest.Item | None) -> None:
    if nextitem is not None and psutil.Process().memory_info().rss > HIGH:
        give_memory_back()


def pytest_sessionfinish(session: pytest.Session) -> None:
    if warm_process.cache_info().currsize:
        warm_process().close()
    if hasattr(session.config, "workeroutput"):
        from cflow_plugin.commands.machine import peak_resident_bytes

        session.config.workeroutput["peak_memory"] = peak_resident_bytes() / 2**30


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node) -> None:
    found = getattr(node, "workeroutput", {})  # a worker that died has none
    node.config.stash.setdefault(peaks, {})[node.gateway.id] = found.get("peak_memory", float("nan"))


def pytest_terminal_summary(terminalreporter, config: pytest.Config) -> None:
    for worker, peak in sorted(config.stash.get(peaks, {}).items()):
        terminalreporter.write_line(f"{worker}: {peak:.2f} GiB of memory at most")


# What is made once


@pytest.fixture(scope="session")
def common(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that all workers of this run of the tests have in common."""
    own = tmp_path_factory.getbasetemp()
    return own.parent if "PYTEST_XDIST_WORKER" in os.environ else own


def once(folder: Path, make: Callable[[Path], object]) -> Path:
    """A folder of the common one, filled by the first worker that needs it."""
    with FileLock(folder.with_name(f".{folder.name}.lock")):
        if not folder.exists():
            partial = folder.with_name(f".{folder.name}.partial")
            partial.mkdir()
            make(partial)
            partial.rename(folder)
    return folder


def make_textures(root: Path, **settings: object) -> Textures:
    from cflow_plugin.data import Textures

    few = {"resolution": 64, "train_good": 12, "test_good": 4, "test_defect": 1, "val_good": 2, "val_defect": 1}
    return Textures(**{"root": root, "train_batch_size": 4, "eval_batch_size": 4, **few, **settings})


def make_engine(root: Path, **settings: object) -> Engine:
    from anomalib.engine import Engine

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
def checkpoint(textures: Textures, common: Path) -> Path:
    """The checkpoint that two short epochs of training wrote."""

    from lightning import seed_everything

    from cflow_plugin import CflowPlugin

    def train(folder: Path) -> None:
        seed_everything(0)
        make_engine(folder).fit(CflowPlugin(**QUICK, epochs=2, steps_per_epoch=5), datamodule=textures)
        [written] = {path.resolve() for path in folder.rglob("model.ckpt")}
        written.rename(folder / "model.ckpt")

    return once(common / "trained", train) / "model.ckpt"


@pytest.fixture(scope="session")
def trained(checkpoint: Path) -> CflowPlugin:
    """The trained model; not to be trained any further."""
    from cflow_plugin import CflowPlugin

    return CflowPlugin.load_from_checkpoint(checkpoint, map_location="cpu").eval()


@pytest.fixture(scope="session")
def export(trained: CflowPlugin, common: Path) -> Callable[..., Path]:
    """``export((64, 64))`` or ``export(None, "onnx")``: the trained model's file, made once, since it takes seconds."""

    def export(input_size: tuple[int, int] | None, kind: str = "openvino") -> Path:
        folder = common / f"{kind} {input_size}"
        once(folder, lambda passing: getattr(trained, f"to_{kind}")(passing, input_size=input_size))
        return next(folder.rglob("model.xml" if kind == "openvino" else "model.onnx"))

    return functools.cache(export)


@pytest.fixture(scope="session")
def trained_on_12_bits(common: Path) -> Path:
    """A folder with a checkpoint and files of a model for a grey camera, and what it was trained on."""
    from anomalib.data import Folder
    from lightning import seed_everything

    from cflow_plugin import CflowPlugin

    from .test_deep_images import folder_of

    def train(folder: Path) -> None:
        seed_everything(0)
        data = Folder(name="deep", root=folder_of(folder / "data", 26, 4095), normal_dir="good", num_workers=0)
        model = CflowPlugin(**QUICK, epochs=1, steps_per_epoch=3, visualizer=False, target_false_alarm_rate=0.2)
        engine = make_engine(folder / "runs")
        engine.fit(model, datamodule=data)
        engine.trainer.save_checkpoint(folder / "model.ckpt")
        for kind in ("openvino", "onnx", "torch"):
            getattr(model, f"to_{kind}")(folder)

    return once(common / "twelve bits", train)


@pytest.fixture(scope="session")
def converted(trained: CflowPlugin, common: Path) -> Path:
    """What compression begins with: the trained model in OpenVINO without decisions, made once."""

    def convert(folder: Path) -> None:
        import openvino

        from cflow_plugin.deploy.graph import convert_to_openvino

        openvino.save_model(convert_to_openvino(trained, (64, 64)), folder / "model.xml", compress_to_fp16=False)

    return once(common / "converted", convert) / "model.xml"


@pytest.fixture(scope="session")
def export_blind_to_black(export: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The trained model's file, changed so that an all-black image gets NaN and every other its own score."""
    import numpy as np
    import openvino
    import openvino.opset13 as opset

    model = openvino.Core().read_model(export(None))
    brightness = opset.reduce_mean(model.input(0), np.array([0, 1, 2, 3]), keep_dims=False)
    [result] = [result for result in model.get_results() if "pred_score" in result.output(0).get_names()]
    changed = opset.add(result.input_value(0), opset.log(opset.divide(brightness, brightness)))
    changed.output(0).set_names({"pred_score"})
    result.input(0).replace_source_output(changed.output(0))
    path = tmp_path_factory.mktemp("blind") / "model.xml"
    openvino.save_model(model, path, compress_to_fp16=False)
    return path


@pytest.fixture(scope="session")
def wheel(common: Path) -> Path:
    """This package's."""

    def build(folder: Path) -> None:
        run_command("python", "-m", "build", "--wheel", "--no-isolation", "--outdir", folder, ROOT, cwd=folder)

    [built] = once(common / "wheel", build).glob("cflow_plugin-*.whl")
    return built


@functools.cache
def warm_process() -> WarmProcess:
    return WarmProcess(OURS)


def run_command(
    *command: str | Path, cwd: Path, expect: int | None = 0, fresh: bool = False, **environment: str
) -> str:
    """Run a program of this environment as a user would, and return what it printed.

    Args:
        command: The program and its arguments.
        cwd: Folder to run it in.
        expect: Exit status, if it matters.
        fresh: In a process of its own from the start, and not in a copy of one that has its imports behind it.
        environment: More environment variables.
    """
    program = Path(sys.executable).parent / command[0]
    full = [str(program), *map(str, command[1:])]
    variables = {**os.environ, "COLUMNS": "200", **environment}
    if not fresh and command[0] in {"anomalib", "cflow-plugin"}:
        status, out = run_warm(full, cwd, variables)
    else:
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
        finished = subprocess.run(full, cwd=cwd, env=variables, **pipes, text=True)
        status, out = finished.returncode, finished.stdout
    if expect is not None:
        assert status == expect, out[-4000:]
    return out


def run_warm(full: list[str], cwd: Path, variables: dict[str, str]) -> tuple[int, str]:
    """Run a Python program's file (or ``-c`` and code) behind its imports; its exit status and what it printed."""
    with tempfile.NamedTemporaryFile("r", errors="replace") as log:
        status = warm_process().run(full, cwd, variables, Path(log.name))
        return status, log.read()


def call_in_a_copy(function: Callable, *arguments: object) -> None:
    """Call a function of a test file behind its imports, in a process of its own; it has no threads and may be forked.

    Args:
        function: What to call; its assertions count.
        arguments: What ``eval`` understands when ``repr`` has written it.
    """
    name = function.__name__
    code = f"import sys; sys.path.insert(0, {str(ROOT)!r}); from {function.__module__} import {name}; "
    status, out = run_warm(["-c", f"{code}{name}(*{arguments!r})"], ROOT, {**os.environ})
    assert status == 0, out[-4000:]


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
