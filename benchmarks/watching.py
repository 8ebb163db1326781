"""A watch that goes on: what it costs an image beyond the model, and what is there after it was killed again and again.

    python benchmarks/watching.py cost
    python benchmarks/watching.py live
    python benchmarks/watching.py endurance --images 100000 --kills 20 --folder /mnt/small

The model is one whose score is the image's brightness, so that hardly any time is the model's. Prints one line of JSON.
"""

import base64
import csv
import hashlib
import hmac
import itertools
import json
import os
import random
import socket
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import cv2
import numpy as np
import psutil
from jsonargparse import auto_cli

from cflow_plugin.commands.watch.watch import watch

sys.path.insert(0, str(Path(__file__).parent.parent))
from tests.brightness import save_brightness_model

_SECRET = b"a secret of both"
_PROGRAM = "from cflow_plugin.commands.cli import main; main()"


def cost(images: int = 3000, size: int = 256) -> None:
    """A video through a watch with a page and no overlays: the time of an image beyond that of the model.

    Args:
        images: Frames.
        size: Their height and width.
    """
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        model = save_brightness_model(folder / "model.xml", list(np.arange(200) / 1000))
        film = cv2.VideoWriter(str(folder / "film.avi"), cv2.VideoWriter.fourcc(*"MJPG"), 60, (size, size))
        for number in range(images):
            film.write(np.full((size, size, 3), number % 100, np.uint8))
        film.release()
        start = time.perf_counter()
        watch(model, str(folder / "film.avi"), folder / "out", follow=True, overlays=False, page=0, limit=images)
        spent = 1000 * (time.perf_counter() - start) / images
        with (folder / "out/scores.csv").open(newline="") as table:
            of_model = float(np.mean([float(row["milliseconds"]) for row in csv.DictReader(table)]))
    print(json.dumps({"images": images, "ms": spent, "ms of the model": of_model, "ms beyond": spent - of_model}))


def live(rate: float = 60.0, seconds: float = 60.0, size: int = 256) -> None:
    """A camera of so many images a second while somebody looks at the page: how fast it answers, and what is dropped.

    Args:
        rate: Frames a second.
        seconds: How long.
        size: Height and width of a frame.
    """
    frame = cv2.imencode(".jpg", np.full((size, size, 3), 100, np.uint8))[1].tobytes()

    class Camera(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.send_header("Content-Type", "multipart/x-mixed-replace; boundary=frame")
            self.end_headers()
            begin = time.monotonic()
            with suppress(OSError):
                for number in itertools.count():
                    time.sleep(max(0.0, begin + number / rate - time.monotonic()))
                    head = f"--frame\r\nContent-Type: image/jpeg\r\nContent-Length: {len(frame)}\r\n\r\n"
                    self.wfile.write(head.encode() + frame + b"\r\n")

        def log_message(self, *_: object) -> None:
            pass

    camera = ThreadingHTTPServer(("127.0.0.1", 0), Camera)
    threading.Thread(target=camera.serve_forever, daemon=True).start()
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        model = save_brightness_model(folder / "model.xml", list(np.arange(200) / 1000))
        address, count = f"http://127.0.0.1:{camera.server_port}/", int(rate * seconds)
        settings = {"follow": True, "overlays": False, "page": port, "limit": count}
        watching = threading.Thread(target=watch, args=(model, address, folder / "out"), kwargs=settings)
        start = time.monotonic()
        watching.start()
        answers, state = [], {}
        while watching.is_alive():
            begin = time.perf_counter()
            with suppress(OSError), urllib.request.urlopen(f"http://127.0.0.1:{port}/api/state", timeout=5) as answer:
                state = json.load(answer)
                answers.append(1000 * (time.perf_counter() - begin))
            for image in state.get("images", [])[:1]:
                with suppress(OSError), urllib.request.urlopen(f"http://127.0.0.1:{port}/image/{image['number']}"):
                    pass
            time.sleep(1)
        spent = time.monotonic() - start
    figures = {"p50 ms": float(np.median(answers)), "most ms": max(answers), "dropped": state["dropped"]}
    print(json.dumps({"images": count, "a second": count / spent, "page asked": len(answers), **figures}))


class _Receiver:
    """A webhook's other side, which checks signatures."""

    def __init__(self) -> None:
        self.got: list[str] = []
        self.away_until = 0.0
        receiver = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["Content-Length"]))
                signed = f"{self.headers['webhook-id']}.{self.headers['webhook-timestamp']}.".encode() + body
                digest = base64.b64encode(hmac.new(_SECRET, signed, hashlib.sha256).digest()).decode()
                if time.monotonic() < receiver.away_until:
                    self.send_error(503)
                    return
                is_right = self.headers["webhook-signature"] == f"v1,{digest}"
                if is_right:
                    receiver.got.append(self.headers["webhook-id"])
                self.send_response(204 if is_right else 401)
                self.end_headers()

            def log_message(self, *_: object) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.address = f"http://127.0.0.1:{self._server.server_port}/"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()


def endurance(
    images: int = 10_000, kills: int = 8, seconds: float = 3600, folder: Path | None = None, away: float = 60
) -> None:
    """Images arrive in a folder while all goes wrong: what the table, the copies and a webhook have in the end.

    The watch is killed again and again; the webhook is away for a while; and the disk is full for half a minute, where
    that is a small one.

    Args:
        images: How many.
        kills: How often the watch is killed, after four to eight seconds each.
        seconds: When to give up.
        folder: For results, on a small file system of its own (`mount -t tmpfs -o size=1G tmpfs /mnt/small`), which
            can be filled; by default a temporary folder, which is not.
        away: For how many seconds the webhook takes nothing.
    """
    receiver, memory, end = _Receiver(), [], time.monotonic() + seconds
    with tempfile.TemporaryDirectory() as name, tempfile.TemporaryDirectory(dir=folder) as results:
        place, output, written = Path(name), Path(results) / "out", threading.Event()
        model = save_brightness_model(place / "model.xml")
        command = [sys.executable, "-c", _PROGRAM, "watch", "--model", model, "--source", place / "in", "--output"]
        command += [output, "--follow", "true", "--overlays", "false", "--sort", "true", "--page", "0"]
        command += ["--webhook", receiver.address]
        (place / "in").mkdir()
        troubles = threading.Thread(target=_trouble, args=(receiver, output, images, folder, away), daemon=True)

        def write() -> None:
            for number in range(images):
                into = place / "in" / str(number // 1000)
                into.mkdir(exist_ok=True)
                data = cv2.imencode(".png", np.full((8, 8, 3), number % 256, np.uint8))[1]
                (into / f"{number}.png").write_bytes(data.tobytes())
                time.sleep(0.002)
            written.set()

        threading.Thread(target=write, daemon=True).start()
        troubles.start()
        for run in range(kills + 1):
            environment = {**os.environ, "CFLOW_PLUGIN_WEBHOOK_SECRET": _SECRET.decode()}
            process = subprocess.Popen([*map(str, command)], env=environment, stderr=subprocess.DEVNULL)
            until = time.monotonic() + random.uniform(4, 8) if run < kills else end
            while time.monotonic() < until and not (run == kills and len(set(receiver.got)) >= images):
                time.sleep(0.5)
                memory.append(psutil.Process(process.pid).memory_info().rss / 2**20)
            process.kill() if run < kills else process.terminate()
            process.wait()
        with (output / "scores.csv").open(newline="") as table:
            rows = [row["image"] for row in csv.DictReader(table)]
        copies = sum(path.is_file() for path in (output / "sorted").rglob("*.png"))
    last = memory[-len(memory) // 2 :]
    slope = float(np.polyfit(np.linspace(0, 1, len(last)), last, 1)[0])
    found = {"rows": len(rows), "different": len(set(rows)), "copies": copies, "posts": len(receiver.got)}
    arrived = {"different posts": len(set(receiver.got)), "all written": written.is_set()}
    flat = {"peak MB": max(memory), "MB more in the last half": slope, "seconds": seconds - end + time.monotonic()}
    print(json.dumps({"images": images, "kills": kills, **found, **arrived, **flat}))


def _trouble(receiver: _Receiver, output: Path, images: int, small: Path | None, away: float) -> None:
    """A webhook that takes nothing for a while when a third is done, and at two thirds a full disk."""

    def wait_for(share: float) -> None:
        while len(receiver.got) < share * images:
            time.sleep(0.5)

    wait_for(1 / 3)
    receiver.away_until = time.monotonic() + away
    print(f"The webhook takes nothing for {away:.0f} s.", file=sys.stderr)
    wait_for(2 / 3)
    if small is None:
        return
    ballast = output.parent / "ballast"
    with suppress(OSError), ballast.open("wb") as file:
        while True:
            file.write(bytes(2**20))
    before = len(receiver.got)
    time.sleep(30)
    print(f"The disk was full for 30 s, in which {len(receiver.got) - before} results arrived.", file=sys.stderr)
    ballast.unlink()


if __name__ == "__main__":
    auto_cli({"cost": cost, "live": live, "endurance": endurance}, as_positional=False)
