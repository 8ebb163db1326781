"""Score images with OpenVINO alone.

    python python openvino_python.py model.xml image.png …

The file was exported with camera bytes.
"""

import sys

import cv2
import openvino as ov

model, *images = sys.argv[1:]
compiled = ov.Core().compile_model(model, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
for path in images:
    image = cv2.imread(path, cv2.IMREAD_COLOR)  # (height, width, 3), bytes, blue first
    result = compiled(image[None])
    decision = "anomalous" if result["pred_label"].item() else "good"
    print(path, f"{result['pred_score'].item():.6f}", decision)
