"""Receivers that are real: an HTTP server that checks signatures, and a broker, each of which goes away for a while."""

import base64
import hashlib
import hmac
import json
import os
import shutil
import socket
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from cflow_plugin import CflowError
from cflow_plugin.commands.watch.watch import watch

from .conftest import ROOT
from .test_follow import PROGRAM, Running, folder, model, picture, table, until  # noqa: F401  fixtures

SECRET = b"a secret of both"


class Server:
    """Keeps what it is sent, in order; answers 503 while it is ill."""

    def __init__(self, port=0):
        self.got, self.ill, self.refused = [], False, 0
        server = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self):
                body = self.rfile.read(int(self.headers["Content-Length"]))
                identifier, moment = self.headers["webhook-id"], self.headers["webhook-timestamp"]
                expected = hmac.new(SECRET, f"{identifier}.{moment}.".encode() + body, hashlib.sha256).digest()
                assert self.headers["webhook-signature"] == "v1," + base64.b64encode(expected).decode()
                if server.ill:
                    server.refused += 1
                    self.send_response(503)
                else:
                    server.got.append((identifier, json.loads(body)))
                    self.send_response(204)
                self.end_headers()

            def log_message(self, *arguments):
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", port), Handler)
        self.port = self._server.server_port
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def close(self):
        self._server.shutdown()
        self._server.server_close()


def test_a_webhook_that_is_away(model, folder, tmp_path, monkeypatch, caplog):  # noqa: F811
    """It is ill, then gone, then back: each result arrives once, in order, with what the table says."""
    monkeypatch.setenv("CFLOW_PLUGIN_WEBHOOK_SECRET", SECRET.decode())
    server = Server()
    address = f"http://127.0.0.1:{server.port}/results?token=hidden"
    running = Running(model, str(folder), tmp_path / "out", limit=10, webhook=address)
    for number in range(3):
        (folder / f"{number}.png").write_bytes(picture(60 * number))
    until(lambda: len(server.got) == 3)
    server.ill = True
    for number in range(3, 6):
        (folder / f"{number}.png").write_bytes(picture(20 * number))
    until(lambda: server.refused and len(table(tmp_path / "out")) == 6)
    server.close()
    got = server.got
    assert len(got) == 3
    server = Server(server.port)
    for number in range(6, 9):
        (folder / f"{number}.png").write_bytes(picture(20 * number))
    until(lambda: len(server.got) == 6)
    (folder / "last.png").write_bytes(picture(200))
    running.join()
    server.close()
    got += server.got
    assert [body["image"] for _, body in got] == [row["image"] for row in table(tmp_path / "out")]
    assert len({identifier for identifier, _ in got}) == 10
    for (identifier, body), row in zip(got, table(tmp_path / "out"), strict=True):
        assert body["id"] == identifier
        assert body["score"] == pytest.approx(float(row["score"]), abs=1e-6)
        assert body["decision"] == row["decision"]
        areas = [region["area"] for region in body["regions"]]
        assert areas == ([64] if body["decision"] == "anomalous" else [])
    assert "503" in caplog.text
    assert "hidden" not in caplog.text


@pytest.mark.long
def test_a_webhook_of_a_watch_that_is_killed(model, folder, tmp_path):  # noqa: F811
    """All arrive; one that comes twice, since its answer was cut off, has the same identifier and content."""
    server = Server()
    command = [sys.executable, "-c", PROGRAM, "watch", "--model", model, "--source", folder, "--output"]
    command = [*map(str, command), str(tmp_path / "out"), "--follow", "true", "--overlays", "false"]
    command += ["--webhook", f"http://127.0.0.1:{server.port}/"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "CFLOW_PLUGIN_WEBHOOK_SECRET": SECRET.decode()}
    for number in range(400):
        (folder / f"{number}.png").write_bytes(picture(number % 256))
    for _ in range(3):
        before = len(server.got)
        process = subprocess.Popen(command, env=environment, stderr=subprocess.PIPE)
        until(lambda before=before: len(server.got) > before + 20)
        process.kill()
        process.wait()
    process = subprocess.Popen(command, env=environment, stderr=subprocess.PIPE)
    until(lambda: len({identifier for identifier, _ in server.got}) == 400)
    process.terminate()
    process.wait(60)
    server.close()
    bodies = dict(server.got)
    assert {body["image"] for body in bodies.values()} == {f"{number}.png" for number in range(400)}
    assert all(bodies[identifier] == body for identifier, body in server.got)
    assert len(server.got) <= 403


@pytest.mark.long
def test_a_broker_that_is_away(model, folder, tmp_path):  # noqa: F811
    client = pytest.importorskip("paho.mqtt.client", reason="paho-mqtt is not installed")
    program = shutil.which("mosquitto") or shutil.which("mosquitto", path="/usr/sbin")
    if program is None:
        pytest.skip("there is no mosquitto here: apt-get install mosquitto")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]

    def start():
        (tmp_path / "broker.conf").write_text(f"listener {port} 127.0.0.1\nallow_anonymous true\n")
        broker = subprocess.Popen([program, "-c", tmp_path / "broker.conf"], stderr=subprocess.DEVNULL)
        until(lambda: socket.socket().connect_ex(("127.0.0.1", port)) == 0)
        listener = client.Client(client.CallbackAPIVersion.VERSION2)
        listener.on_connect = lambda listener, *_: listener.subscribe("line/3", qos=1)
        ready = threading.Event()
        listener.on_subscribe = lambda *_: ready.set()
        listener.on_message = lambda _, __, message: got.append(json.loads(message.payload))
        listener.connect("127.0.0.1", port)
        listener.loop_start()
        assert ready.wait(30)
        return broker, listener

    got = []
    broker, listener = start()
    running = Running(model, str(folder), tmp_path / "out", limit=6, mqtt=f"mqtt://127.0.0.1:{port}/line/3")
    for number in range(3):
        (folder / f"{number}.png").write_bytes(picture(number))
    until(lambda: len(got) == 3)
    listener.loop_stop()
    broker.kill()
    broker.wait()
    for number in range(3, 5):
        (folder / f"{number}.png").write_bytes(picture(number))
    until(lambda: len(table(tmp_path / "out")) == 5)
    broker, listener = start()
    until(lambda: len(got) == 5)
    (folder / "5.png").write_bytes(picture(5))
    running.join()
    until(lambda: len(got) == 6)
    listener.loop_stop()
    broker.kill()
    broker.wait()
    assert [message["image"] for message in got] == [f"{number}.png" for number in range(6)]
    assert len({message["id"] for message in got}) == 6


@pytest.mark.parametrize(
    ("settings", "secret", "words"),
    [
        ({"webhook": "ftp://host/"}, "s", "begins with http"),
        ({"webhook": "http://host/"}, "", "CFLOW_PLUGIN_WEBHOOK_SECRET"),
        ({"mqtt": "mqtt://host"}, "s", "--mqtt takes"),
        ({"mqtt": "mqtt://host/all/#"}, "s", "--mqtt takes"),
        ({"mqtt": "mqtt://me:pass@host/topic"}, "s", "CFLOW_PLUGIN_MQTT_PASSWORD"),
    ],
)
def test_addresses_that_cannot_be_used(model, folder, tmp_path, monkeypatch, settings, secret, words):  # noqa: F811
    monkeypatch.setenv("CFLOW_PLUGIN_WEBHOOK_SECRET", secret)
    if "mqtt" in settings:
        pytest.importorskip("paho.mqtt.client", reason="paho-mqtt is not installed")
    with pytest.raises(CflowError, match=words) as caught:
        watch(model, str(folder), tmp_path / "out", follow=True, **settings)
    assert "pass@" not in str(caught.value)
