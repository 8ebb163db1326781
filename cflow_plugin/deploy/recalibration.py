"""New thresholds for an exported file, from images that turned out good where it runs."""

__all__ = ["Recalibration", "recalibrate_file"]

import json
import logging
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import openvino as ov
from openvino import opset13 as operations

from cflow_plugin.decisions.conformal import check_enough, odd_one, threshold_rank
from cflow_plugin.decisions.reference_scores import DECISIONS_KEY, KEY
from cflow_plugin.decisions.region_files import REGIONS_KEY, note_of, region_settings_of
from cflow_plugin.decisions.regions import region_level
from cflow_plugin.deploy import runtime
from cflow_plugin.deploy.fingerprint import FINGERPRINT, fingerprint_of
from cflow_plugin.errors import CflowError
from cflow_plugin.files import atomic_folder
from cflow_plugin.images.reading import ImageFileError, read_image

logger = logging.getLogger(__name__)

_STEPS = 8
_HALF = 0.5  # where a file's scores and maps have their threshold


class Recalibration(NamedTuple):
    """What was done.

    Attributes:
        model: The new file.
        rate: False-alarm rate that it keeps.
        images: Good images that it rests on.
        threshold: The new threshold, in the old file's scores, whose own is 0.5.
        alarms: How many of the images the old file called anomalous.
        odd: The image that the threshold rests on, if it is far more unusual than the others.
    """

    model: Path
    rate: float
    images: int
    threshold: float
    alarms: int
    odd: Path | None


def recalibrate_file(
    model: Path, images: Sequence[Path], target: Path, rate: float | None = None, device: str = "CPU"
) -> Recalibration:
    """Write a file that differs from another in its thresholds alone, set anew by the scores of good images.

    The rate holds for new good images that are exchangeable with these: a random sample of what passes, of which all
    were looked at, and not what somebody picked out, the alarms for example.

    Args:
        model: The .xml file that ``anomalib export`` wrote; it stays as it is.
        images: Good images.
        target: The new .xml file; another suffix is none.
        rate: False-alarm rate, by default the old file's.
        device: OpenVINO device.

    Returns:
        What was done.

    Raises:
        CflowError: If the images are too few for the rate or cannot be read, or the file is of another kind.
    """
    if model.suffix.lower() != ".xml" or target.suffix != ".xml":
        message = f"Thresholds can be set anew in OpenVINO's .xml files; got {model.name} and {target.name}."
        raise CflowError(message)
    for file in (target, target.with_suffix(".bin")):
        if file.exists():
            message = f"{file} is there already: name another file."
            raise CflowError(message)
    old, _ = runtime.read_file(model)
    rate = _rate_of(old) if rate is None else rate
    check_enough(len(images), rate)
    rank = threshold_rank(len(images), rate) - 1
    scores, levels = _score(model, images, device)
    edges = float(np.sort(scores)[rank]), float(np.sort(levels)[rank])
    if max(edges) >= 1:
        message = (
            "The scores of these images reach the end of their range, 1: none could lie above the threshold. More has "
            "changed than a threshold can make up for; train anew."
        )
        raise CflowError(message)
    target.parent.mkdir(parents=True, exist_ok=True)
    with atomic_folder(target.parent, last=target.name) as partial:
        for steps in range(_STEPS):
            # By rounding the image on the threshold may come to lie above it in the new file: a little more, then.
            raised = (float(np.float32(edge) + steps * np.spacing(np.float32(edge))) for edge in edges)
            new = _with_thresholds(old, *raised)
            ov.save_model(new, partial / target.name, compress_to_fp16=False)
            own_scores, own_levels = _score(partial / target.name, images, device)
            if max(np.sort(own_scores)[rank], np.sort(own_levels)[rank]) <= _HALF:
                break
        else:
            message = "The scores of these images lie so close together that rounding decides: use others."
            raise CflowError(message)
        _note(new, own_scores, own_levels, rate)
        ov.save_model(new, partial / target.name, compress_to_fp16=False)
    found = [index for values in (scores, levels) if (index := odd_one(values, rate)) is not None]
    odd = images[found[0]] if found else None
    return Recalibration(target, rate, len(images), edges[0], int(np.sum(scores > _HALF)), odd)


def _rate_of(model: ov.Model) -> float:
    rate = json.loads(runtime.note_of(model, FINGERPRINT) or "{}").get("rate")
    if rate is None:
        message = "The file was trained without a false-alarm rate: name the one that it is to keep."
        raise CflowError(message)
    return float(rate)


def _score(model: Path, images: Sequence[Path], device: str) -> tuple[np.ndarray, np.ndarray]:
    """Scores, and highest levels with a region, of images one at a time."""
    compiled = runtime.compile_exported(model, device, "f32")
    scores, levels = [], []
    for path in images:
        try:
            found = compiled([read_image(path, compiled.bits)[None]])
        except ImageFileError as error:
            message = f"{error} Take it out of the good images."
            raise CflowError(message) from error
        scores.append(found["pred_score"][0])
        levels.append(region_level(found["anomaly_map"][0, 0], compiled.regions.smallest))
    if not (np.isfinite(scores).all() and np.isfinite(levels).all()):
        message = "The scores of these images hold NaN or infinite values: check them."
        raise CflowError(message)
    return np.asarray(scores, np.float32), np.asarray(levels, np.float32)


def _with_thresholds(model: ov.Model, score: float, level: float) -> ov.Model:
    """A copy that puts these of its scores and of its maps' values where the threshold is, at a half."""
    copied = model.clone()
    outputs = {name: output for output in copied.outputs for name in output.get_names()}
    if not {"pred_score", "pred_label", "anomaly_map", "pred_mask"} <= outputs.keys():
        message = f"The file gives {', '.join(sorted(outputs))}; scores, maps and decisions on both are needed."
        raise CflowError(message)
    scores = _shifted(outputs["pred_score"], score)
    maps = _shifted(outputs["anomaly_map"], level)
    half = operations.constant(np.float32(_HALF))
    labels = operations.greater(scores, half)
    per_image = operations.reshape(labels, operations.constant(np.array([-1, 1, 1, 1])), special_zero=False)
    masks = operations.logical_and(operations.greater(maps, half), per_image)
    found = {"pred_score": scores, "pred_label": labels, "anomaly_map": maps, "pred_mask": masks}
    results = []
    for name, node in found.items():
        result = operations.result(node)
        result.output(0).get_tensor().set_names({name})
        results.append(result)
    new = ov.Model(results, copied.get_parameters(), model.get_friendly_name())  # pyright: ignore[reportGeneralTypeIssues]  its stub
    for key, value in model.get_rt_info().items():
        new.set_rt_info(value, key)
    return new


def _shifted(output: Any, threshold: float) -> ov.Node:
    """Values between 0 and 1 whose threshold is at a half, none of them cut off."""
    value = output.get_node().input_value(0)
    output.get_tensor().set_names(set())
    reach = np.float32(2 * max(threshold, 1 - threshold))
    moved = operations.subtract(value, operations.constant(np.float32(threshold)))
    return operations.add(operations.divide(moved, operations.constant(reach)), operations.constant(np.float32(_HALF)))


def _note(model: ov.Model, scores: np.ndarray, levels: np.ndarray, rate: float) -> None:
    """Write into a model what its decisions rest on."""
    sentence = f"A false-alarm rate of {rate:g}, by the scores of {len(scores)} good images seen where it runs."
    regions = region_settings_of(runtime.note_of(model, REGIONS_KEY))
    notes = {
        KEY: json.dumps(np.sort(scores).astype(float).tolist()),
        DECISIONS_KEY: sentence,
        REGIONS_KEY: note_of(replace(regions, levels=np.sort(levels).astype(float).tolist())),
    }
    for key, text in notes.items():
        model.set_rt_info(text, key)
    model.set_rt_info(json.dumps({**fingerprint_of(model), "rate": rate}), FINGERPRINT)
