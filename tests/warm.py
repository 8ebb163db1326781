"""Commands without their imports: a process imports what is needed once, and a copy of it (a fork) runs each command.

A copy runs the installed program's own file as ``__main__``, with its own arguments, folder, output and exit status, so
that all but the start of Python and the imports is as on a user's machine. Some tests start programs the usual way too.
"""

from __future__ import annotations

import atexit
import gc
import json
import os
import runpy
import signal
import subprocess
import sys
from contextlib import suppress
from importlib import import_module
from pathlib import Path

# What takes long to import. Of anomalib and this package, or, for tests of what is imported when, of others alone.
OURS = ("anomalib.cli.cli", "anomalib.engine", "anomalib.deploy", "cflow_plugin.commands.cli")
OURS += ("cflow_plugin.commands.compare", "cflow_plugin.commands.benchmark", "cflow_plugin.commands.import_checkpoint")
OURS += ("cflow_plugin.commands.make_scenes", "cflow_plugin.commands.monitor")
OTHERS = ("torch", "torchvision", "torchmetrics", "lightning", "timm", "cv2", "pandas", "sklearn.metrics", "openvino")
OTHERS += ("matplotlib.pyplot", "scipy.stats", "rich", "jsonargparse", "kornia", "omegaconf", "skimage.morphology")


class WarmProcess:
    """The process that is copied.

    Args:
        modules: What it imports; those that are not installed are left out.
    """

    def __init__(self, modules: tuple[str, ...]) -> None:
        command = [sys.executable, __file__, *modules]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def run(self, command: list[str], cwd: Path, environment: dict[str, str], log: Path) -> int:
        """Run a Python program's file (or ``-c`` and code) in a copy, and return its exit status."""
        request = {"command": command, "cwd": str(cwd), "environment": environment, "log": str(log)}
        print(json.dumps(request), file=self._process.stdin, flush=True)
        copy = self._answer()
        try:
            return self._answer()
        except BaseException:  # the test has run out of time
            os.killpg(copy, signal.SIGKILL)
            self._answer()
            raise

    def _answer(self) -> int:
        answer = self._process.stdout.readline()
        if not answer:
            raise RuntimeError("the process that commands are copied from has died")
        return int(answer)

    def close(self) -> None:
        self._process.stdin.close()
        self._process.wait(timeout=30)


def _serve(modules: list[str]) -> None:
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever prints while it is imported
    for name in modules:
        with suppress(ImportError):
            import_module(name)
    gc.freeze()  # what all copies share, none of them need go through
    for line in sys.stdin:
        request = json.loads(line)
        child = os.fork()
        if child == 0:
            return _become(request)
        print(child, file=answers, flush=True)
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), file=answers, flush=True)


def _become(request: dict) -> None:
    """Be the program; what it raises goes the way of all exceptions."""
    atexit.register(gc.unfreeze)  # what is never let go of, some libraries call a leak
    os.setsid()
    os.chdir(request["cwd"])
    os.environ.clear()
    os.environ.update(request["environment"])
    nothing, log = os.open(os.devnull, os.O_RDONLY), os.open(request["log"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    for source, target in ((nothing, 0), (log, 1), (log, 2)):
        os.dup2(source, target)
    program, *arguments = request["command"]
    if program == "-c":
        sys.argv = ["-c"]
        sys.path[0] = ""
        exec(compile(arguments[0], "<string>", "exec"), {"__name__": "__main__"})
    else:
        sys.argv = [program, *arguments]
        sys.path[0] = str(Path(program).parent)
        runpy.run_path(program, run_name="__main__")


if __name__ == "__main__":
    _serve(sys.argv[1:])
