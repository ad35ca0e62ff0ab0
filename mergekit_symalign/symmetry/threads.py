"""How many threads a computation uses, where torch's choice is a bad one."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def one_thread() -> Iterator[None]:
    """Run decompositions of many small matrices in one thread.

    LAPACK divides each of them among all threads, which takes longer than the decomposition itself: somewhat on a free
    machine, and a hundred times as long where another program holds one of the cores (docs/performance.md).
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
