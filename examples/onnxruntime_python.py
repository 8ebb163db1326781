"""Score images with ONNX Runtime alone.

python python onnxruntime_python.py model.onnx image.png …
"""

import sys

import cv2
import numpy as np
import onnxruntime

model, *images = sys.argv[1:]
session = onnxruntime.InferenceSession(model, providers=["CPUExecutionProvider"])
for path in images:
    image = cv2.cvtColor(cv2.imread(path, cv2.IMREAD_COLOR), cv2.COLOR_BGR2RGB)
    values = np.ascontiguousarray(image.transpose(2, 0, 1)[None], dtype=np.float32) / 255  # (1, 3, height, width)
    score, label = session.run(["pred_score", "pred_label"], {"input": values})
    print(path, f"{score.item():.6f}", "anomalous" if label.item() else "good")
