"""Ray, where it is installed: joining a cluster or starting one on this machine."""

__all__ = ["cluster_slots", "connected", "why_failed"]

import logging
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType

from cflow_plugin.anomalib_patches.error_hook import explain
from cflow_plugin.errors import CflowError


@contextmanager
def connected(address: str | None, cpus: int | None = None) -> Iterator[ModuleType]:
    """Ray, connected to a cluster for as long as the context lasts.

    A connection that is there already is used, and kept.

    Args:
        address: ``host:port`` of a cluster's head, or ``auto`` on one of its machines. Without it a cluster of this
            machine alone is started, and ended again.
        cpus: CPUs of that one; by default this machine's.

    Yields:
        The module ``ray``.

    Raises:
        CflowError: If Ray is not installed, or there is no cluster at that address.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    try:
        import ray
        import ray.data
    except ImportError as error:
        message = '--engine ray needs Ray: pip install "cflow-plugin[ray]"'
        raise CflowError(message) from error
    if ray.is_initialized():
        yield ray
        return
    if address not in (None, "auto", "local"):
        check_reachable(address)
    try:
        if address:
            ray.init(address, log_to_driver=False, logging_level=logging.ERROR)
        else:
            ray.init("local", num_cpus=cpus, include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR)
    except (ConnectionError, RuntimeError, ValueError) as error:
        what = f"There is no Ray cluster at {address}" if address else "Ray could not be started on this machine"
        message = f"{what} ({str(error).strip().splitlines()[0]})"
        raise CflowError(message) from error
    try:
        yield ray
    finally:
        ray.shutdown()


def check_reachable(address: str) -> None:
    """Raise at once if nobody answers at an address; Ray itself would try for minutes."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    try:
        socket.create_connection((host, int(port)), timeout=10).close()
    except (OSError, ValueError) as error:
        message = f"There is no Ray cluster at {address} ({error}); --address takes host:port of its head, or auto."
        raise CflowError(message) from error


def cluster_slots(ray: ModuleType, threads: int) -> int:
    """How many workers fit into the cluster at once.

    Args:
        ray: The module, connected.
        threads: CPUs of a worker, which must be on one machine.

    Raises:
        CflowError: If no machine has that many.
    """
    cpus = [int(node["Resources"].get("CPU", 0)) for node in ray.nodes() if node["Alive"]]
    if max(cpus, default=0) < threads:
        message = (
            f"No machine of the cluster has {threads} CPUs (at most {max(cpus, default=0)}); choose fewer --threads."
        )
        raise CflowError(message)
    return sum(count // threads for count in cpus)


def why_failed(error: BaseException) -> str:
    """Say in a sentence why a task of Ray failed.

    Args:
        error: What Ray raised; the worker's own error is somewhere in it.
    """
    from ray.exceptions import ActorDiedError, NodeDiedError, RayTaskError, WorkerCrashedError

    if isinstance(error, WorkerCrashedError | NodeDiedError | ActorDiedError):
        return "its worker died, probably for lack of memory or with its machine."
    while True:
        inner = error.cause if isinstance(error, RayTaskError) else error.__cause__
        if inner is None or (isinstance(error, CflowError) and not isinstance(error, RayTaskError)):
            break
        error = inner
    return explain(error) or f"{type(error).__name__}: {error}".splitlines()[0]
