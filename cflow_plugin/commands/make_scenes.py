"""A tiny data set in ShanghaiTech's layout: something to try things on before anything is downloaded."""

from __future__ import annotations

__all__ = ["make_scenes"]

import secrets
import shutil
from pathlib import Path  # noqa: TC003  jsonargparse reads the annotation
from typing import TYPE_CHECKING

import cv2
import numpy as np
from rich.progress import track

from cflow_plugin.errors import CflowError

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from numpy.typing import NDArray

    Array = NDArray[np.float64]

_RATE = 24.0  # frames a second, as in ShanghaiTech
_DESIGN_HEIGHT = 96  # lengths below are in pixels of a picture this high
_GRAIN = 2.0  # standard deviation of the camera's noise, of 255
_SMALLEST = 32


def make_scenes(
    output: Path,
    scenes: list[int] = [1, 2],  # noqa: B006
    train_videos: int = 4,
    train_frames: int = 80,
    test_clips: int = 2,
    test_frames: int = 80,
    width: int = 160,
    height: int = 96,
    seed: int = 0,
) -> None:
    """Draw a tiny data set in the layout of ShanghaiTech Campus.

    Each scene is a place seen by a fixed camera, crossed by people on foot. In every test clip a vehicle crosses it as
    well; its frames and pixels are the anomaly.

    Args:
        output: Folder to write; it must not be there yet.
        scenes: Numbers of the scenes to draw.
        train_videos: Training videos of each scene.
        train_frames: Frames of each training video.
        test_clips: Test clips of each scene.
        test_frames: Frames of each test clip.
        width: Width of a frame in pixels.
        height: Height of a frame in pixels.
        seed: Seed of all that is drawn.
    """
    settings = {"train_videos": train_videos, "train_frames": train_frames, "seed": seed + 1}
    settings |= {"test_clips": test_clips, "test_frames": test_frames, "scenes": len(scenes)}
    for name, value in settings.items():
        if value < 1:
            message = f"{name} is too low; scenes need at least one of each sort, and a seed of 0 or more."
            raise CflowError(message)
    if min(width, height) < _SMALLEST or width % 2 or height % 2:
        message = f"Scenes need an even width and height of at least {_SMALLEST} pixels, got {width} and {height}."
        raise CflowError(message)
    if output.exists():
        message = f"{output} is there already; delete it, or name another folder with --output."
        raise CflowError(message)
    output.parent.mkdir(parents=True, exist_ok=True)
    partial = output.with_name(f".{output.name}-{secrets.token_hex(4)}")
    try:
        for kind in ("training/videos", "testing/frames", "testing/test_frame_mask", "testing/test_pixel_mask"):
            (partial / kind).mkdir(parents=True)
        for scene in track(scenes, "Drawing scenes", transient=True):
            place = _Place(scene, (height, width), seed)
            for number in range(1, train_videos + 1):
                _write_video(partial / f"training/videos/{scene:02d}_{number:03d}.avi", place, number, train_frames)
            for number in range(1, test_clips + 1):
                _write_clip(partial / "testing", f"{scene:02d}_{number:04d}", place, number, test_frames)
        partial.rename(output)
    except OSError as error:
        message = (
            f"The scenes could not be written to {output} ({error.strerror or error}); free some space there, or name "
            "another folder."
        )
        raise CflowError(message) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


class _Place:
    """What a fixed camera sees when nobody is there: lawn, and a paved path across it."""

    def __init__(self, scene: int, size: tuple[int, int], seed: int) -> None:
        self.scene, self.size, self.seed = scene, size, seed
        self.scale = size[0] / _DESIGN_HEIGHT
        rng = np.random.default_rng([seed, scene, 0])
        lawn, paving = rng.uniform(60, 110, 3) * (0.8, 1.2, 0.8), rng.uniform(130, 180, 3)
        rough = cv2.resize(
            rng.normal(0, 14, (size[0] // 4, size[1] // 4, 3)), size[::-1], interpolation=cv2.INTER_CUBIC
        )
        self.background = lawn + rough
        self.path = (rng.uniform(30, 36) * self.scale, rng.uniform(76, 84) * self.scale)  # its upper and lower edge
        top, bottom = map(round, self.path)
        self.background[top:bottom] = paving + 0.3 * rough[top:bottom]
        slab = max(4, round(16 * self.scale))
        self.background[top:bottom, ::slab] -= 25
        self.background[top:bottom:slab] -= 25

    def film(
        self, number: int, frames: int, with_vehicle: bool
    ) -> Iterator[tuple[NDArray[np.uint8], NDArray[np.bool_]]]:
        """Frames ``(H, W, 3)``, blue first, and where the vehicle is in them ``(H, W)``."""
        rng = np.random.default_rng([self.seed, self.scene, 1 + with_vehicle, number])
        width = self.size[1]
        walkers = [
            (rng.uniform(0, width), rng.uniform(*self.path), rng.choice([-1, 1]) * rng.uniform(0.4, 0.9) * self.scale,
             rng.uniform(20, 110, 3).tolist())
            for _ in range(rng.integers(3, 6))
        ]  # fmt: skip
        duration = max(1, frames // 2)
        start = rng.integers(frames // 5, max(frames // 5 + 1, frames - duration - frames // 5))
        row, colour = rng.uniform(*self.path), (40.0, 60.0, 230.0)
        for index in range(frames):
            image, mask = self.background.copy(), np.zeros(self.size, np.uint8)
            for x, y, speed, clothes in walkers:
                # People who leave on one side come in on the other.
                margin = 10 * self.scale
                at = (x + speed * index + margin) % (width + 2 * margin) - margin
                self._ellipse(image, (at, y - 8 * self.scale), (3, 8), clothes)
                self._ellipse(image, (at, y - 18 * self.scale), (2.5, 3), (120.0, 150.0, 190.0))
            if with_vehicle and start <= index < start + duration:
                at = width * (index - start + 0.5) / duration
                for where, body, tyre in ((image, colour, (20.0, 20.0, 20.0)), (mask, (1.0,), (1.0,))):
                    self._ellipse(where, (at, row - 8 * self.scale), (16, 8), body)
                    for wheel in (-9, 9):
                        self._ellipse(where, (at + wheel * self.scale, row), (4, 4), tyre)
            grain = rng.normal(0, _GRAIN, image.shape)
            yield np.clip(np.rint(image + grain), 0, 255).astype(np.uint8), mask > 0

    def _ellipse(
        self, image: NDArray, centre: tuple[float, float], axes: tuple[float, float], colour: Sequence[float]
    ) -> None:
        half_width, half_height = (max(1, round(value * self.scale)) for value in axes)
        middle = (round(centre[0]), round(centre[1]))
        cv2.ellipse(image, middle, (half_width, half_height), 0, 0, 360, colour, cv2.FILLED)


def _write_video(path: Path, place: _Place, number: int, frames: int, with_vehicle: bool = False) -> list[NDArray]:
    """Write a video and return its masks."""
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter.fourcc(*"MJPG"), _RATE, place.size[::-1])
    if not writer.isOpened():
        message = f"OpenCV could not write a video to {path}."
        raise CflowError(message)
    masks = []
    for image, mask in place.film(number, frames, with_vehicle):
        writer.write(image)
        masks.append(mask)
    writer.release()
    return masks


def _write_clip(testing: Path, name: str, place: _Place, number: int, frames: int) -> None:
    (testing / "frames" / name).mkdir()
    # By way of a video: had test frames not passed through the training videos' codec, that alone would set them apart.
    video = testing / f"{name}.avi"
    masks = _write_video(video, place, number, frames, with_vehicle=True)
    capture = cv2.VideoCapture(str(video))
    for index in range(frames):
        there, image = capture.read()
        if not there:  # OpenCV does not say that a disk is full
            message = "a video ends early"
            raise OSError(message)
        encoded = cv2.imencode(".jpg", image)[1]
        (testing / "frames" / name / f"{index:03d}.jpg").write_bytes(encoded.tobytes())
    capture.release()
    video.unlink()
    np.save(testing / "test_pixel_mask" / f"{name}.npy", np.array(masks, np.uint8))
    np.save(testing / "test_frame_mask" / f"{name}.npy", np.array([mask.any() for mask in masks], np.uint8))
