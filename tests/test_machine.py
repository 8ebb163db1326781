import builtins
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import psutil
import pytest

from cflow_plugin.commands import machine
from cflow_plugin.commands.machine import describe_machine, peak_resident_bytes, processor


def test_peak_memory_is_in_bytes_and_remembered():
    before = psutil.Process().memory_info().rss
    block = np.ones(2**25)
    del block
    peak = peak_resident_bytes()
    # The kernel counts in each processor, and sums up roughly.
    assert peak >= before + 2**28 - 2**24
    assert peak < psutil.virtual_memory().total


class NoStatus(type(Path())):
    def exists(self, **_):
        return False


@pytest.fixture
def elsewhere(monkeypatch):
    """A system without /proc, where psutil reports what the test says."""

    def become(platform, **memory):
        monkeypatch.setattr(machine, "Path", NoStatus)
        monkeypatch.setattr(machine.sys, "platform", platform)
        monkeypatch.setattr(
            machine.psutil, "Process", lambda: SimpleNamespace(memory_info=lambda: SimpleNamespace(**memory))
        )

    return become


@pytest.fixture
def without_resource(monkeypatch):
    original = builtins.__import__

    def refuse(name, *arguments, **settings):
        if name == "resource":
            raise ImportError(name)
        return original(name, *arguments, **settings)

    monkeypatch.setattr(builtins, "__import__", refuse)


@pytest.mark.usefixtures("without_resource")
def test_windows_has_a_peak_of_its_own(elsewhere):
    elsewhere("win32", rss=5, peak_wset=7)
    assert peak_resident_bytes() == 7


@pytest.mark.usefixtures("without_resource")
def test_without_resource_and_peak_there_is_still_a_figure(elsewhere):
    elsewhere("emscripten", rss=5)
    assert peak_resident_bytes() == 5


@pytest.mark.parametrize(("platform", "unit"), [("darwin", 1), ("freebsd14", 1024)])
def test_the_unit_of_getrusage(elsewhere, monkeypatch, platform, unit):
    elsewhere(platform, rss=5)
    fake = SimpleNamespace(RUSAGE_SELF=0, getrusage=lambda _: SimpleNamespace(ru_maxrss=1000))
    monkeypatch.setitem(sys.modules, "resource", fake)
    assert peak_resident_bytes() == 1000 * unit


@pytest.mark.long
def test_the_commands_start_where_there_is_no_resource():
    program = (
        "import sys, psutil  # which on Linux needs it itself\n"
        "sys.modules['resource'] = None\n"
        "import cflow_plugin.commands.benchmark, cflow_plugin.commands.compare\n"
        "from cflow_plugin.commands.machine import peak_resident_bytes\n"
        "print(peak_resident_bytes())"
    )
    finished = subprocess.run([sys.executable, "-W", "ignore", "-c", program], capture_output=True, text=True)
    assert finished.returncode == 0, finished.stderr
    assert int(finished.stdout.split()[-1]) > 2**20


def test_the_machine_is_described():
    described = describe_machine(3)
    assert described["threads"] == 3
    assert described["processor"] == processor() != ""
    assert described["versions"]["torch"].startswith("torch ")
