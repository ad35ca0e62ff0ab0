"""What a kernel makes a device send to the CPU, and how many steps it starts there.

On a CUDA device torch's profiler tells. Elsewhere calls are counted: tensors stand for those of a device, and whatever
reads them on the CPU is noted. Tensors that a kernel makes of nothing are not known there, so the profiler finds more.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten

_NUMBERS = {"item", "__bool__", "__float__", "__int__", "__index__", "equal", "allclose"}
_TENSORS = {"cpu", "numpy", "tolist"}
_SHAPES = {"nonzero", "unique", "masked_select", "bincount"}


@dataclass
class Transfers:
    """Counts.

    Attributes:
        numbers: single numbers that the CPU waits for, sizes of results included.
        tensors: larger transfers to the CPU; the profiler counts numbers as such too.
        bytes: of the tensors.
        steps: operators, or on a CUDA device kernels.
    """

    numbers: int = 0
    tensors: int = 0
    bytes: int = 0
    steps: int = 0

    @property
    def waits(self) -> int:
        return self.numbers + self.tensors

    def as_dict(self) -> dict[str, int]:
        return asdict(self)


class OnDevice(Tensor):
    """A tensor of the CPU that stands for one on a device."""


def transfers(work: Callable[[Callable[[Tensor], Tensor]], object], device: torch.device) -> Transfers:
    """What ``work`` costs; it is given what brings a tensor to the device, which does not count."""
    return _profiled(work, device) if device.type == "cuda" else _counted(work)


def _counted(work: Callable[[Callable[[Tensor], Tensor]], object]) -> Transfers:
    found = Transfers()
    with _Steps(found), _Calls(found):
        work(lambda x: x.as_subclass(OnDevice))
    return found


class _Steps(TorchDispatchMode):
    """Counts operators but those that only look at a tensor in another way."""

    def __init__(self, found: Transfers) -> None:
        super().__init__()
        self.found = found

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.found.steps += not func.is_view
        return func(*args, **(kwargs or {}))


class _Calls(TorchFunctionMode):
    """Counts what is read of tensors that stand for a device's."""

    def __init__(self, found: Transfers) -> None:
        super().__init__()
        self.found = found

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name, given = getattr(func, "__name__", ""), tree_flatten((args, kwargs or {}))[0]
        there = [x for x in given if isinstance(x, OnDevice)]
        self._note(name, args, there)
        result = func(*args, **(kwargs or {}))
        if name == "cpu" or name == "numpy":
            return result.as_subclass(Tensor) if isinstance(result, Tensor) else result
        if name == "to" and any(isinstance(x, torch.device) for x in given):
            return result.as_subclass(OnDevice)
        return result

    def _note(self, name: str, args: Any, there: list[OnDevice]) -> None:
        masks = name in ("__getitem__", "__setitem__") and any(x.dtype is torch.bool for x in _tensors(args[1]))
        if there and (name in _NUMBERS or name in _SHAPES or masks):
            self.found.numbers += 1
        if there and name in _TENSORS:
            self.found.tensors += 1
            self.found.bytes += sum(x.nbytes for x in there)


def _tensors(x: Any) -> Iterator[Tensor]:
    return (y for y in tree_flatten(x)[0] if isinstance(y, Tensor))


def _profiled(work: Callable[[Callable[[Tensor], Tensor]], object], device: torch.device) -> Transfers:
    from torch.profiler import ProfilerActivity, profile

    def there(x: Tensor) -> Tensor:
        return x.to(device)

    work(there)  # libraries start, and take memory
    found = Transfers()
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiler:
        work(lambda x: x.to(device))
        torch.cuda.synchronize(device)
    for event in profiler.profiler.kineto_results.events():
        if event.device_type() != torch.autograd.DeviceType.CUDA:
            continue
        if "DtoH" in event.name():
            size = event.nbytes()
            found.numbers += size <= 8
            found.tensors += size > 8
            found.bytes += size
        elif "Memcpy" not in event.name() and "Memset" not in event.name():
            found.steps += 1
    return found
