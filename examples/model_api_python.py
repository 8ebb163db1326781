"""Score images with openvino-model-api.

    python python model_api_python.py model.xml image.png …

All that the wrapper needs is in the file.
"""

import sys

import cv2
from model_api.adapters import OpenvinoAdapter, create_core
from model_api.models import Model

path_of_model, *images = sys.argv[1:]
precision = {"INFERENCE_PRECISION_HINT": "f32"}
model = Model.create_model(OpenvinoAdapter(create_core(), path_of_model, device="CPU", plugin_config=precision))
for path in images:
    image = cv2.cvtColor(cv2.imread(path, cv2.IMREAD_COLOR), cv2.COLOR_BGR2RGB)  # a file with camera bytes takes BGR
    result = model(image)
    print(path, f"{result.pred_score:.6f}", "anomalous" if result.pred_label == "True" else "good")
