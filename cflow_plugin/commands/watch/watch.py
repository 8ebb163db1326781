"""Run an exported model on a folder of images, a video or a camera, and show what it sees."""

__all__ = ["watch"]

import csv
import json
import logging
from array import array
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Literal

import cv2
import numpy as np
from rich.progress import Progress

from cflow_plugin.commands.watch.arrivals import Arrival
from cflow_plugin.commands.watch.follow import JOURNAL, follow_source
from cflow_plugin.commands.watch.judging import HALF, Following, Judge
from cflow_plugin.commands.watch.overlay import overlay, set_aside, write_picture
from cflow_plugin.commands.watch.score_plot import plot_scores
from cflow_plugin.commands.watch.sources import CameraLostError, open_source
from cflow_plugin.commands.watch.timeline import Truth, frame_auroc, read_truth
from cflow_plugin.decisions.region_files import RegionFiles
from cflow_plugin.errors import CflowError
from cflow_plugin.files import atomic_file
from cflow_plugin.images.reading import ImageFileError, in_8_bits

logger = logging.getLogger(__name__)

_FRAME_RATE_MEMORY = 0.9  # of the running mean, a frame
_TABLE, _PLOT, _METRICS = "scores.csv", "score_over_time.png", "metrics.json"
_FILM = "overlay.avi"  # can be played as far as it was written, where an .mp4 that was cut off is lost


def watch(
    model: Path,
    source: str,
    output: Path = Path("results/watch"),
    show: bool = False,
    overlays: bool = True,
    device: str = "CPU",
    precision: Literal["f32", "bf16", "f16"] = "f32",
    limit: int | None = None,
    smoothing: float = 0.0,
    threshold: float | None = None,
    frame_rate: float = 25.0,
    truth: Path | None = None,
    follow: bool = False,
    sort: bool = False,
    unsure: tuple[float, float] | None = None,
    webhook: str | None = None,
    mqtt: str | None = None,
    page: int | None = None,
    host: str = "127.0.0.1",
    sample: int = 100,
) -> None:
    """Score images as they come, with an exported model.

    Each score goes to ``scores.csv`` in the output folder as soon as it is there (with its conformal p-value, where the
    model was trained with a false-alarm rate), and pictures with the anomaly map over the image beside it: in
    ``overlays`` one for each image of a folder, or ``overlay.avi`` for a video or camera. Anomalous regions are drawn
    into these and go to ``regions.jsonl``, a line for each image, and at the end to ``regions.csv`` and
    ``regions.coco.json``. An earlier run's table, regions and video are kept under the time at which it
    ended. At the end ``score_over_time.png`` shows all scores, and with
    ground truth ``metrics.json`` holds the frame-level AUROC. Ctrl-C, or q in the window, ends it.

    With ``--follow true`` it goes on for as long as it is let: it waits for images that arrive in a folder (or fit a
    pattern), and for a camera that is lost. Started again it goes on where it ended, also after it was killed. Regions
    are in its journal then, in what --webhook and --mqtt send, and on the page.

    Args:
        model: The .xml (or .onnx) file that ``anomalib export`` wrote.
        source: A folder, an image, a video file, the number of a camera (0 is the first) or its device node, or a
            stream's address (rtsp://…, http://…). A folder's images are taken in natural order, 9.jpg before 10.jpg.
        output: Folder for the results.
        show: Show the pictures in a window.
        overlays: Write the pictures to files.
        device: OpenVINO device, for example CPU, GPU or AUTO.
        precision: What OpenVINO computes in where the model is not INT8.
        limit: End after this many images.
        smoothing: Smooth scores over about this many seconds of the past, and decide by the smoothed score.
        threshold: Scores above it are anomalies. By default the model decides, and smoothed scores are held against
            0.5, where anomalib's models have their threshold.
        frame_rate: Images a second in a folder, for the time of each; a video and a camera know theirs.
        truth: What is truly anomalous: a .npy file with one number a frame (ShanghaiTech's test_frame_mask), or a CSV
            file with the first and last frame of each anomaly, counted from 0.
        follow: Go on for ever. Overlays are then written of images that are not good, the time in scores.csv is in
            seconds since 1970, and frames of a camera that is faster than the model are dropped and counted.
        sort: With follow: copy each image into sorted/good, anomalous, unsure or unreadable.
        unsure: With follow: p-values between these two, as [0.05,0.1], are called unsure. The lower one has to lie
            above 1 / (number of reference images + 1), which is the least p-value, or nothing is anomalous.
        webhook: With follow: post each result as JSON to this address, signed with the secret in the environment's
            CFLOW_PLUGIN_WEBHOOK_SECRET, again and again until the server takes it.
        mqtt: With follow: publish each result under this topic, mqtt://user@host:port/topic or mqtts://…; the password
            stands in CFLOW_PLUGIN_MQTT_PASSWORD.
        page: With follow: serve a page that shows what the watch sees, on this port; 0 takes a free one.
        host: Address that the page listens on. If others can reach it, they need the token that is printed then, or
            stands in CFLOW_PLUGIN_PAGE_TOKEN.
        sample: With page: draw so many images at random, to look at and set the threshold by anew; 0 for none.
    """
    wishes = (overlays, device, precision, limit, smoothing, threshold, sort, unsure, webhook, mqtt)
    settings = Following(model, source, output, *wishes, page, host, sample)
    if follow:
        if show or truth is not None:
            message = "--show and --truth are for a source that has an end; leave them out with --follow true."
            raise CflowError(message)
        follow_source(settings)
        return
    if sort or any(wish is not None for wish in (unsure, webhook, mqtt, page)):
        message = "--sort, --unsure, --webhook, --mqtt and --page are for a watch that goes on: --follow true."
        raise CflowError(message)
    if (output / JOURNAL).exists():
        message = f"{output} belongs to a watch with --follow true: go on with it, or choose another --output."
        raise CflowError(message)
    if not frame_rate > 0:
        message = f"The frame rate must be above 0, got {frame_rate}."
        raise CflowError(message)
    known = None if truth is None else read_truth(truth)
    judge = Judge(settings, model)
    compiled = judge.compiled
    frames, total, is_film, rate = open_source(source, frame_rate, compiled.bits)
    if known is not None and known.total not in (None, total) and not is_film:
        message = f"{truth} is of {known.total} frames, but {source} holds {total} images: is it of another clip?"
        raise CflowError(message)
    output.mkdir(parents=True, exist_ok=True)
    for name in (_PLOT, _METRICS):  # an earlier run's, which would be taken for this one's
        (output / name).unlink(missing_ok=True)
    for name in (_TABLE, _FILM, "regions.jsonl", "regions.csv", "regions.coco.json"):
        set_aside(output / name)
    unscored: list[str] = []
    lost: CameraLostError | None = None
    history = _History()
    speed = 0.0
    with ExitStack() as stack:
        file = stack.enter_context((output / _TABLE).open("w", newline="", encoding="utf-8"))
        table = csv.writer(file)
        columns = ["frame", "image", "time", "score", "smoothed", "anomalous", "milliseconds"]
        table.writerow([*columns, *(["p_value"] if judge.reference is not None else [])])
        files = RegionFiles(output)
        stack.callback(files.close)
        progress = stack.enter_context(Progress(transient=True))
        task = progress.add_task("Watching", total=min(total, limit) if total and limit else total or limit)
        film: cv2.VideoWriter | None = None
        try:
            for index, (name, moment, frame) in enumerate(frames):
                if limit is not None and len(history.scores) >= limit:
                    break
                result, found, regions = judge(Arrival(name, "", None, moment, frame), index)
                if found is None or isinstance(frame, ImageFileError):
                    unscored.append(name)
                    logger.warning("%s: %s. It is left out.", name, result.error)
                    continue
                assert result.score is not None
                assert result.smoothed is not None
                assert result.milliseconds is not None
                score, smoothed, a_second = result.score, result.smoothed, 1000 / result.milliseconds
                speed = _FRAME_RATE_MEMORY * speed + (1 - _FRAME_RATE_MEMORY) * a_second if history.scores else a_second
                files.add(name, frame.shape[:2], regions)
                history.add(index, moment, score, smoothed)
                shown = [f"{moment:.3f}", f"{score:.6f}", f"{smoothed:.6f}", int(bool(result.anomalous))]
                shown.append(f"{result.milliseconds:.2f}")
                p_value = [] if result.p_value is None else [f"{result.p_value:.6f}"]
                table.writerow([index, name, *shown, *p_value])
                file.flush()
                progress.update(task, advance=1, description=f"{speed:.0f} images/s, score {smoothed:.3f}")
                if not (show or overlays):
                    continue
                seen, where = in_8_bits(frame, compiled.bits), found["anomaly_map"][0, 0]
                shown_regions = (regions, compiled.regions)
                picture = overlay(seen, where, smoothed, result.decision, shown_regions, f"  {speed:.0f} fps")
                if overlays and is_film:
                    if film is None:
                        film = cv2.VideoWriter(
                            str(output / _FILM),
                            cv2.VideoWriter.fourcc(*"XVID"),
                            rate or frame_rate,
                            picture.shape[1::-1],
                        )
                        stack.callback(film.release)
                    film.write(picture)
                elif overlays:
                    name = name if name.lower().endswith(".png") else f"{name}.png"
                    write_picture(output / "overlays" / name, picture)
                if show and _shown(picture):
                    break
        except KeyboardInterrupt:
            logger.info("Ended by the user.")
        except CameraLostError as error:
            lost = error
    count = len(history.scores)
    if count:
        history.report(output, smoothing > 0, HALF if threshold is None else threshold, known)
    logger.info("%d images, %.1f a second at last; results are in %s.", count, speed, output.resolve())
    if unscored:
        what = "1 image" if len(unscored) == 1 else f"{len(unscored)} images"
        message = f"{what} could not be scored ({', '.join(unscored[:3])}…); all others are in scores.csv."
        raise CflowError(message)
    if lost is not None:
        raise lost
    if count == 0:
        message = f"There is no image in {source}."
        raise CflowError(message)


class _History:
    """All that was scored, in 32 bytes a frame."""

    def __init__(self) -> None:
        self.frames = array("q")
        self.times = array("d")
        self.scores = array("d")
        self.smoothed = array("d")

    def add(self, frame: int, moment: float, score: float, smoothed: float) -> None:
        self.frames.append(frame)
        self.times.append(moment)
        self.scores.append(score)
        self.smoothed.append(smoothed)

    def report(self, output: Path, is_smoothed: bool, threshold: float, known: Truth | None) -> None:
        """Write the plot and, where the truth is known, the metrics."""
        truth = None if known is None else known.of(self.frames)
        smoothed = self.smoothed if is_smoothed else None
        title = "" if known is None else self._measure(output, smoothed, known)
        plot_scores(output / _PLOT, self.times, self.scores, smoothed, threshold, truth, title)

    def _measure(self, output: Path, smoothed: Sequence[float] | None, known: Truth) -> str:
        """Write the frame-level AUROC, and return it in words."""
        frames = np.asarray(self.frames)
        judged = np.full(len(frames), True) if known.total is None else frames < known.total
        if known.total is not None and not judged.all():
            last = known.total - 1
            logger.warning("The ground truth ends at frame %d; later frames are left out of the AUROC.", last)
        truth = known.of(frames[judged])
        metrics = {"frame_AUROC": frame_auroc(np.asarray(self.scores)[judged], truth)}
        if metrics["frame_AUROC"] is None:
            what = "nothing normal" if truth.any() else "no anomaly"
            logger.warning("The frame-level AUROC is left out: there is %s among the frames scored.", what)
            return ""
        if smoothed is not None:
            metrics["frame_AUROC_smoothed"] = frame_auroc(np.asarray(smoothed)[judged], truth)
        words = ", ".join(f"{name.replace('_', ' ')} {value:.4f}" for name, value in metrics.items())
        logger.info("%s (%d frames, %d of them anomalous)", words, len(truth), truth.sum())
        with atomic_file(output / _METRICS) as partial:
            partial.write_text(json.dumps(metrics, indent=2) + "\n")
        return words


def _shown(picture: np.ndarray) -> bool:
    """Show a picture; whether the user wants to end."""
    try:
        cv2.imshow("cflow-plugin", picture)
        return cv2.waitKey(1) & 0xFF == ord("q")
    except cv2.error as error:
        message = "This OpenCV cannot open windows; leave --show out and look at the pictures in the output folder."
        raise CflowError(message) from error
