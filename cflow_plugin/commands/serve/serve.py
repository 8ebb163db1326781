"""Serve exported models to many clients."""

__all__ = ["find_models", "serve"]

import ipaddress
import logging
import os
import re
import secrets
import signal
import socket
import threading
from collections.abc import Sequence
from pathlib import Path
from types import FrameType
from typing import Literal

from cflow_plugin.commands.cluster import connected
from cflow_plugin.commands.score.scorer import Settings
from cflow_plugin.deploy.runtime import read_exported
from cflow_plugin.errors import CflowError

logger = logging.getLogger(__name__)

# Ray's processes load packages when they start; on a busy machine this takes longer than Ray waits by itself.
_PATIENCE = {"RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S": "60", "RAY_SERVE_PROXY_HEALTH_CHECK_TIMEOUT_S": "60"}

TOKEN = "CFLOW_PLUGIN_SERVE_TOKEN"
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]*")


def serve(
    models: Path,
    host: str = "127.0.0.1",
    port: int = 8000,
    replicas: int = 1,
    threads: int | None = None,
    address: str | None = None,
    device: str = "CPU",
    precision: Literal["f32", "bf16", "f16"] = "f32",
) -> None:
    """Serve exported models over HTTP, with Ray Serve, until interrupted.

    An image file sent to /score/NAME (``curl --data-binary @part.png http://127.0.0.1:8000/score/NAME``) is answered
    with score, decision, p-value and regions as JSON. Clients of the Open Inference Protocol (version 2) find the
    models below /v2/models. Ray batches what arrives at the same time, restarts what dies, and has metrics of it.
    It needs pip install "cflow-plugin[ray]".

    Args:
        models: Folder of exported models, .xml or .onnx; each is called what its file is, or where it lies in a folder
            of its own what that folder is called. Or one exported file.
        host: Address to listen on. Beyond this machine clients have to bring a token along, which is in the environment
            variable CFLOW_PLUGIN_SERVE_TOKEN, or else is made up and logged.
        port: Port to listen on.
        replicas: Processes for each model.
        threads: CPU threads of each; all by default.
        address: A Ray cluster's host:port, or auto on one of its machines, which all have to see the models' files.
            Without it Ray uses this machine.
        device: OpenVINO device, for example CPU, GPU or AUTO.
        precision: What OpenVINO computes in where a model is not INT8.
    """
    for name, value in {"replicas": replicas, "threads": threads}.items():
        if value is not None and value < 1:
            message = f"--{name} must be at least 1, got {value}."
            raise CflowError(message)
    found = find_models(models)
    for path in found.values():
        read_exported(path)  # raises before anything is started
    token = _token(host)
    _check_port(host, port)
    for name, value in _PATIENCE.items():
        os.environ.setdefault(name, value)
    try:
        from ray import serve as ray_serve

        from cflow_plugin.commands.serve.service import make_service
    except ImportError as error:
        message = 'serve needs Ray Serve: pip install "cflow-plugin[ray]"'
        raise CflowError(message) from error
    settings = {
        name: Settings(path.absolute(), Path.cwd(), False, device, precision, threads) for name, path in found.items()
    }
    stop = threading.Event()

    def end(number: int, frame: FrameType | None) -> None:
        del number, frame
        stop.set()

    with connected(address):
        try:
            ray_serve.start(http_options={"host": host, "port": port}, logging_config={"log_level": "WARNING"})
            ray_serve.run(make_service(settings, replicas, token), name="cflow_plugin", route_prefix="/")
            for name in found:
                logger.info("http://%s:%d/score/%s", host, port, name)
            if token is not None and not os.environ.get(TOKEN):
                logger.info("Clients send this header: Authorization: Bearer %s", token)
            logger.info("Serving. Ctrl-C ends it.")
            for number in (signal.SIGINT, signal.SIGTERM):
                signal.signal(number, end)
            stop.wait()
        finally:
            ray_serve.shutdown()


def find_models(models: Path, suffixes: Sequence[str] = ("xml", "onnx")) -> dict[str, Path]:
    """Exported files by the names that they are served under.

    Args:
        models: One of them, or a folder with files or folders, each of which holds one.
        suffixes: What their names end in.

    Raises:
        CflowError: If there are none, or two of one name, or a name that is none.
    """
    files = (
        [models]
        if models.is_file() and models.suffix[1:] in suffixes
        else sorted(path for end in suffixes for path in models.rglob(f"*.{end}"))
    )
    if not files:
        message = f"There is no exported model in {models}; `anomalib export --model CflowPlugin` writes one."
        raise CflowError(message)
    found: dict[str, Path] = {}
    for path in files:
        alone = path == models or path.parent == models
        name = path.stem if alone else path.relative_to(models).parts[0]
        if not _NAME.fullmatch(name):
            message = f"{path} would be served as {name!r}; names have letters, digits, dots, dashes and underscores."
            raise CflowError(message)
        if name in found:
            message = f"{found[name]} and {path} would both be served as {name!r}; give each a folder of its own."
            raise CflowError(message)
        found[name] = path
    return found


def _token(host: str) -> str | None:
    """What clients have to bring along, where others than this machine's own can reach the service."""
    try:
        is_own = ipaddress.ip_address("127.0.0.1" if host == "localhost" else host).is_loopback
    except ValueError as error:
        message = f"--host is an address, such as 127.0.0.1 or 0.0.0.0, got {host!r}."
        raise CflowError(message) from error
    return os.environ.get(TOKEN) or (None if is_own else secrets.token_urlsafe(24))


def _check_port(host: str, port: int) -> None:
    try:
        socket.create_server((host, port)).close()
    except (OSError, OverflowError) as error:
        message = f"Nothing can be served at {host}, port {port} ({error}): name another --port or --host."
        raise CflowError(message) from error
