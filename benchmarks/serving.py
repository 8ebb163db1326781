"""What a request to `cflow-plugin serve` costs above the bare call, by ApacheBench (Debian: apache2-utils).

    python benchmarks/serving.py --model model.xml --image part.png

One and eight clients, one and two replicas, one thread each. The bare call is OpenVINO's, with one thread, of the image
that has been read; reading the file is of the service's share.
"""

import json
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from contextlib import suppress
from pathlib import Path

import numpy as np
from jsonargparse import auto_cli
from rich import box
from rich.table import Table
from training import publish

from cflow_plugin.deploy.runtime import compile_exported
from cflow_plugin.images.reading import read_image

_START = 300.0  # seconds


def bare(model: Path, image: Path, calls: int) -> dict[str, float]:
    """Milliseconds of a call, and of reading the image."""
    compiled = compile_exported(model, "CPU", "f32", threads=1)
    pixels = read_image(image, compiled.bits)[None]
    spent: dict[str, list[float]] = {"call": [], "read": []}
    for _ in range(calls):
        for name, function in (("call", lambda: compiled([pixels])), ("read", lambda: read_image(image))):
            start = time.perf_counter()
            function()
            spent[name].append(1000 * (time.perf_counter() - start))
    return {name: float(np.median(values)) for name, values in spent.items()}


def load(address: str, image: Path, requests: int, clients: int) -> dict[str, float]:
    """ApacheBench's figures."""
    command = ["ab", "-q", "-n", str(requests), "-c", str(clients), "-p", str(image), "-T", "image/png", address]
    text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    if not re.search(r"Failed requests: +0\n", text) or "Non-2xx" in text:
        raise SystemExit(text)
    figures = {f"p{share}": float(re.search(rf" {share}% +(\d+)", text)[1]) for share in (50, 95)}  # type: ignore[index]
    return {**figures, "a second": float(re.search(r"Requests per second: +([\d.]+)", text)[1])}  # type: ignore[index]


def main(model: Path, image: Path, requests: int = 200, output: Path = Path("results/benchmarks/serving")) -> None:
    """Serve a model, ask it, and write the figures as JSON and Markdown.

    Args:
        model: The .xml file that ``anomalib export`` wrote.
        image: An image file.
        requests: How many are sent by each client.
        output: Folder for the results.
    """
    if shutil.which("ab") is None:
        raise SystemExit("ApacheBench is not here: apt-get install apache2-utils")
    table = Table("clients", "replicas", "p50 ms", "p95 ms", "requests/s", box=box.MARKDOWN)
    alone = bare(model, image, requests)
    table.add_row("bare call", "", f"{alone['call']:.1f}", "", f"{1000 / alone['call']:.1f}")
    rows = []
    for replicas in (1, 2):
        with socket.create_server(("127.0.0.1", 0)) as free:
            port = free.getsockname()[1]
        command = [Path(sys.executable).parent / "cflow-plugin", "serve", "--models", model, "--port", port]
        command += ["--replicas", replicas, "--threads", 1]
        service = subprocess.Popen(
            [str(part) for part in command], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        try:
            address = f"http://127.0.0.1:{port}/score/{_name(port, service)}"
            load(address, image, 20, 4)
            for clients in (1, 8):
                found = load(address, image, requests * clients, clients)
                rows.append({"clients": clients, "replicas": replicas, **found})
                figures = (f"{found['p50']:.0f}", f"{found['p95']:.0f}", f"{found['a second']:.1f}")
                table.add_row(str(clients), str(replicas), *figures)
        finally:
            service.send_signal(signal.SIGINT)
            service.wait(60)
    publish("serving", table, {"bare": alone, "rows": rows}, output)


def _name(port: int, service: subprocess.Popen) -> str:
    """The model's name, once it is served."""
    end = time.monotonic() + _START
    while time.monotonic() < end and service.poll() is None:
        with suppress(OSError), urllib.request.urlopen(f"http://127.0.0.1:{port}/models", timeout=5) as answer:
            return json.load(answer)[0]
        time.sleep(1)
    raise SystemExit("The service did not start.")


if __name__ == "__main__":
    auto_cli(main, as_positional=False)
