"""An exported file whose score is known beforehand, the image's brightness; made in milliseconds, without torch."""

import json
from pathlib import Path

import numpy as np
import openvino as ov
from openvino import opset13 as ops

REFERENCE = [0.3 + 0.01 * step for step in range(21)]  # 0.3 to 0.5, so that a rate of 1/22 decides at 0.5


def save_brightness_model(path: Path, reference: list[float] | None = REFERENCE) -> Path:
    """Write a file with inputs, outputs and notes as `anomalib export` gives them."""
    image = ops.parameter(ov.PartialShape([-1, 3, -1, -1]), ov.Type.f32, name="image")
    anomaly_map = ops.reduce_mean(image, np.array([1]), keep_dims=True)
    score = ops.reduce_mean(image, np.array([1, 2, 3]), keep_dims=False)
    half = np.float32(0.5)
    outputs = {
        "pred_score": score,
        "pred_label": ops.greater(score, half),
        "anomaly_map": anomaly_map,
        "pred_mask": ops.greater(anomaly_map, half),
    }
    results = []
    for name, node in outputs.items():
        result = ops.result(node)
        node.output(0).set_names({name})
        results.append(result)
    model = ov.Model(results, [image], "brightness")
    if reference is not None:
        model.set_rt_info(json.dumps(reference), "cflow_plugin_reference_scores")
    ov.save_model(model, path, compress_to_fp16=False)
    return path
