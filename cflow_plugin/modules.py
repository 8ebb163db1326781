"""What torch lacks: lists that know their modules, buffers of any shape or never rounded, numbers with all digits."""

__all__ = [
    "FullPrecision",
    "ModuleListOf",
    "as_on",
    "in_double",
    "in_full_single_precision",
    "take_shapes_from_checkpoints",
]

from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from typing import TYPE_CHECKING, Any, Generic, TypeVar

import torch
from torch import nn

AnyModule = TypeVar("AnyModule", bound=nn.Module)


class ModuleListOf(nn.ModuleList, Generic[AnyModule]):
    """A list of modules of one class, which type checkers know."""

    if TYPE_CHECKING:

        def __iter__(self) -> Iterator[AnyModule]: ...


class FullPrecision(nn.Module):
    """A module whose own buffers are never rounded to half precision: decisions hang on their last digits.

    Example:
        >>> module = FullPrecision()
        >>> module.register_buffer("threshold", torch.tensor(0.3))
        >>> module.half().threshold.dtype
        torch.float32
    """

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> Any:
        # What .to(), .half() and their like call.
        before = dict(self.named_buffers(recurse=False))
        super()._apply(fn, recurse)
        for name, buffer in before.items():
            applied = getattr(self, name)
            if applied.is_floating_point() and applied.itemsize < min(buffer.itemsize, torch.float32.itemsize):
                setattr(self, name, buffer.to(applied.device))
        return self


def in_double(tensor: torch.Tensor) -> torch.Tensor:
    """A tensor in double precision: where it is, or on the CPU if its device has none, as Apple's have not.

    Args:
        tensor: Any tensor.
    """
    try:
        return tensor.double()
    except (TypeError, RuntimeError):
        return tensor.cpu().double()


@contextmanager
def in_full_single_precision() -> Iterator[None]:
    """Let products of numbers in single precision keep all digits; scores hang on them.

    Torch's default rounds the factors of convolutions on Nvidia's GPUs to TF32, which has 11 bits, and those of all
    products on GPUs and some CPUs after ``torch.set_float32_matmul_precision``, as Lightning advises. What was set is
    set again afterwards.

    Example:
        >>> with in_full_single_precision():
        ...     torch.backends.cudnn.allow_tf32
        False
    """
    before = _roundings()
    products, convolutions, *rest = before
    full = ["highest" if products else None, None if convolutions is None else False, *["ieee"] * len(rest)]
    _round_as(full)
    try:
        yield
    finally:
        _round_as(before)


# Older and newer settings both: torch ends with an error where it finds them to disagree. Its compiler traces neither.
_untraced: Any = torch.compiler.disable


def _newer_settings() -> list[Any]:
    if not hasattr(torch.backends, "fp32_precision"):  # torch before 2.9
        return []
    backends: Any = torch.backends
    cuda, cudnn, mkldnn = backends.cuda, backends.cudnn, backends.mkldnn
    return [cuda.matmul, cudnn.conv, cudnn.rnn, mkldnn.matmul, mkldnn.conv, mkldnn.rnn]


@_untraced
def _roundings() -> list[Any]:
    products, convolutions = None, None
    with suppress(RuntimeError):  # as torch says of whoever uses the newer settings alone
        products = torch.get_float32_matmul_precision()
    with suppress(RuntimeError):
        convolutions = torch.backends.cudnn.allow_tf32
    return [products, convolutions, *(place.fp32_precision for place in _newer_settings())]


@_untraced
def _round_as(roundings: list[Any]) -> None:
    products, convolutions, *rest = roundings
    if products is not None:
        torch.set_float32_matmul_precision(products)
    if convolutions is not None:
        torch.backends.cudnn.allow_tf32 = convolutions
    for place, precision in zip(_newer_settings(), rest, strict=True):
        place.fp32_precision = precision


def as_on(tensor: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """A tensor in the number format and on the device of another one.

    Args:
        tensor: Any tensor.
        like: The other one.
    """
    return tensor.to(like.dtype).to(like.device)  # in this order: the device may lack the format


def take_shapes_from_checkpoints(module: nn.Module, with_dtypes: bool = False) -> None:
    """Let ``load_state_dict`` give a module's own buffers the shapes that it finds.

    Buffers of another number of dimensions are left alone, for ``load_state_dict`` to complain of.

    Args:
        module: The module.
        with_dtypes: Take over the number formats as well.

    Example:
        >>> module = nn.Module()
        >>> module.register_buffer("scores", torch.empty(0))
        >>> take_shapes_from_checkpoints(module)
        >>> module.load_state_dict({"scores": torch.ones(3)})
        <All keys matched successfully>
    """
    module.register_load_state_dict_pre_hook(partial(_take_shapes, with_dtypes))


def _take_shapes(with_dtypes: bool, module: nn.Module, state_dict: dict[str, Any], prefix: str, *_: Any) -> None:
    for name, buffer in module.named_buffers(recurse=False):
        given = state_dict.get(prefix + name)
        if isinstance(given, torch.Tensor) and given.ndim == buffer.ndim:
            dtype = given.dtype if with_dtypes else buffer.dtype
            setattr(module, name, torch.empty_like(given, device=buffer.device, dtype=dtype))
