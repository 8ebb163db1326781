"""What other systems lack, taken away here: double precision on Apple's processors, and Linux's way to write paths."""

import subprocess
import sys
from copy import deepcopy
from pathlib import Path, PureWindowsPath

import pytest
import torch
from torch import nn

from cflow_plugin.images.checking import _is_of_pillow
from cflow_plugin.images.listing import is_hidden, natural_order
from cflow_plugin.model.folded import FoldedFlow

from .test_folded import make_flow


class OnApple(torch.Tensor):
    """A tensor on a device without double precision: it refuses what Apple's would refuse, and leaves by ``cpu()``."""

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is torch.Tensor.cpu:
            return args[0].as_subclass(torch.Tensor)
        result = super().__torch_function__(func, types, args, kwargs)
        if isinstance(result, cls) and result.dtype == torch.float64:
            message = "Cannot convert a MPS Tensor to float64 dtype as the MPS framework doesn't support float64."
            raise TypeError(message)
        return result


def on_apple(module: nn.Module) -> nn.Module:
    for part in module.modules():
        for name, parameter in part.named_parameters(recurse=False):
            setattr(part, name, nn.Parameter(parameter.detach().as_subclass(OnApple), requires_grad=False))
        for name, buffer in part.named_buffers(recurse=False):
            setattr(part, name, buffer.as_subclass(OnApple))
    return module


def test_the_fake_is_as_strict_as_the_device():
    with pytest.raises(TypeError, match="float64"):
        torch.ones(2).as_subclass(OnApple).double()
    with pytest.raises(TypeError, match="float64"):
        torch.mul(torch.ones(2).as_subclass(OnApple), torch.ones(2, dtype=torch.float64))
    assert type(torch.ones(2).as_subclass(OnApple).cpu().double()) is torch.Tensor


@pytest.mark.parametrize("permutation", ["swap", "random", "soft"])
def test_without_double_precision(permutation):
    """Whitening is fitted and the decoders are folded all the same, to the same numbers."""
    features = torch.randn(2, 12, 3, 4)
    vectors = torch.randn(300, 12) @ torch.randn(12, 12)
    found = []
    for prepare, kind in ((lambda module: module, torch.Tensor), (on_apple, OnApple)):
        flow = prepare(make_flow(12, 8, permutation))
        flow.whitening.fit(vectors.as_subclass(kind))
        folded = FoldedFlow(flow, 3, 4)
        found.append(folded(features.as_subclass(kind)).as_subclass(torch.Tensor))
    torch.testing.assert_close(found[1], found[0])


def test_a_model_without_double_precision(trained):
    model = deepcopy(trained.model).eval()
    images = torch.rand(1, 3, 64, 64)
    with torch.no_grad():
        expected = model(images).anomaly_map
        found = on_apple(model)(images.as_subclass(OnApple)).anomaly_map.as_subclass(torch.Tensor)
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("separator", ["/", "\\"])
def test_pillow_is_recognised_on_every_system(separator):
    place = separator.join(["C:", "site-packages", "PIL", "ImageFile.py"])
    assert _is_of_pillow(RuntimeError(f'Caught OSError in DataLoader worker process 0.\n File "{place}", line 1'))
    assert not _is_of_pillow(RuntimeError("PIL"))


def test_paths_of_windows():
    paths = [PureWindowsPath(rf"C:\line\cam {number}\0.png") for number in (10, 9)]
    assert sorted(paths, key=natural_order) == paths[::-1]
    assert is_hidden(PureWindowsPath(r"good\.ipynb_checkpoints\0.png"))
    assert not is_hidden(PureWindowsPath(r"good\0.png"))


WITHOUT_UNIX = """
import sys
for name in ("resource", "fcntl", "pwd", "grp", "termios"):
    sys.modules[name] = None
import signal, os
for name in ("SIGKILL", "SIGUSR1", "SIGALRM", "alarm"):
    if hasattr(signal, name):
        delattr(signal, name)
for name in ("fork", "geteuid", "getuid"):
    if hasattr(os, name):
        delattr(os, name)
from cflow_plugin.commands.cli import main
main(sys.argv[1:])
"""


@pytest.mark.long
@pytest.mark.parametrize("command", ["monitor", "score", "watch", "configs"])
def test_commands_start_without_what_unix_alone_has(command, tmp_path):
    run = subprocess.run(
        [sys.executable, "-c", WITHOUT_UNIX, command, "--help"], cwd=tmp_path, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr[-2000:]
    assert "usage: cflow-plugin" in run.stdout


def test_no_module_needs_what_unix_alone_has():
    """Imports at the top of a file; those in functions have a way around them, which test_machine.py takes."""
    root = Path(__file__).parent.parent / "cflow_plugin"
    found = [
        f"{file.name}: {line}"
        for file in root.rglob("*.py")
        for line in file.read_text(encoding="utf-8").splitlines()
        if line.startswith(("import ", "from ")) and line.split()[1] in {"resource", "fcntl", "pwd", "grp", "termios"}
    ]
    assert not found
