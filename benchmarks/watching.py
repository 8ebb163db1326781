"""A watch that goes on: what it costs an image beyond the model, and what is there after it was killed again and again.

    python benchmarks/watching.py cost
    python benchmarks/watching.py endurance --images 100000 --kills 20

The model is one whose score is the image's brightness, so that hardly any time is the model's. Prints one line of JSON.
"""

import base64
import csv
import hashlib
import hmac
import json
import os
import random
import subprocess
import sys
import tempfile
import threading
import time
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


class _Receiver:
    """A webhook's other side, which checks signatures."""

    def __init__(self) -> None:
        self.got: list[str] = []
        receiver = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["Content-Length"]))
                signed = f"{self.headers['webhook-id']}.{self.headers['webhook-timestamp']}.".encode() + body
                digest = base64.b64encode(hmac.new(_SECRET, signed, hashlib.sha256).digest()).decode()
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


def endurance(images: int = 10_000, kills: int = 8, seconds: float = 3600) -> None:
    """Images arrive in a folder while the watch is killed and started: what the table, the copies and a webhook have.

    Args:
        images: How many.
        kills: How often it is killed, after four to eight seconds each.
        seconds: When to give up.
    """
    receiver, memory, end = _Receiver(), [], time.monotonic() + seconds
    with tempfile.TemporaryDirectory() as name:
        folder, written = Path(name), threading.Event()
        model = save_brightness_model(folder / "model.xml")
        command = [sys.executable, "-c", _PROGRAM, "watch", "--model", model, "--source", folder / "in", "--output"]
        command += [folder / "out", "--follow", "true", "--overlays", "false", "--sort", "true", "--page", "0"]
        command += ["--webhook", receiver.address]
        (folder / "in").mkdir()

        def write() -> None:
            for number in range(images):
                into = folder / "in" / str(number // 1000)
                into.mkdir(exist_ok=True)
                data = cv2.imencode(".png", np.full((8, 8, 3), number % 256, np.uint8))[1]
                (into / f"{number}.png").write_bytes(data.tobytes())
                time.sleep(0.002)
            written.set()

        threading.Thread(target=write, daemon=True).start()
        for run in range(kills + 1):
            environment = {**os.environ, "CFLOW_PLUGIN_WEBHOOK_SECRET": _SECRET.decode()}
            process = subprocess.Popen([*map(str, command)], env=environment, stderr=subprocess.DEVNULL)
            until = time.monotonic() + random.uniform(4, 8) if run < kills else end
            while time.monotonic() < until and not (run == kills and len(set(receiver.got)) >= images):
                time.sleep(0.5)
                memory.append(psutil.Process(process.pid).memory_info().rss / 2**20)
            process.kill() if run < kills else process.terminate()
            process.wait()
        with (folder / "out/scores.csv").open(newline="") as table:
            rows = [row["image"] for row in csv.DictReader(table)]
        copies = sum(path.is_file() for path in (folder / "out/sorted").rglob("*.png"))
    found = {"rows": len(rows), "different": len(set(rows)), "copies": copies, "posts": len(receiver.got)}
    arrived = {"different posts": len(set(receiver.got)), "peak MB": max(memory), "all written": written.is_set()}
    print(json.dumps({"images": images, "kills": kills, **found, **arrived}))


if __name__ == "__main__":
    auto_cli({"cost": cost, "endurance": endurance}, as_positional=False)
