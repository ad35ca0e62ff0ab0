"""Large tensors a piece at a time, where what is done to one piece does not depend on the others.

Every step over a whole tensor takes fresh memory, and on the CPU the kernel's work to hand it out costs more than the
arithmetic. What is held for a piece stays in the cache, and is used again for the next (docs/performance.md).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from mergekit_symalign.symmetry.threads import in_parallel

PIECE = 1 << 19  # numbers of a tensor that are worked on at once
MERGED = 1 << 20  # numbers of all models together that are merged at once


def is_large(x: Tensor) -> bool:
    """Whether a tensor is worth dividing here; a GPU has its own parallelism and keeps freed memory."""
    return x.device.type == "cpu" and x.ndim > 0 and x.numel() > PIECE


def in_pieces(work: Callable[[int, int], Tensor], shape: torch.Size, dim: int, most: int) -> Tensor:
    """A tensor, computed in ranges of dimension ``dim`` by ``work(start, length)``.

    Args:
        work: of a range; what it gives must not depend on where the ranges begin and end.
        shape: of the whole.
        dim: along which it is divided.
        most: numbers in a range.
    """
    size = shape[dim]
    step = max(1, most * size // shape.numel())
    output = work(0, 1).new_empty(shape)  # a range of one tells the dtype

    def write(start: int) -> None:
        length = min(step, size - start)
        output.narrow(dim, start, length).copy_(work(start, length))

    in_parallel(write, range(0, size, step), output.device)
    return output
