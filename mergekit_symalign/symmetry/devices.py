"""What the CPU and other devices want of a kernel: small pieces that stay in a cache, or few and large steps.

To start a step of another device takes some microseconds, whatever its size. To read one number back, the CPU waits for
all steps before it, which takes about as long as to start ten.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

_FILLING = 1 << 25  # numbers that a device is given at once: 128 MB in float32


def on_cpu(device: torch.device) -> bool:
    """Whether work on tensors of this device is done by the CPU."""
    return device.type == "cpu"


def are_all(conditions: Tensor) -> bool:
    """Whether all of them hold. Asks the device: for once in a step, not once for each head or row."""
    return bool(conditions.all())


def at_once(device: torch.device, in_cache: int) -> int:
    """How many numbers are worked on at once, if the CPU's cache holds so many."""
    return in_cache if on_cpu(device) else max(in_cache, _FILLING)


def whole_numbers(values: Sequence[int], device: torch.device) -> Tensor:
    """int64 [values] on a device. Coordinates of heads and planes count evenly, or in two halves that do: they are made
    there, as a transfer would wait for all that the device has been given."""
    half = len(values) // 2
    for parts in ([values], [values[:half], values[half:]]):
        counted = [_counting(part) for part in parts]
        if all(list(part) == list(numbers) for part, numbers in zip(parts, counted, strict=True)):
            return torch.cat([torch.arange(x.start, x.stop, x.step, device=device) for x in counted])
    return torch.tensor(values, dtype=torch.int64, device=device)


def _counting(values: Sequence[int]) -> range:
    """As many numbers that begin like these; as far as they rise."""
    if not values:
        return range(0)
    step = values[1] - values[0] if len(values) > 1 else 1
    return range(values[0], values[0] + step * len(values), step) if step > 0 else range(0)
