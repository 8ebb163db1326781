"""A device that computes on the CPU and else behaves as a GPU: its tensors meet no others.

Where there is no GPU it shows what only a GPU would: a tensor that was made or left on the CPU, a generator of the
CPU's, a look at NumPy's without ``cpu()``, numbers of 64 bits where a device has none. Importing this changes torch for
the whole process.
"""

import torch
from lightning.pytorch.accelerators import Accelerator
from torch.utils import backend_registration
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten

_NAME = "pretended"
_REFUSED: set[torch.dtype] = set()
_INDEXED = ("aten::index", "aten::index_put", "aten::index_put_", "aten::_index_put_impl_")
_MOVES = ("aten::_to_copy", "aten::copy_")


class _Module(backend_registration._DummyBackendModule):
    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        return [torch.bfloat16, torch.float16]


backend_registration._setup_privateuseone_for_python_backend(_NAME, _Module())
DEVICE = torch.device(_NAME, 0)


def lack_doubles() -> None:
    """From here on no tensor in double precision can be on the device."""
    _REFUSED.add(torch.float64)


class PretendedTensor(torch.Tensor):
    """A tensor on the device, which another one on the CPU computes for."""

    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, inner: torch.Tensor) -> "PretendedTensor":
        like = {"strides": inner.stride(), "storage_offset": inner.storage_offset(), "dtype": inner.dtype}
        return torch.Tensor._make_wrapper_subclass(cls, inner.size(), **like, device=DEVICE)

    def __init__(self, inner: torch.Tensor) -> None:
        self.inner = inner

    def tolist(self) -> object:
        """What torch refuses for subclasses."""
        return self.cpu().tolist()

    def as_subclass(self, cls: type) -> "PretendedTensor":
        """It can be of one kind only: images' and masks' own is dropped."""
        del cls
        return self

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        del types
        return _call(func, args, kwargs or {})


class Pretending(TorchDispatchMode):
    """Within it tensors can be made on the device and brought there."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        del types
        return _call(func, args, kwargs or {})


class PretendedAccelerator(Accelerator):
    """What Lightning has to know of it."""

    def setup_device(self, device: torch.device) -> None:
        pass

    def teardown(self) -> None:
        pass

    @staticmethod
    def parse_devices(devices: object) -> list[int]:
        del devices
        return [0]

    @staticmethod
    def get_parallel_devices(devices: object) -> list[torch.device]:
        del devices
        return [DEVICE]

    @staticmethod
    def auto_device_count() -> int:
        return 1

    @staticmethod
    def is_available() -> bool:
        return True

    @staticmethod
    def name() -> str:
        return _NAME


def _plain(value):
    if isinstance(value, PretendedTensor):
        return value.inner
    return torch.device("cpu") if isinstance(value, torch.device) and value == DEVICE else value


def _call(func, args, kwargs):
    name = func._schema.name
    flat, spec = tree_flatten((args, kwargs))
    there = [one for one in flat if isinstance(one, PretendedTensor)]
    here = [one for one in flat if isinstance(one, torch.Tensor) and not isinstance(one, PretendedTensor)]
    device = kwargs.get("device")
    goes = bool(there) if device is None else torch.device(device).type == _NAME
    if name in _INDEXED and there and isinstance(args[0], PretendedTensor):
        here = [one for one in here if len(args) > 2 and one is args[2]]  # indices may be on the CPU
    if there and name not in _MOVES and any(one.ndim for one in here):
        raise RuntimeError(f"{name}: tensors on two devices, {[one.shape for one in there + here]}")
    if goes and kwargs.get("generator") is not None:
        raise RuntimeError(f"{name}: a generator of the CPU's")
    arguments, keywords = tree_unflatten([_plain(value) for value in flat], spec)
    found = func(*arguments, **keywords)
    if not goes:
        return found
    known = {id(one.inner): one for one in there}  # operations in place give what they were given

    def wrapped(value):
        if value.dtype in _REFUSED:
            raise TypeError(f"{name}: the device has no {value.dtype}")
        return known[id(value)] if id(value) in known else PretendedTensor(value)

    return tree_map(lambda value: wrapped(value) if isinstance(value, torch.Tensor) else value, found)


def _empty(size, *, dtype=None, layout=None, device=None, pin_memory=None, memory_format=None):
    del layout, device, pin_memory, memory_format
    return PretendedTensor(torch.empty(size, dtype=dtype))


def _empty_strided(size, stride, *, dtype=None, layout=None, device=None, pin_memory=None):
    del layout, device, pin_memory
    return PretendedTensor(torch.empty_strided(size, stride, dtype=dtype))


def _copy_from(source, target, non_blocking=False):
    del non_blocking
    _plain(target).copy_(_plain(source))
    return target


# What torch itself calls below all modes, for ``torch.tensor(3, device=...)``.
_LIBRARY = torch.library.Library("aten", "IMPL")
_LIBRARY.impl("empty.memory_format", _empty, "PrivateUse1")
_LIBRARY.impl("empty_strided", _empty_strided, "PrivateUse1")
_LIBRARY.impl("_copy_from", _copy_from, "PrivateUse1")
