"""The service for many clients, over its port, with models whose score is the image's brightness."""

import base64
import http.client
import json
import os
import re
import signal
import socket
import subprocess
import sys
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import cv2
import numpy as np
import openvino as ov
import psutil
import pytest

from cflow_plugin import CflowError
from cflow_plugin.commands.make_repository import make_repository
from cflow_plugin.commands.score.parts import Row
from cflow_plugin.commands.serve.protocol import RequestError, answer, image_of
from cflow_plugin.commands.serve.serve import serve

from .brightness import save_brightness_model
from .test_follow import until

TOKEN = "a token of the test's"


def picture(shade, size=(8, 8)):
    return cv2.imencode(".png", np.full((*size, 3), shade, np.uint8))[1].tobytes()


def bomb():
    """A PNG of 40000×40000 pixels in a few kilobytes."""

    def chunk(kind, data):
        return len(data).to_bytes(4, "big") + kind + data + zlib.crc32(kind + data).to_bytes(4, "big")

    header = (40000).to_bytes(4, "big") * 2 + bytes([8, 0, 0, 0, 0])
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + chunk(b"IDAT", zlib.compress(bytes(40001)))
        + chunk(b"IEND", b"")
    )


def request(data, datatype="UINT8", shape=(1, 8, 8, 3), **more):
    tensor = {"name": "image", "datatype": datatype, "shape": list(shape), "data": data}
    return json.dumps({"inputs": [tensor], **more}).encode()


FLAT = [0] * 192
BAD_TENSORS = [
    b"",
    b"{",
    b"null",
    b"[" * 5000,
    b"{}",
    b'{"inputs": []}',
    b'{"inputs": [1]}',
    b'{"inputs": {"name": "image"}}',
    request(FLAT, id=3),
    request(FLAT, "FP32"),
    request(FLAT, None),
    request(FLAT, ["UINT8"]),
    request(FLAT, shape=(1, 8, 8)),
    request(FLAT, shape=(2, 8, 4, 3)),
    request(FLAT, shape=(1, 8, 8, 1)),
    request(FLAT, shape=(1, -8, -8, 3)),
    request(FLAT, shape=(1, 8.0, 8, 3)),
    request(FLAT, shape=(1, 10**30, 8, 3)),
    request(FLAT[1:]),
    request("0" * 192),
    request([256] * 192),
    request([-1] * 192),
    request([0.5] * 192),
    request([10**30] * 192),
    request([True] * 192),
    request([None] * 192),
    request([[0], [0, 1]]),
    request([], "BYTES", (1,)),
    request(["a", "b"], "BYTES", (1,)),
    request([3], "BYTES", (1,)),
    request(["not base64!"], "BYTES", (1,)),
]


@pytest.mark.parametrize("content", BAD_TENSORS)
def test_what_is_no_request(content):
    with pytest.raises(RequestError):
        image_of(content)


def test_pixels_flat_or_nested_and_files():
    pixels = np.random.default_rng(0).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    for data in (pixels.ravel().tolist(), pixels[None].tolist()):
        image, number = image_of(request(data, id="7"))
        assert number == "7"
        assert np.array_equal(image, pixels)
    deep, number = image_of(request((pixels.ravel().astype(int) * 256).tolist(), "UINT16"))
    assert deep.dtype == np.uint16
    assert number is None
    assert np.array_equal(deep, pixels.astype(np.uint16) * 256)
    assert image_of(request([base64.b64encode(b"content").decode()], "BYTES", (1,)))[0] == b"content"


def test_an_answer_has_no_p_value_where_there_is_none():
    row = Row("", 0.5, True, None, None, 8, 8, "[]")
    assert [output["name"] for output in answer("a", None, row)["outputs"]] == ["pred_score", "pred_label", "regions"]


def test_models_that_cannot_be_served(tmp_path):
    with pytest.raises(CflowError, match="no exported model"):
        serve(tmp_path)
    (tmp_path / "bad.xml").write_text("<nothing/>")
    with pytest.raises(CflowError, match="could not be read"):
        serve(tmp_path)
    (tmp_path / "bad.xml").unlink()
    save_brightness_model(tmp_path / "a b.xml")
    with pytest.raises(CflowError, match="'a b'"):
        serve(tmp_path)
    (tmp_path / "a b.xml").unlink()
    for folder in ("part/first", "part/second"):
        (tmp_path / folder).mkdir(parents=True)
        save_brightness_model(tmp_path / folder / "model.xml")
    with pytest.raises(CflowError, match="both be served as 'part'"):
        serve(tmp_path)
    one = tmp_path / "part/first/model.xml"
    for host in ("example.org", "999.0.0.1"):
        with pytest.raises(CflowError, match="--host"):
            serve(one, host)
    with pytest.raises(CflowError, match="--replicas"):
        serve(one, replicas=0)
    with socket.create_server(("127.0.0.1", 0)) as taken, pytest.raises(CflowError, match="another --port"):
        serve(one, port=taken.getsockname()[1])


def test_a_repository_for_other_servers(tmp_path):
    (tmp_path / "models/line2/weights").mkdir(parents=True)
    save_brightness_model(tmp_path / "models/line1.xml")
    save_brightness_model(tmp_path / "models/line2/weights/model.xml")
    repository = tmp_path / "repository"
    (tmp_path / "other.onnx").touch()
    with pytest.raises(CflowError, match="no exported model"):
        make_repository(tmp_path / "other.onnx", repository)
    make_repository(tmp_path / "models", repository)
    listed = json.loads((repository / "config.json").read_text())["model_config_list"]
    assert [entry["config"] for entry in listed] == [
        {"name": name, "base_path": f"/models/{name}"} for name in ("line1", "line2")
    ]
    for name in ("line1", "line2"):
        model = ov.Core().read_model(repository / name / "1/model.xml")
        text = (repository / name / "config.pbtxt").read_text()
        assert text.startswith(f'name: "{name}"\nbackend: "openvino"\n')
        for port in [*model.inputs, *model.outputs]:
            assert f'name: "{port.get_any_name()}"' in text
        assert "dims: [-1, 3, -1, -1]" in text
    with pytest.raises(CflowError, match="there already"):
        make_repository(tmp_path / "models", repository)


class Service:
    """``cflow-plugin serve`` in a process of its own."""

    def __init__(self, folder: Path, models: Path, *arguments: str) -> None:
        with socket.create_server(("127.0.0.1", 0)) as free:
            self.port = free.getsockname()[1]
        self.log = folder / "log"
        command = [Path(sys.executable).parent / "cflow-plugin", "serve", "--models", models, "--port", str(self.port)]
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                [*command, "--threads", "1", *arguments],
                stdout=log,
                stderr=log,
                env={**os.environ, "RAY_USAGE_STATS_ENABLED": "0", "CFLOW_PLUGIN_SERVE_TOKEN": TOKEN},
            )
        until(lambda: self.process.poll() is not None or "Ctrl-C" in self.log.read_text(), 500)
        assert self.process.poll() is None, self.log.read_text()

    def ask(self, method, path, body=b"", token=TOKEN):
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        headers = {} if token is None else {"Authorization": f"Bearer {token}"}
        connection.request(method, path, body, headers)
        answered = connection.getresponse()
        return answered.status, json.loads(answered.read() or b"null")

    def end(self):
        self.process.send_signal(signal.SIGINT)
        self.process.wait(60)


@pytest.fixture(scope="module")
def service(tmp_path_factory):
    pytest.importorskip("ray.serve", reason='Ray Serve is not installed: pip install "cflow-plugin[ray]"')
    folder = tmp_path_factory.mktemp("service")
    (folder / "models/line2/weights").mkdir(parents=True)
    save_brightness_model(folder / "models/line1.xml")
    save_brightness_model(folder / "models/line2/weights/model.xml")
    service = Service(folder, folder / "models")
    yield service
    service.end()


pytestmark = pytest.mark.timeout(900)


@pytest.mark.long
def test_images_in_decisions_out(service):
    assert service.ask("GET", "/models") == (200, ["line1", "line2"])
    assert service.ask("GET", "/v2/health/live", token=None) == (200, {"live": True})
    assert service.ask("GET", "/v2/models/line1/ready")[0] == 200
    described = service.ask("GET", "/v2/models/line2")[1]
    assert described["inputs"] == [{"name": "image", "datatype": "UINT8", "shape": [1, -1, -1, 3]}]
    for name in ("line1", "line2"):
        for shade in (0, 100, 255):
            status, found = service.ask("POST", f"/score/{name}", picture(shade, (16, 24)))
            assert status == 200
            assert found["model"] == name
            assert found["score"] == pytest.approx(shade / 255, abs=1e-3)
            assert found["anomalous"] == (shade > 127)
            assert (found["width"], found["height"]) == (24, 16)
    pixels = request([100] * 192, id="mine")
    file = request([base64.b64encode(picture(100)).decode()], "BYTES", (1,))
    for body, number in ((pixels, "mine"), (file, None)):
        status, found = service.ask("POST", "/v2/models/line1/infer", body)
        assert status == 200
        assert found.get("id") == number
        tensors = {tensor["name"]: tensor["data"] for tensor in found["outputs"]}
        assert tensors["pred_score"] == [pytest.approx(100 / 255, abs=1e-3)]
        assert tensors["pred_label"] == [False]


@pytest.mark.long
def test_a_client_of_the_protocol_that_knows_nothing_of_us(service):
    clients = pytest.importorskip("tritonclient.http", reason='pip install "tritonclient[http]"')
    headers = {"Authorization": f"Bearer {TOKEN}"}
    with clients.InferenceServerClient(f"127.0.0.1:{service.port}") as client:
        assert client.is_server_live(headers)
        assert client.is_model_ready("line1", headers=headers)
        [described] = client.get_model_metadata("line1", headers=headers)["inputs"]
        pixels = np.full((1, 16, 24, 3), 200, np.uint8)
        given = clients.InferInput(described["name"], pixels.shape, described["datatype"])
        given.set_data_from_numpy(pixels, binary_data=False)
        names = ("pred_score", "pred_label", "p_value")
        wanted = [clients.InferRequestedOutput(name, binary_data=False) for name in names]
        found = client.infer("line1", [given], outputs=wanted, headers=headers, request_id="7")
        score, label, p_value = (found.as_numpy(name) for name in names)
        assert (score.dtype, label.dtype, p_value.dtype) == (np.float32, np.bool_, np.float64)
        assert score == pytest.approx(200 / 255, abs=1e-3)
        assert label.tolist() == [True]
        assert p_value == pytest.approx(1 / 22)
        assert found.get_response()["id"] == "7"


@pytest.mark.long
def test_many_clients_at_once_each_have_their_own_answer(service):
    shades = list(range(0, 256, 4)) * 3
    with ThreadPoolExecutor(8) as clients:
        found = list(clients.map(lambda shade: service.ask("POST", "/score/line1", picture(shade)), shades))
    assert {status for status, _ in found} == {200}
    np.testing.assert_allclose([answered["score"] for _, answered in found], np.array(shades) / 255, atol=1e-3)


BAD = [
    ("POST", "/score/line3", picture(0), 404),
    ("POST", "/score/..%2Fline1", picture(0), 404),
    ("POST", "/score/", picture(0), 404),
    ("POST", "/score/line1/x", picture(0), 404),
    ("GET", "/score/line1", b"", 405),
    ("DELETE", "/v2/models/line1", b"", 405),
    ("GET", "/v2/health/else", b"", 404),
    ("GET", "/etc/passwd", b"", 404),
    ("GET", "/docs", b"", 404),
    ("POST", "/score/line1", b"", 422),
    ("POST", "/score/line1", b"no image", 422),
    ("POST", "/score/line1", picture(0)[:40], 422),
    ("POST", "/score/line1", bomb(), 422),
    ("POST", "/score/line1", b"<svg xmlns='http://www.w3.org/2000/svg'/>", 422),
    ("POST", "/score/line1", bytes(65 * 2**20), 413),
    ("POST", "/v2/models/line3/infer", request(FLAT), 404),
    ("POST", "/v2/models/line1/infer", request([0] * 192, "UINT16"), 422),
    ("POST", "/v2/models/line1/infer", request([base64.b64encode(b"x").decode()], "BYTES", (1,)), 422),
    *[("POST", "/v2/models/line1/infer", content, 400) for content in BAD_TENSORS],
]


@pytest.mark.long
def test_bad_requests_do_no_harm(service):
    for method, path, body, expected in BAD:
        status, found = service.ask(method, path, body)
        assert status == expected, (method, path, body[:50], found)
        assert "Traceback" not in str(found)
    for token in (None, "", "another", TOKEN + "x"):
        for method, path in (("GET", "/models"), ("POST", "/score/line1"), ("POST", "/v2/models/line1/infer")):
            assert service.ask(method, path, b"", token)[0] == 401
    with socket.create_connection(("127.0.0.1", service.port)) as slow:  # says that it sends, and does not
        head = f"POST /score/line1 HTTP/1.1\r\nHost: x\r\nContent-Length: 99\r\nAuthorization: Bearer {TOKEN}\r\n\r\n"
        slow.sendall(head.encode())
        assert service.ask("POST", "/score/line1", picture(50))[0] == 200


@pytest.mark.long
def test_a_replica_that_dies_is_started_again(service):
    replicas = [
        process
        for process in psutil.Process(service.process.pid).children(recursive=True)
        if re.match(r"ray::ServeReplica:cflow_plugin:line2", process.name() + " ".join(process.cmdline()))
        or "ServeReplica:cflow_plugin:line2" in " ".join(process.cmdline())
    ]
    assert len(replicas) == 1
    replicas[0].kill()
    until(lambda: service.ask("POST", "/score/line2", picture(200))[0] == 200, 120)
    assert service.ask("POST", "/score/line1", picture(200))[0] == 200
