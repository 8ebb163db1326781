"""Runs killed at random moments, and disks that fill up: what is left of a run, and what becomes of the next start.

    python benchmarks/faults.py --tries 20

Training, the calibration on held-out images, export, comparison and the scoring of a collection each run once
undisturbed, on small procedural textures. Then each is started again and again and fails, either

- *killed* by SIGKILL, with all its processes, at a random moment after its first file appeared (calibration: after it
  began), or
- with a *full disk*: it writes to a file system of a random size, smaller than what it needs (Linux; nothing of it is
  seen outside).

After that it is started once more. Counted are the failed run's files that bear a final name and cannot be read, full
disks that were not answered by one sentence and a non-zero exit code, and the second starts that end with the
undisturbed run's result: equal weights, equal figures, equal scores.
"""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import onnx
import openvino as ov
import pandas as pd
import torch
import yaml
from jsonargparse import auto_cli
from rich import box
from rich.progress import Progress
from rich.table import Table
from training import publish

BIN = Path(sys.executable).parent
TEXTURES = {
    "category": "weave", "resolution": 64, "train_good": 12, "test_good": 4, "test_defect": 1, "val_good": 2,
    "val_defect": 1,
}  # fmt: skip
MODEL = {"backbone": "gabor", "layers": ["scale1", "scale2"], "image_size": [64, 64], "coupling_blocks": 2}
READERS: dict[str, Callable[[Path], object]] = {
    ".ckpt": lambda file: torch.load(file, weights_only=True)["state_dict"],
    ".csv": pd.read_csv,
    ".json": lambda file: json.loads(file.read_text()),
    ".npz": lambda file: dict(np.load(file).items()),
    ".onnx": lambda file: onnx.checker.check_model(onnx.load(file)),
    ".parquet": pd.read_parquet,
    ".xml": lambda file: ov.Core().read_model(file),
}


@dataclass
class Scenario:
    """A command that is killed.

    Attributes:
        name: What it is called in the table.
        command: The command, run in a folder of its own.
        result: What comes out of it, read from that folder; two runs' are compared.
        resume: More arguments for the second start, found in the folder.
        begins: What it says when the moments to kill it at begin; by default they begin with its first file.
    """

    name: str
    command: list[str]
    result: Callable[[Path], dict[str, np.ndarray]]
    resume: Callable[[Path], list[str]] = lambda _: []
    begins: str | None = None

    def has_begun(self, folder: Path) -> bool:
        """Whether the moments to kill it at have begun."""
        if self.begins is not None:
            return self.begins in (folder / "log.txt").read_text(errors="replace")
        return sum(1 for file in folder.rglob("*") if file.is_file()) > 1  # the log


def damaged(folder: Path) -> list[str]:
    """Files with a final name that cannot be read."""
    found = []
    for file in folder.rglob("*"):
        if any(part.startswith(".") for part in file.relative_to(folder).parts) or file.suffix not in READERS:
            continue
        try:
            READERS[file.suffix](file)
        except Exception as error:  # a damaged file fails in any way
            found.append(f"{file.name}: {type(error).__name__}")
    return found


def start(command: list[str], folder: Path) -> subprocess.Popen:
    """Start a command in a session of its own, so that all its processes can be killed at once."""
    log = (folder / "log.txt").open("a")
    return subprocess.Popen(command, cwd=folder, stdout=log, stderr=log, start_new_session=True)


def kill(scenario: Scenario, seconds: float, folder: Path) -> dict:
    """Start a command and kill it within so many seconds after the moments for it have begun."""
    process = start(scenario.command, folder)
    while process.poll() is None and not scenario.has_begun(folder):
        time.sleep(0.02)
    try:
        process.wait(random.uniform(0, seconds))
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        return {"failed": True, "answered": True}
    return {"failed": False, "answered": True}


IN_SMALL_SPACE = """
size=$1 small=$2 kept=$3; shift 3
mount -t tmpfs -o size="$size" tmpfs "$small" || exit 99
cd "$small" || exit 99
"$@"
status=$?
cp -a . "$kept"
exit $status
"""


def fill(scenario: Scenario, needed: int, folder: Path) -> dict:
    """Run a command in a file system of less than it needs, in a mount namespace of its own; what it wrote is kept."""
    size = int(random.uniform(0.02, 0.98) * needed)
    with tempfile.TemporaryDirectory() as small, (folder / "log.txt").open("w") as log:
        command = ["unshare", "-rm", "sh", "-c", IN_SMALL_SPACE, "sh", str(size), small, str(folder), *scenario.command]
        status = subprocess.run(command, stdout=log, stderr=log, check=False).returncode
    if status == 99:
        message = "A file system of a chosen size cannot be made here; that takes Linux with user namespaces."
        raise SystemExit(message)
    text = (folder / "log.txt").read_text(errors="replace")
    last = text.strip().splitlines()[-1]
    return {
        "failed": status != 0,
        "answered": status == 0 or ("Traceback" not in text and last.startswith("error: ")),
        "words": last,
    }


def try_once(scenario: Scenario, fail: Callable[[Path], dict], expected: dict[str, np.ndarray], folder: Path) -> dict:
    """Let it fail, look, start again, compare."""
    folder.mkdir()
    happened = fail(folder)
    broken = damaged(folder)
    status = start([*scenario.command, *scenario.resume(folder)], folder).wait()
    same = status == 0 and _equal(scenario.result(folder), expected)
    shutil.rmtree(folder)
    return {**happened, "damaged": broken, "status": status, "same": same}


def _equal(found: dict[str, np.ndarray], expected: dict[str, np.ndarray]) -> bool:
    return found.keys() == expected.keys() and all(
        np.array_equal(found[key], expected[key], equal_nan=found[key].dtype.kind == "f") for key in expected
    )


def _weights(folder: Path) -> dict[str, np.ndarray]:
    [file] = {path.resolve() for path in folder.glob("results/CflowPlugin/*/*/latest/weights/lightning/model.ckpt")}
    state = torch.load(file, weights_only=True)["state_dict"]
    metrics = json.loads((file.parents[2] / "metrics.json").read_text())
    return {name: np.asarray(value) for name, value in {**state, **metrics}.items()}


def _last_checkpoint(folder: Path) -> list[str]:
    files = sorted(folder.glob("results/**/checkpoints/last.ckpt"), key=lambda file: file.stat().st_mtime)
    return ["--ckpt_path", str(files[-1])] if files else []


def _outputs(file: str) -> Callable[[Path], dict[str, np.ndarray]]:
    def read(folder: Path) -> dict[str, np.ndarray]:
        model = ov.Core().compile_model(folder / file, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
        image = np.random.default_rng(0).random((1, 3, 64, 64), np.float32)
        return {str(number): value for number, value in enumerate(model(image).values())}

    return read


def _rows(folder: Path) -> dict[str, np.ndarray]:
    table = pd.read_csv(folder / "out/results.csv").sort_values("key")
    columns = ("key", "image_AUROC", "pixel_AUROC", "pixel_AUPRO")
    return {column: table[column].to_numpy() for column in columns}


def _scores(folder: Path) -> dict[str, np.ndarray]:
    table = pd.read_parquet(folder / "scores").sort_values("path")
    return {column: table[column].to_numpy() for column in ("path", "score", "anomalous")}


def scenarios(home: Path) -> list[Scenario]:
    """The commands, after what they need has been made below ``home``."""
    config = {
        "seed_everything": 0,
        "model": {"class_path": "CflowPlugin", "init_args": {**MODEL, "epochs": 20, "steps_per_epoch": 20}},
        "data": {"class_path": "Textures", "init_args": {**TEXTURES, "root": str(home / "textures")}},
    }
    (home / "train.yaml").write_text(yaml.safe_dump(config))
    train = [str(BIN / "anomalib"), "train", "--config", str(home / "train.yaml")]
    start(train, home).wait()
    [checkpoint] = home.glob("results/CflowPlugin/*/*/latest/weights/lightning/model.ckpt")
    export = [str(BIN / "anomalib"), "export", "--model", "CflowPlugin", "--ckpt_path", str(checkpoint)]
    export += ["--export_root", ".", "--input_size", "[64, 64]", "--export_type"]
    start([*export, "openvino"], home).wait()
    compare = {
        "data": [{"name": "Textures", "categories": ["weave"], "settings": config["data"]["init_args"]}],
        "models": [],
        "variants": {
            f"{epochs} epochs": {"model": "CflowPlugin", "settings": {**MODEL, "epochs": epochs}}
            for epochs in (1, 2, 3)
        },
        "encoders": [{"backbone": "gabor"}],
        "output": "out",
    }
    (home / "compare.yaml").write_text(yaml.safe_dump(compare))
    held_out = {**config["model"]["init_args"], "epochs": 2, "target_false_alarm_rate": 0.05}
    held_out["held_out_images"] = str(home / "images")
    (home / "calibrate.yaml").write_text(
        yaml.safe_dump({**config, "model": {"class_path": "CflowPlugin", "init_args": held_out}})
    )
    calibrate = [str(BIN / "anomalib"), "train", "--config", str(home / "calibrate.yaml")]
    images = home / "images"
    images.mkdir()
    originals = sorted((home / "textures").rglob("*good/*.png"))
    for number in range(2000):
        shutil.copy(originals[number % len(originals)], images / f"{number}.png")
    ours = str(BIN / "cflow-plugin")
    score = [ours, "score", "--model", str(home / "weights/openvino/model.xml"), "--source", str(images)]
    return [
        Scenario("training and test", train, _weights, _last_checkpoint),
        Scenario("calibration on 2,000 images", calibrate, _weights, _last_checkpoint, "for the thresholds"),
        Scenario("export to OpenVINO", [*export, "openvino"], _outputs("weights/openvino/model.xml")),
        Scenario("export to ONNX", [*export, "onnx"], _outputs("weights/onnx/model.onnx")),
        Scenario("comparison of three models", [ours, "compare", "--config", str(home / "compare.yaml")], _rows),
        Scenario("scoring 2,000 images", [*score, "--output", "scores", "--batch", "20"], _scores),
    ]


def main(tries: int = 20, seed: int = 0, output: Path = Path("results/benchmarks/faults")) -> None:
    """Let commands fail at random moments, and write what became of them as JSON and Markdown.

    Args:
        tries: How often each command fails in each way.
        seed: Seed of the moments and sizes.
        output: Folder for the results.
    """
    output = output.resolve()
    random.seed(seed)
    table = Table(
        "command", "fault", "failed", "files damaged", "no clear sentence", "second starts with the same result",
        box=box.MARKDOWN,
    )  # fmt: skip
    rows = []
    with tempfile.TemporaryDirectory() as folder, Progress() as progress:
        home = Path(folder)
        task = progress.add_task("Preparing", total=None)
        prepared = scenarios(home)
        progress.update(task, total=2 * tries * len(prepared))
        for scenario in prepared:
            progress.update(task, description=scenario.name)
            expected, seconds, needed = run_undisturbed(scenario, home / "undisturbed")
            faults: dict[str, Callable[[Path], dict]] = {
                "killed": partial(kill, scenario, seconds),
                "disk full": partial(fill, scenario, needed),
            }
            for fault, fail in faults.items():
                results = []
                for number in range(tries):
                    results.append(try_once(scenario, fail, expected, home / f"try {number}"))
                    progress.advance(task)
                failed, answered, same = (
                    sum(result[key] for result in results) for key in ("failed", "answered", "same")
                )
                broken = sum(len(result["damaged"]) for result in results)
                table.add_row(
                    scenario.name, fault, str(failed), str(broken), str(tries - answered), f"{same} of {tries}"
                )
                rows.append({"command": scenario.name, "fault": fault, "tries": results})
    publish("faults", table, {"seed": seed, "rows": rows}, output)


def run_undisturbed(scenario: Scenario, folder: Path) -> tuple[dict[str, np.ndarray], float, int]:
    """Run a command to its end: its result, the seconds in which it may be killed, and the bytes that it writes."""
    folder.mkdir()
    process = start(scenario.command, folder)
    while process.poll() is None and not scenario.has_begun(folder):
        time.sleep(0.02)
    begun = time.monotonic()
    process.wait()
    seconds = time.monotonic() - begun
    expected = scenario.result(folder)
    needed = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file() and not file.is_symlink())
    shutil.rmtree(folder)
    return expected, seconds, needed


if __name__ == "__main__":
    auto_cli(main, as_positional=False)
