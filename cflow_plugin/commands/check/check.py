"""Prove, before a file goes to the line, that it decides as it was trained to, in every runtime at hand."""

__all__ = ["check"]

import json
import logging
import math
from pathlib import Path
from typing import Any

import numpy as np
import openvino as ov
from rich import box
from rich.console import Console
from rich.table import Table

from cflow_plugin.commands.check.comparison import (
    Alarms,
    Pictures,
    Row,
    alarms_expected,
    compare,
    reference_scores_hold,
)
from cflow_plugin.commands.check.file import Finding, check_file, rate_of
from cflow_plugin.commands.check.runtimes import Precision, Runtime, runtimes_for
from cflow_plugin.commands.score.listing import list_images
from cflow_plugin.decisions.reference_scores import read_reference_scores
from cflow_plugin.deploy.fingerprint import RELEASE, size_of, size_of_pattern, stored_types
from cflow_plugin.deploy.runtime import bits_of, encoder_of, note_of, read_file
from cflow_plugin.errors import CflowError
from cflow_plugin.files import atomic_file

logger = logging.getLogger(__name__)

_DIFFERS = 3  # exit code; 1 is an error's, 2 a wrong command line's
_COMPRESSED = 0.2  # how far a compressed file's scores may lie from the trained model's: it has thresholds of its own
_OF_EIGHT_BITS = 0.02  # how far processors and runtimes differ in what they make of a file that computes in 8 bits
_RESIZED = 0.01  # how far a score is moved by rounding a resized image to whole numbers
_WIDE = 130  # columns of a screen on which a sentence fits beside the figures
_MARKS = {True: "[green]ok[/]", False: "[red]DIFFERS[/]", None: "[yellow]–[/]"}


def check(
    model: Path,
    checkpoint: Path | None = None,
    images: str | None = None,
    output: Path = Path("results/check.json"),
    tolerance: float = 1e-3,
    precisions: tuple[Precision, ...] = ("f32", "f16", "bf16"),
) -> None:
    """Check an exported file: whether it decides as it was trained to, in every runtime at hand.

    Images go through OpenVINO in f32, bf16 and f16, ONNX Runtime, openvino-model-api, anomalib's inferencers and torch,
    as far as they are installed and take the file. Scores, maps and decisions are compared with those of the
    checkpoint, or without one (and of a compressed file) with those of the file in OpenVINO and f32.

    Args:
        model: The .xml (or .onnx) file that ``anomalib export`` wrote. It is held against what it says of itself: its
            release, how images are scaled, its threshold, and its fingerprint, which is what it gave for a built-in
            pattern when it was exported. Then it runs in every runtime that is installed and takes it.
        checkpoint: The checkpoint that the file was made of, to compare with. The images that set its thresholds are
            then scored anew, if they lie where they did.
        images: Folder (or pattern in quotes) of good images that were not trained on, to compare on, and to count false
            alarms.
        output: JSON file for the results. The exit code is 3 if something differs, 0 if not.
        tolerance: Difference of scores and maps that counts as none in single precision. OpenVINO may differ by 0.005
            in f16 and by 0.1 in bf16, runtimes by 0.02 in INT8, and a compressed file by 0.2 from its checkpoint.
        precisions: What OpenVINO computes in, f32 in any case. Where a processor has bf16, OpenVINO takes it unless
            told otherwise; ``[f32]`` leaves out what is not used on the line.
    """
    if not 0 < tolerance < 1:
        message = f"--tolerance must lie between 0 and 1, got {tolerance}."
        raise CflowError(message)
    exported = _read(model)
    for name in ("anomalib", "model_api"):  # what they say of themselves is not of this file
        logging.getLogger(name).setLevel(logging.ERROR)
    trained = None if checkpoint is None else _load(checkpoint)
    files = [] if images is None else list_images(images)
    stored = read_reference_scores(model)
    types = stored_types(exported)
    is_compressed, in_eight_bits = types != ["f32"], "quantized" in types
    of_file = max(tolerance, _OF_EIGHT_BITS) if in_eight_bits else tolerance
    console = Console()
    findings = check_file(exported, stored, of_file)

    interpolation = encoder_of(exported).get("interpolation", "bilinear")
    sizes = size_of(exported), size_of_pattern(exported)
    pictures = Pictures(files, bits_of(exported), *sizes, interpolation, _transform_of(trained))
    reference_files = [] if trained is None else list(trained.reference.files)
    own = {Path(file).parts[-3:] for file in reference_files}  # wherever they lie now
    fresh = [pictures.patterns + index for index, file in enumerate(files) if Path(file).parts[-3:] not in own]
    rate = rate_of(exported)
    alarms = alarms_expected(fresh, None if stored is None else len(stored), rate)

    rows: list[Row] = []
    expected, single = None, []
    for runtime in runtimes_for(
        model.absolute(), exported, trained, trained is not None and not is_compressed, precisions
    ):
        allowed = max(of_file, runtime.rounding, _COMPRESSED if is_compressed and runtime.of_checkpoint else 0)
        row, results = compare(runtime, pictures, expected, allowed, alarms)
        expected = expected or results or None
        single = results if runtime.name == "OpenVINO f32" else single
        rows.append(row)

    again = _scores_of(runtimes_for(model.absolute(), exported)[0], trained, size_of(exported))
    scores = np.array([single[index].score for index in fresh]) if single else np.empty(0)
    allowed = of_file if pictures.size is None else max(of_file, _RESIZED)
    findings.append(reference_scores_hold(stored, again, scores, allowed))

    differs = any(part.agrees is False for part in [*findings, *rows])
    report = {
        "model": str(model.absolute()),
        "checkpoint": None if checkpoint is None else str(checkpoint.absolute()),
        "release": note_of(exported, RELEASE),
        "differs": differs,
        "reference": next((row.name for row in rows if row.agrees is not None), None),
        "tolerance": tolerance,
        "images": len(files),
        "patterns": pictures.patterns,
        "rate": rate,
        "good_images": len(fresh),
        "false_alarms_likely": None if alarms.low is None else [alarms.low, alarms.high],
        "file": [finding._asdict() for finding in findings],
        "runtimes": [row._asdict() for row in rows],
    }
    _write(output, report)
    _show(findings, rows, alarms, console)
    wrong = [
        part.what if isinstance(part, Finding) else part.name for part in [*findings, *rows] if part.agrees is False
    ]
    verdict = f"DIFFERS: {', '.join(wrong)}." if differs else "Nothing differs."
    logger.info("%s Results are in %s.", verdict, output.absolute())
    if differs:
        raise SystemExit(_DIFFERS)


def _read(path: Path) -> ov.Model:
    model, names = read_file(path)
    if not {"pred_score", "anomaly_map"} <= names:
        message = f"{path} gives {', '.join(sorted(names)) or 'nothing'} and no anomaly score: it is of another model."
        raise CflowError(message)
    return model


def _load(checkpoint: Path) -> Any:
    """The trained model."""
    from cflow_plugin.training.checkpoints import translate_errors  # only a checkpoint needs torch
    from cflow_plugin.training.lightning_model import CflowPlugin

    with translate_errors(checkpoint):
        return CflowPlugin.load_from_checkpoint(checkpoint, map_location="cpu").eval()


def _transform_of(trained: Any) -> Any:
    """What the data module did to images before the model saw them, as far as the checkpoint says so."""
    if trained is None:
        return None
    from cflow_plugin.images.loading import rebuilt

    try:
        return rebuilt(trained.reference.steps)
    except CflowError as error:
        logger.warning("Images are given to the file as they are. %s", error)
        return None


def _scores_of(runtime: Runtime, trained: Any, size: tuple[int, int] | None) -> np.ndarray | None:
    """A file's own scores of the images that set its thresholds, prepared as then, if they lie where they did."""
    if trained is None or not trained.reference.files:
        return None
    from torchvision.transforms.v2.functional import resize  # there with the checkpoint's torch

    try:
        images = trained.reference.find_again(None, len(trained.reference.files))
    except CflowError as error:
        logger.info("The images that set the thresholds are not scored again. %s", error)
        return None
    run, scores = runtime.open(), []
    for index in range(len(images)):
        image = images[index].image
        image = image if size is None else resize(image, list(size), antialias=True)
        scores.append(run(image.permute(1, 2, 0).flip(-1).numpy()).score)
    return np.array(scores)


def _write(path: Path, report: dict[str, Any]) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_file(path) as partial:
            partial.write_text(json.dumps(_finite(report), indent=2) + "\n", encoding="utf-8")
    except OSError as error:
        message = f"The results could not be written to {path} ({error.strerror or error}); name another --output."
        raise CflowError(message) from error


def _finite(value: Any) -> Any:
    """JSON has no infinity."""
    if isinstance(value, dict):
        return {key: _finite(part) for key, part in value.items()}
    if isinstance(value, list):
        return [_finite(part) for part in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def _show(findings: list[Finding], rows: list[Row], alarms: Alarms, console: Console) -> None:
    """Print the table; on a narrow screen its sentences stand below it."""
    table = Table(box=box.SIMPLE_HEAD)
    for title in ("", "checked"):
        table.add_column(title, no_wrap=True)
    for title in ("score", "map", "labels", "alarms", "ms"):
        table.add_column(title, justify="right", no_wrap=True)
    wide = console.width >= _WIDE
    if wide:
        table.add_column("found")
    for finding in findings:
        table.add_row(_MARKS[finding.agrees], finding.what, *[""] * 5, *[finding.detail] * wide)
    table.add_section()
    for row in rows:
        figures = [_figure(row.score, ".1e"), _figure(row.map, ".1e"), _figure(row.decisions, "d")]
        figures += [_figure(row.alarms, "d"), _figure(row.milliseconds, ".1f")]
        table.add_row(_MARKS[row.agrees], row.name, *figures, *[row.detail] * wide)
    console.print(table)
    if alarms.images:
        likely = "" if alarms.low is None else f", {alarms.low} to {alarms.high} are likely"
        console.print(f"Alarms are of {len(alarms.images)} good images{likely}.", soft_wrap=True, highlight=False)
    for part in [] if wide else [*findings, *rows]:
        console.print(f"{part[0]}: {part.detail}", soft_wrap=True, markup=False, highlight=False)


def _figure(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)
