"""A watch that goes on: with a model whose score is the image's brightness, so that each result is known beforehand."""

import csv
import os
import signal
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import cv2
import numpy as np
import pytest

from cflow_plugin import CflowError
from cflow_plugin.commands.watch import arrivals as arriving
from cflow_plugin.commands.watch.journal import Journal, Result
from cflow_plugin.commands.watch.watch import watch

from .brightness import save_brightness_model
from .conftest import run_in_small_space


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_brightness_model(tmp_path_factory.mktemp("model") / "model.xml")


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "in").mkdir()
    return tmp_path / "in"


def picture(shade):
    return cv2.imencode(".png", np.full((8, 8, 3), shade, np.uint8))[1].tobytes()


def table(output):
    path = output / "scores.csv"
    with (path if path.exists() else Path(os.devnull)).open(newline="") as file:
        return list(csv.DictReader(file))


def until(condition, seconds=60):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not come in time"
        time.sleep(0.02)


class Running:
    """A watch in a thread, ended by its limit."""

    def __init__(self, *arguments, **settings):
        self.error = None
        self._thread = threading.Thread(target=self._run, args=arguments, kwargs=settings, daemon=True)
        self._thread.start()

    def _run(self, *arguments, **settings):
        try:
            watch(*arguments, follow=True, **settings)
        except BaseException as error:
            self.error = error

    def join(self):
        self._thread.join(60)
        assert not self._thread.is_alive()
        if self.error:
            raise self.error


def test_files_as_they_arrive(model, folder, tmp_path, monkeypatch):
    """Earlier ones, later ones, one that is written slowly, one that is moved into place, one replaced, one damaged."""
    monkeypatch.setattr(arriving, "_PATIENCE", 2.0)
    (folder / "9.png").write_bytes(picture(90))
    (folder / "10.png").write_bytes(picture(100))
    output = folder / "results"  # within what is watched: its own pictures are not taken for new ones
    running = Running(model, str(folder), output, limit=6, sort=True, unsure=(0.2, 0.5))
    until(lambda: len(table(output)) == 2)
    slow = picture(200)
    with (folder / "slow.png").open("wb") as file:
        file.write(slow[:40])
        file.flush()
        os.utime(folder / "slow.png", (time.time() - 5, time.time() - 5))
        time.sleep(0.6)
        assert len(table(output)) == 2
        file.write(slow[40:])
    until(lambda: len(table(output)) == 3)
    (tmp_path / "moved.png").write_bytes(picture(110))
    (folder / "deeper").mkdir()
    (tmp_path / "moved.png").rename(folder / "deeper/moved.png")
    until(lambda: len(table(output)) == 4)
    (folder / "9.png").write_bytes(picture(91))
    until(lambda: len(table(output)) == 5)
    (folder / "damaged.png").write_bytes(b"nothing")
    os.utime(folder / "damaged.png", (1, 1))
    running.join()
    shades = {"9.png": 90, "10.png": 100, "slow.png": 200, "deeper/moved.png": 110}
    assert [row["image"] for row in table(output)] == [*shades, "9.png"]
    for row, shade in zip(table(output), [*shades.values(), 91], strict=True):
        assert float(row["score"]) == pytest.approx(shade / 255, abs=1e-5)
        assert row["anomalous"] == str(int(shade > 127))
    found = {path.relative_to(output / "sorted").as_posix() for path in (output / "sorted").rglob("*.png")}
    # 110 / 255 = 0.431 has 7 of 21 reference scores above it, so a p-value of 8 / 22.
    assert found == {
        *("good/9.png", "good/9.5.png", "good/10.png"),
        *("anomalous/slow.png", "unsure/deeper/moved.png", "unreadable/damaged.png"),
    }
    assert (output / "sorted/good/9.5.png").read_bytes() == picture(91)
    assert not list((output / "sorted").glob(".*"))


def test_a_pattern_and_what_no_event_tells_of(model, folder, tmp_path, monkeypatch):
    (folder / "a").mkdir()
    (folder / "a/1.png").write_bytes(picture(10))
    (folder / "a/1.bmp").write_bytes(picture(20))
    running = Running(model, f"{folder}/*/*.png", tmp_path / "pattern", limit=2)
    until(lambda: len(table(tmp_path / "pattern")) == 1)
    (folder / "a/2.png").write_bytes(picture(30))
    running.join()
    assert [row["image"] for row in table(tmp_path / "pattern")] == ["a/1.png", "a/2.png"]

    monkeypatch.setattr("watchdog.observers.Observer.start", lambda self: (_ for _ in ()).throw(OSError("no more")))
    running = Running(model, str(folder), tmp_path / "folder", limit=4)
    until(lambda: len(table(tmp_path / "folder")) == 3)
    (folder / "3.png").write_bytes(picture(40))
    running.join()
    assert {row["image"] for row in table(tmp_path / "folder")} == {"a/1.png", "a/1.bmp", "a/2.png", "3.png"}


PROGRAM = "from cflow_plugin.commands.cli import main; main()"


@pytest.mark.long
def test_killed_again_and_again(model, folder, tmp_path):
    """Each image has one line and one copy in the end, with its own score, and a second watch is kept out."""
    command = [sys.executable, "-c", PROGRAM, "watch", "--model", model, "--source", folder, "--output"]
    command = [*map(str, command), str(tmp_path / "out"), "--follow", "true", "--sort", "true", "--overlays", "false"]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parent.parent)}
    generator, count = np.random.default_rng(0), 0
    shades = {}
    for _ in range(5):
        process = subprocess.Popen(command, env=environment, stderr=subprocess.PIPE)
        before = len(table(tmp_path / "out"))
        for _ in range(80):
            shades[f"{count}.png"] = int(generator.integers(256))
            (folder / f"{count}.png").write_bytes(picture(shades[f"{count}.png"]))
            count += 1
        until(lambda before=before: len(table(tmp_path / "out")) > before + 5)
        process.kill()
        process.wait()
    with (tmp_path / "out/scores.csv").open("a") as file:
        file.write("17,half a li")
    process = subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True)
    until(lambda: len(table(tmp_path / "out")) >= count)
    with pytest.raises(CflowError, match="Another watch"):
        watch(model, str(folder), tmp_path / "out", follow=True)
    process.send_signal(signal.SIGTERM)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 0, said
    rows = {row["image"]: row for row in table(tmp_path / "out")}
    assert len(table(tmp_path / "out")) == len(rows) == count
    for image, shade in shades.items():
        assert float(rows[image]["score"]) == pytest.approx(shade / 255, abs=1e-5)
    copies = [path for path in (tmp_path / "out/sorted").rglob("*") if path.is_file()]
    assert sorted(path.name for path in copies) == sorted(shades)
    for path in copies:
        assert path.parent.name == rows[path.name]["decision"]


FILL = """
"$@" & watch=$!; trap "kill -9 $watch 2>/dev/null" EXIT
lines() { wc -l < out/scores.csv 2>/dev/null || echo 0; }
wait_for() { for i in $(seq 600); do [ "$(lines)" -ge "$1" ] && return; sleep 0.1; done; exit 9; }
cp ../in/early/* ../in/seen; wait_for 4
dd if=/dev/zero of=filler bs=4k 2>/dev/null; cp ../in/late/* ../in/seen
sleep 3; during=$(lines); rm filler; wait_for 304; kill $watch; wait $watch || exit 8
cp out/scores.csv ..; echo "during $during"; ls out/sorted/* | grep -c png
"""


@pytest.mark.long
def test_a_full_disk_is_waited_for(model, folder, tmp_path):
    """In a file system of 12 MB, filled to its last byte and then freed."""
    for name in ("early", "late", "seen", "../small"):
        (folder / name).mkdir()
    for number in range(303):
        (folder / ("early" if number < 3 else "late") / f"{number}.png").write_bytes(picture(number % 256))
    command = [sys.executable, "-c", PROGRAM, "watch", "--model", model, "--source", folder / "seen"]
    command += ["--output", "out", "--follow", "true", "--sort", "true", "--overlays", "false"]
    result = run_in_small_space(tmp_path / "small", "12m", ["sh", "-c", FILL, "sh", *command])
    assert result.returncode == 0, result.stderr
    assert "The disk is full" in result.stderr
    assert "There is space again" in result.stderr
    during, copies = result.stdout.split()[1:]
    assert int(during) < 304
    rows = table(tmp_path)
    assert len(rows) == int(copies) == 303
    for row in rows:
        assert float(row["score"]) == pytest.approx(int(Path(row["image"]).stem) % 256 / 255, abs=1e-5)


class Camera(BaseHTTPRequestHandler):
    """Motion JPEG, as network cameras send it; it ends after some frames."""

    frames, pause = 20, 0.02

    def do_GET(self):
        self.send_response(200)
        self.send_header("Content-Type", "multipart/x-mixed-replace; boundary=frame")
        self.end_headers()
        for number in range(self.frames):
            data = cv2.imencode(".jpg", np.full((48, 64, 3), 10 * (number % 20), np.uint8))[1].tobytes()
            head = f"--frame\r\nContent-Type: image/jpeg\r\nContent-Length: {len(data)}\r\n\r\n"
            self.wfile.write(head.encode() + data + b"\r\n")
            time.sleep(self.pause)

    def log_message(self, *arguments):
        pass


def serve_camera(port=0):
    server = ThreadingHTTPServer(("127.0.0.1", port), Camera)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    return server


@pytest.mark.long
def test_a_camera_that_goes_and_comes_back(model, tmp_path, caplog):
    server = serve_camera()
    port = server.server_port
    address = f"http://me:secret@127.0.0.1:{port}/"
    running = Running(model, address, tmp_path / "out", limit=45, overlays=False)
    until(lambda: len(table(tmp_path / "out")) >= 5)
    server.shutdown()
    server.server_close()
    until(lambda: "gives no images" in caplog.text)
    server = serve_camera(port)
    running.join()
    server.shutdown()
    server.server_close()
    rows = table(tmp_path / "out")
    assert len({row["image"] for row in rows}) == len(rows) == 45
    assert "secret" not in caplog.text
    assert all(0 <= float(row["score"]) < 0.8 for row in rows)


def start_rtsp_camera(port=0):
    script = Path(__file__).parent / "rtsp_camera.py"
    camera = subprocess.Popen(["/usr/bin/python3", str(script), str(port)], stdout=subprocess.PIPE, text=True)
    assert camera.stdout is not None
    return camera, camera.stdout.readline().strip()


@pytest.mark.long
def test_a_camera_by_rtsp_that_goes_and_comes_back(model, tmp_path, caplog, monkeypatch):
    """Told by GStreamer's server, for a test; each frame has the shade that it was sent with."""
    monkeypatch.setattr(arriving, "_LONGEST", 1.0)
    camera, address = start_rtsp_camera()
    if not address:
        pytest.skip("GStreamer's RTSP server is not here: see .ci/runtimes")
    try:
        running = Running(model, address, tmp_path / "out", limit=30, overlays=False)
        until(lambda: len(table(tmp_path / "out")) >= 5)
        camera.kill()
        until(lambda: "gives no images" in caplog.text)
        camera, again = start_rtsp_camera(int(address.split(":")[2].split("/")[0]))
        assert again == address
        running.join()
    finally:
        camera.kill()
    rows = table(tmp_path / "out")
    assert len({row["image"] for row in rows}) == len(rows) == 30
    assert [float(row["score"]) for row in rows] == pytest.approx([128 / 255] * 30, abs=0.01)


def test_a_camera_faster_than_the_model(tmp_path, monkeypatch):
    """What is taken is either given out or counted as dropped, and no more than one frame waits."""
    taken = []

    class Fast:
        def isOpened(self):  # noqa: N802  as OpenCV has it
            return True

        def get(self, what):
            return -1

        def read(self):
            taken.append(1)
            time.sleep(0.001)
            return True, np.full((2, 2, 3), len(taken) % 256, np.uint8)

        def release(self):
            pass

    monkeypatch.setattr(arriving, "open_capture", lambda source: Fast())
    health = arriving.Health()
    frames = arriving.arrivals("0", 8, lambda *_: False, health, tmp_path)
    shown = []
    for frame in frames:
        shown.append(frame)
        time.sleep(0.02)
        if len(shown) == 10:
            break
    frames.close()
    until(lambda: len(taken) - len(shown) - health.dropped in {0, 1})
    assert health.dropped > 10
    assert len({frame.name for frame in shown}) == 10


@pytest.mark.parametrize(("begin", "warned"), [(0.04, True), (0.05, False)])
def test_what_leaves_nothing_anomalous_is_said(tmp_path, folder, caplog, begin, warned):
    file = save_brightness_model(tmp_path / "model.xml")  # of 21 reference images
    (folder / "0.png").write_bytes(picture(100))
    watch(file, str(folder), tmp_path / "out", follow=True, limit=1, unsure=(begin, 0.1))
    assert ("Nothing will be called anomalous" in caplog.text) == warned


def test_old_frames_are_forgotten_once_those_have_them_who_are_told(tmp_path, monkeypatch):
    monkeypatch.setattr("cflow_plugin.commands.watch.journal._KEPT", 10)
    journal = Journal(tmp_path / "journal.sqlite")
    receivers = ["in use", "no longer in use"]
    assert [journal.told(name) for name in receivers] == [0, 0]
    values = dict.fromkeys(Result._fields, None) | {"stamp": "", "time": 0.0, "decision": "good"}
    for number in range(1, 51):
        journal.add(Result(**values | {"number": number, "image": str(number)}))
    journal.tell("in use", 30)
    journal.forget(["in use"])
    assert [one.number for one in journal.after(0)] == list(range(21, 51))
    journal.forget()
    assert [one.number for one in journal.after(0)] == list(range(41, 51))
    journal.close()


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"follow": True, "truth": Path("truth.npy")}, "--show and --truth"),
        ({"sort": True}, "--follow true"),
        ({"follow": True, "source": "absent"}, "nothing to follow at absent"),
        ({"follow": True, "unsure": (0.5, 0.1)}, "interval of p-values"),
        ({"follow": True, "unsure": (0.1, 0.5), "without": True}, "no reference scores"),
        ({"follow": True, "damaged": True}, "journal.sqlite could not be read"),
        ({"journal": True}, "belongs to a watch"),
    ],
)
def test_what_cannot_be_followed(model, folder, tmp_path, settings, words):
    output = tmp_path / "out"
    output.mkdir()
    if settings.pop("damaged", False):
        (output / "journal.sqlite").write_bytes(b"no database " * 100)
    if settings.pop("journal", False):
        Journal(output / "journal.sqlite").close()
    if settings.pop("without", False):
        model = save_brightness_model(tmp_path / "model.xml", None)
    with pytest.raises(CflowError, match=words):
        watch(model, **{"source": str(folder), "output": output, **settings})
