"""Whether a device finds what the CPU finds."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from gpu.solvers import Kernel
from gpu.stand_in import no_int8_products, routes_of

CPU = torch.device("cpu")
TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-4}  # of angles, matrices and factors; distances relative
DTYPES = tuple(TOLERANCE)


def deviation(kernel: Kernel, device: torch.device, dtype: torch.dtype) -> float:
    """The largest difference of a number found on a device and on the CPU.

    Raises:
        AssertionError: if they do not find the same kinds of elements, the same permutation or the same route, if a
            number differs by more than rounding, or if a tensor is on another device.
    """
    expected = kernel(CPU, dtype)
    with routes_of(device), no_int8_products():
        found = kernel(device, dtype)
    assert found.keys() == expected.keys(), f"found {sorted(found.keys() ^ expected.keys())} on one of the two only"
    return max((_apart(name, expected[name], found[name], device, dtype) for name in expected), default=0.0)


def _apart(name: str, one: Any, other: Any, device: torch.device, dtype: torch.dtype) -> float:
    if isinstance(other, Tensor):
        assert other.device.type == device.type, f"{name} is on {other.device}"
        one, other = one.cpu(), other.cpu()
        if not one.is_floating_point():
            assert torch.equal(one, other), f"{name}: {int((one != other).sum())} of {one.numel()} differ"
            return 0.0
        apart = float((one - other).abs().max()) if one.numel() else 0.0
    elif isinstance(one, float):
        apart = _relative(one, other, dtype)
    else:
        assert one == other, f"{name}: {other}, on the CPU {one}"
        return 0.0
    assert apart <= TOLERANCE[dtype], f"{name}: off by {apart:.1e}"
    return apart


def _relative(one: float, other: float, dtype: torch.dtype) -> float:
    """Of two distances; below the rounding of the dtype there is no difference."""
    return abs(one - other) / max(abs(one), abs(other), torch.finfo(dtype).eps * 1e4)
