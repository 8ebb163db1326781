"""Say when new images no longer score as the reference images did: the camera, the light or the process has changed."""

__all__ = ["monitor"]

import csv
import json
import logging
import math
import tempfile
from pathlib import Path

import numpy as np
from rich.progress import track

from cflow_plugin.commands.watch import watch
from cflow_plugin.decisions.exchangeability import ExchangeabilityTest
from cflow_plugin.decisions.reference_scores import read_reference_scores
from cflow_plugin.decisions.score_tables import History, is_history, read_history, read_scores
from cflow_plugin.errors import CflowError
from cflow_plugin.files import atomic_file

logger = logging.getLogger(__name__)

_CHANGED = 3  # exit code; 1 is an error's, 2 a wrong command line's


def monitor(
    recent: Path | list[Path],
    reference: Path,
    error_rate: float = 0.01,
    output: Path = Path("results/monitor"),
    seed: int = 0,
) -> None:
    """Say when new images no longer score as good ones did: the camera, light or process has changed.

    A moved camera, an ageing lamp or another batch of material shift the scores of good parts, and with them the
    false-alarm rate, long before anybody notices. Defects count as what they are, unusual: a share of them that grows
    is a change, too; give the scores of parts known to be good to leave them out of it. Neighbouring frames of a video
    resemble each other, which looks like a change as well: give frames that are far apart.

    Args:
        recent: Table of scores, oldest first: the scores.csv of `cflow-plugin watch` (also while it is being written),
            any .csv with a column "score", or the folder that `cflow-plugin score` wrote (images then come in the
            order of their names). Several tables are one history, oldest first: --recent '[may.csv, june.csv]'; the
            output folder of `watch` is the history of all its tables. A folder of images, too, if the reference is an
            exported model; they go through it by name.
        reference: What the good parts' scores were: an exported model (.xml, .onnx) or checkpoint (.ckpt) trained with
            target_false_alarm_rate, or a table of the same model's scores of other good parts.
        error_rate: Highest probability of a false alarm, over the whole history: however long it is, and however often
            the command is repeated while it grows. So give the whole history since the model was put to use; with the
            newest table alone, the probability is each table's.
        output: Folder for the results: monitor.json (the verdict; the exit code is 3 if something has changed, 0 if
            not), monitor.csv (each image's p-value and the evidence so far) and monitor.png (both as a plot).
        seed: Seed that breaks ties between equal scores.
    """
    if not 0 < error_rate < 1:
        message = f"--error_rate must lie between 0 and 1, got {error_rate}."
        raise CflowError(message)
    expected = read_reference_scores(reference)
    if expected is None:
        message = (
            f"{reference} holds no reference scores: train with --model.target_false_alarm_rate, or give "
            "a table of good parts' scores (--reference scores.csv), as `cflow-plugin watch` writes it."
        )
        raise CflowError(message)
    names, scores, _ = _recent_scores([recent] if isinstance(recent, Path) else recent, reference, expected)
    test = ExchangeabilityTest(expected, seed)
    p_values, evidence = [], []
    for score in track(scores, "Comparing", transient=True):
        p_values.append(test.update(score))
        evidence.append(test.log_capital / math.log(10))
    limit = -math.log10(error_rate)
    alarm = next((index for index, value in enumerate(evidence) if value >= limit), None)
    verdict = {
        "changed": alarm is not None,
        "alarm_at_image": None if alarm is None else names[alarm],
        "alarm_after_images": None if alarm is None else alarm + 1,
        "error_rate": error_rate,
        "highest_evidence_log10": max(evidence),
        "images": len(scores),
        "reference_images": len(expected),
        "median_score": float(np.median(scores)),
        "reference_median_score": float(np.median(expected)),
    }
    _write_results(output, names, scores, p_values, evidence, verdict)
    _plot(scores, expected, evidence, limit, alarm, output / "monitor.png")
    logger.info("%s Results are in %s.", _sentence(verdict), output.resolve())
    if alarm is not None:
        raise SystemExit(_CHANGED)


def _recent_scores(recent: list[Path], reference: Path, expected: np.ndarray) -> History:
    images = [source for source in recent if source.is_dir() and not is_history(source)]
    if not images:
        return read_history(recent, expected)
    if len(recent) > 1:
        message = f"{images[0]} holds no table of scores: give tables, or one folder of images alone."
        raise CflowError(message)
    if reference.suffix.lower() not in {".xml", ".onnx"}:
        message = f"To score the images in {images[0]} an exported model is needed: --reference model.xml."
        raise CflowError(message)
    with tempfile.TemporaryDirectory() as folder:
        watch(reference, str(images[0]), Path(folder), overlays=False)
        return read_scores(Path(folder) / "scores.csv")


def _sentence(verdict: dict) -> str:
    medians = f"median score {verdict['median_score']:.3f}, {verdict['reference_median_score']:.3f} in the reference"
    if not verdict["changed"]:
        return (
            f"No change: {verdict['images']} images score as the {verdict['reference_images']} good ones ({medians})."
        )
    when = f"after {verdict['alarm_after_images']} of {verdict['images']} images ({verdict['alarm_at_image']})"
    return (
        f"CHANGED: {when} the scores no longer fit the {verdict['reference_images']} good ones ({medians}). Check the "
        "camera, the light and the parts; if the change is meant to stay, train anew."
    )


def _write_results(
    folder: Path, names: list[str], scores: np.ndarray, p_values: list[float], evidence: list[float], verdict: dict
) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with atomic_file(folder / "monitor.csv") as partial, partial.open("w", newline="", encoding="utf-8") as file:
            table = csv.writer(file)
            table.writerow(["image", "score", "p_value", "evidence_log10"])
            for row in zip(names, scores, p_values, evidence, strict=True):
                table.writerow([row[0], *(f"{value:.6f}" for value in row[1:])])
        with atomic_file(folder / "monitor.json") as partial:
            partial.write_text(json.dumps(verdict, indent=2) + "\n", encoding="utf-8")
    except OSError as error:
        message = f"The results could not be written to {folder} ({error.strerror or error}); name another --output."
        raise CflowError(message) from error


def _plot(
    scores: np.ndarray, expected: np.ndarray, evidence: list[float], limit: float, alarm: int | None, path: Path
) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 6), layout="constrained")
    above, below = figure.subplots(2, 1, sharex=True)
    low, middle, high = np.quantile(expected, [0.05, 0.5, 0.95])
    above.axhspan(low, high, color="C2", alpha=0.2, label="nine in ten of the reference")
    above.axhline(middle, color="C2", linewidth=1)
    above.plot(scores, ".", markersize=3, color="C0", label="recent images")
    above.set(ylabel="score")
    below.plot(evidence, color="C0", label="evidence of a change")
    below.axhline(limit, color="C3", linestyle="--", label=f"alarm, error rate {10**-limit:g}")
    below.set(xlabel="image", ylabel="log10 of the capital")
    below.xaxis.get_major_locator().set_params(integer=True)
    for axes in (above, below):
        if alarm is not None:
            axes.axvline(alarm, color="C3", linewidth=1)
        axes.legend(fontsize=8, loc="upper left")
        axes.grid(visible=True, alpha=0.3)
    with atomic_file(path) as partial:
        figure.savefig(partial, format="png", dpi=150)
