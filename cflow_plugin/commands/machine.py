"""The machine that figures were measured on: its processor, versions, and how much memory a process took."""

__all__ = ["describe_machine", "peak_resident_bytes", "processor"]

import platform
import sys
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TypedDict

import psutil

_PACKAGES = ("cflow-plugin", "anomalib", "torch", "openvino", "onnxruntime", "nncf")


class Machine(TypedDict):
    """What figures depend on beside the code.

    Attributes:
        date: When, in UTC and ISO format.
        processor: Name of the processor.
        system: Operating system.
        threads: Threads that were used.
        versions: Name and version of each package that matters, by its name.
    """

    date: str
    processor: str
    system: str
    threads: int
    versions: dict[str, str]


def describe_machine(threads: int) -> Machine:
    """What figures depend on beside the code.

    Args:
        threads: Threads that are used.
    """
    versions = {}
    for package in _PACKAGES:
        try:
            versions[package] = f"{package} {version(package)}"
        except PackageNotFoundError:
            continue
    return {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "processor": processor(),
        "system": platform.platform(),
        "threads": threads,
        "versions": versions,
    }


def processor() -> str:
    """The processor's name, for example ``Intel(R) Core(TM) i7-9700K CPU @ 3.60GHz``."""
    import cpuinfo  # takes its time on some systems, where it starts other programs

    return cpuinfo.get_cpu_info().get("brand_raw") or platform.processor() or platform.machine()


def peak_resident_bytes() -> int:
    """The most memory that this process has held, in bytes."""
    # Linux: unlike ``getrusage``, this forgets the process that started this one.
    status = Path("/proc/self/status")
    if status.exists():
        peaks = [line.split()[1] for line in status.read_text().splitlines() if line.startswith("VmHWM")]
        if peaks:
            return int(peaks[0]) * 1024
    memory = psutil.Process().memory_info()
    if hasattr(memory, "peak_wset"):  # Windows
        return memory.peak_wset
    try:
        import resource
    except ImportError:  # no peak is known; the memory of now is at most that
        return memory.rss
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # bytes on macOS, kilobytes elsewhere
