"""What the CPU and other devices want of a kernel: small pieces that stay in a cache, or few and large steps.

To start a step of another device takes some microseconds, whatever its size. To read one number back, the CPU waits for
all steps before it, which takes about as long as to start ten.
"""

from __future__ import annotations

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
