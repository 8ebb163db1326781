"""Run an exported model on a folder of images, a video or a camera, and show what it sees."""

__all__ = ["watch"]

import csv
import logging
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Literal

import cv2
import numpy as np
import openvino as ov
from openvino.preprocess import ColorFormat, PrePostProcessor, ResizeAlgorithm
from rich.progress import Progress

from cflow_plugin.errors import CflowError
from cflow_plugin.held_out_scores import held_out_scores

logger = logging.getLogger(__name__)

_IMAGES = {".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff", ".webp"}
_RED, _GREEN = (60, 60, 230), (80, 180, 60)  # blue, green, red
_FRAME_RATE_MEMORY = 0.9  # of the running mean, a frame


def watch(
    model: Path,
    source: str,
    output: Path = Path("results/watch"),
    show: bool = False,
    overlays: bool = True,
    device: str = "CPU",
    precision: Literal["f32", "bf16", "f16"] = "f32",
    limit: int | None = None,
) -> None:
    """Score images as they come, with an exported model.

    Scores go to ``scores.csv`` in the output folder (with conformal p-values, where the model was trained with a
    false-alarm rate), and pictures with the anomaly map over the image beside it: a picture for each image of a folder,
    a video for a video or camera. Ctrl-C, or q in the window, ends it.

    Args:
        model: The .xml (or .onnx) file that ``anomalib export`` wrote.
        source: A folder, an image, a video file, or the number of a camera (0 is the first).
        output: Folder for the results.
        show: Show the pictures in a window.
        overlays: Write the pictures to files.
        device: OpenVINO device, for example CPU, GPU or AUTO.
        precision: What OpenVINO computes in where the model is not INT8.
        limit: End after this many images.
    """
    run = _load(model, device, precision)
    good = held_out_scores(model)
    frames, total = _open(source)
    output.mkdir(parents=True, exist_ok=True)
    unread: list[str] = []
    count, rate = 0, 0.0
    with ExitStack() as stack:
        table = csv.writer(stack.enter_context((output / "scores.csv").open("w", newline="")))
        table.writerow(["image", "score", "anomalous", "milliseconds", *(["p_value"] if good is not None else [])])
        progress = stack.enter_context(Progress(transient=True))
        task = progress.add_task("Watching", total=min(total, limit) if total and limit else total or limit)
        film: cv2.VideoWriter | None = None
        try:
            for name, frame in frames:
                if limit is not None and count >= limit:
                    break
                if frame is None:
                    unread.append(name)
                    logger.warning("%s could not be read as an image; it is left out.", name)
                    continue
                start = time.perf_counter()
                result = run(frame)
                spent = time.perf_counter() - start
                count += 1
                rate = 1 / spent if count == 1 else _FRAME_RATE_MEMORY * rate + (1 - _FRAME_RATE_MEMORY) / spent
                score, anomalous = float(result["pred_score"][0]), bool(result["pred_label"][0])
                p_value = [] if good is None else [f"{(1 + (good >= score).sum()) / (1 + len(good)):.6f}"]
                table.writerow([name, f"{score:.6f}", int(anomalous), f"{1000 * spent:.2f}", *p_value])
                progress.update(task, advance=1, description=f"{rate:.0f} images/s, score {score:.3f}")
                if not (show or overlays):
                    continue
                picture = _overlay(frame, result["anomaly_map"][0, 0], score, anomalous, rate)
                if overlays and _is_film(source):
                    if film is None:
                        film = cv2.VideoWriter(
                            str(output / "overlay.mp4"), cv2.VideoWriter.fourcc(*"mp4v"), 25, picture.shape[1::-1]
                        )
                        stack.callback(film.release)
                    film.write(picture)
                elif overlays:
                    _write(output / Path(name).with_suffix(".png"), picture)
                if show and _shown(picture):
                    break
        except KeyboardInterrupt:
            logger.info("Ended by the user.")
    logger.info("%d images, %.1f a second at last; results are in %s.", count, rate, output.resolve())
    if unread:
        message = f"{len(unread)} images could not be read ({', '.join(unread[:3])}…); all others are in scores.csv."
        raise CflowError(message)
    if count == 0:
        message = f"There is no image in {source}."
        raise CflowError(message)


def _load(path: Path, device: str, precision: str) -> Callable[[np.ndarray], Mapping]:
    """Compile a model for pictures as OpenCV reads them: ``(H, W, 3)``, bytes, blue first, of any size."""
    if not path.is_file():
        message = f"There is no exported model at {path}; `anomalib export --model CflowPlugin` writes one."
        raise CflowError(message)
    core = ov.Core()
    try:
        model = core.read_model(path)
        outputs = {name for output in model.outputs for name in output.get_names()}
    except RuntimeError as error:
        message = f"{path} could not be read as an OpenVINO or ONNX model."
        raise CflowError(message) from error
    if not {"pred_score", "pred_label", "anomaly_map"} <= outputs:
        message = f"{path} gives {', '.join(sorted(outputs))}; a model exported by anomalib with thresholds is needed."
        raise CflowError(message)
    shape = model.input(0).partial_shape
    steps = PrePostProcessor(model)
    tensor = steps.input().tensor()
    tensor.set_element_type(ov.Type.u8).set_layout(ov.Layout("NHWC")).set_color_format(ColorFormat.BGR)
    steps.input().model().set_layout(ov.Layout("NCHW"))
    prepare = steps.input().preprocess()
    prepare.convert_element_type(ov.Type.f32).convert_color(ColorFormat.RGB).scale(255.0)
    if shape[2].is_static:
        tensor.set_spatial_dynamic_shape()
        prepare.resize(ResizeAlgorithm.RESIZE_BILINEAR_PILLOW)
    compiled = core.compile_model(
        steps.build(), device, {"INFERENCE_PRECISION_HINT": precision, "PERFORMANCE_HINT": "LATENCY"}
    )
    return lambda frame: compiled([frame[None]])


def _is_film(source: str) -> bool:
    path = Path(source)
    return source.isdigit() or (path.is_file() and path.suffix.lower() not in _IMAGES)


def _open(source: str) -> tuple[Iterator[tuple[str, np.ndarray | None]], int | None]:
    """The images of a source with their names (``None`` where one cannot be read), and their number if it is known."""
    path = Path(source)
    if _is_film(source):
        capture = cv2.VideoCapture(int(source) if source.isdigit() else source)
        if not capture.isOpened():
            what = f"camera {source}" if source.isdigit() else f"{source} as a video"
            message = f"{what} could not be opened."
            raise CflowError(message)
        count = int(capture.get(cv2.CAP_PROP_FRAME_COUNT))
        return _frames(capture), count if count > 0 else None
    if not path.exists():
        message = f"There is nothing at {source}: name a folder, an image, a video file or the number of a camera."
        raise CflowError(message)
    files = [path] if path.is_file() else sorted(file for file in path.rglob("*") if file.suffix.lower() in _IMAGES)
    root = path.parent if path.is_file() else path
    return ((str(file.relative_to(root)), _read(file)) for file in files), len(files)


def _frames(capture: cv2.VideoCapture) -> Iterator[tuple[str, np.ndarray]]:
    index = 0
    while True:
        there, frame = capture.read()
        if not there:
            capture.release()
            return
        yield f"{index:06d}", frame
        index += 1


def _read(path: Path) -> np.ndarray | None:
    # Decoded from memory: OpenCV's own reading of files stumbles over names beyond ASCII on some systems.
    return cv2.imdecode(np.fromfile(path, dtype=np.uint8), cv2.IMREAD_COLOR)


def _write(path: Path, picture: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    _, data = cv2.imencode(path.suffix, picture)
    data.tofile(path)


def _overlay(frame: np.ndarray, anomaly_map: np.ndarray, score: float, anomalous: bool, rate: float) -> np.ndarray:
    """The image under its anomaly map, with score and frame rate, as bytes, blue first."""
    size = frame.shape[1::-1]
    heat = cv2.resize((255 * np.clip(anomaly_map, 0, 1)).astype(np.uint8), size)
    picture = cv2.addWeighted(frame, 0.6, cv2.applyColorMap(heat, cv2.COLORMAP_JET), 0.4, 0)
    height = max(14, size[1] // 16)
    text = f"{'ANOMALY' if anomalous else 'good'} {score:.3f}  {rate:.0f} fps"
    scale = cv2.getFontScaleFromHeight(cv2.FONT_HERSHEY_SIMPLEX, height // 2)
    cv2.rectangle(picture, (0, 0), (size[0], height), _RED if anomalous else _GREEN, cv2.FILLED)
    cv2.putText(
        picture, text, (4, int(0.75 * height)), cv2.FONT_HERSHEY_SIMPLEX, scale, (255, 255, 255), 1, cv2.LINE_AA
    )
    return picture


def _shown(picture: np.ndarray) -> bool:
    """Show a picture; whether the user wants to end."""
    try:
        cv2.imshow("cflow-plugin", picture)
        return cv2.waitKey(1) & 0xFF == ord("q")
    except cv2.error as error:
        message = "This OpenCV cannot open windows; leave --show out and look at the pictures in the output folder."
        raise CflowError(message) from error
