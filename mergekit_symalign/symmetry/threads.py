"""How the work is divided among threads: in large pieces, each of which stays on one of them.

torch divides every single operation among all threads and waits for the last of them. For the blocks that pass through
here (a megabyte or less, small enough to stay in the cache) that waiting can take longer than the work, and many times
as long where another program holds one of the cores (docs/performance.md).
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from contextvars import ContextVar, copy_context
from functools import cache
from typing import TypeVar

import torch

from mergekit_symalign.symmetry import devices

Piece = TypeVar("Piece")
Result = TypeVar("Result")

_AT_ONCE = 2  # solves that go on side by side: each holds what it works on

_SHARED: ContextVar[int] = ContextVar("threads that the pieces may use", default=0)


@contextmanager
def one_thread() -> Iterator[None]:
    """Run torch's operations in one thread each; `in_parallel` still uses as many as there were before."""
    threads = torch.get_num_threads()
    token = _SHARED.set(_SHARED.get() or threads)
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
        _SHARED.reset(token)


def in_parallel(
    work: Callable[[Piece], Result], pieces: Sequence[Piece], device: torch.device | None = None
) -> list[Result]:
    """``[work(piece) for piece in pieces]``, on the CPU with one thread for each of several pieces at a time.

    The result does not depend on the number of threads if the pieces do not.

    Args:
        work: called in other threads; it must not write to anything that the pieces share.
        pieces: of about the same size.
        device: where the work is done; anything but the CPU has its own parallelism, and gets the pieces in turn.
    """
    if device is not None and not devices.on_cpu(device):
        return [work(piece) for piece in pieces]
    threads = _threads()
    with one_thread():
        if min(threads, len(pieces)) <= 1:
            return [work(piece) for piece in pieces]
        return list(_pool(threads).map(_as_here(work), pieces))


def two_at_a_time(
    work: Callable[[Piece], Result], pieces: Sequence[Piece], device: torch.device | None = None
) -> list[Result]:
    """``[work(piece) for piece in pieces]`` for work that is itself divided by `in_parallel`, two pieces at a time.

    Both share the threads: while one does what cannot be divided, the other has them all. On a CUDA device both put
    their steps on this thread's stream: while the CPU assigns the neurons of one, the device works for the other.

    Args:
        work, pieces, device: as for `in_parallel`.
    """
    stream = _shared_stream(device)
    alone = _threads() <= 1 if device is None or devices.on_cpu(device) else stream is None
    if alone or len(pieces) <= 1:
        return [work(piece) for piece in pieces]
    with one_thread(), ThreadPoolExecutor(_AT_ONCE, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        contexts, run = [copy_context() for _ in pieces], _as_here(work, stream)
        if _threads() == _AT_ONCE:  # nothing is gained where each has a thread of its own, and both wait for the lock
            for context in contexts:
                context.run(_SHARED.set, 1)
        return list(pool.map(lambda context, piece: context.run(run, piece), contexts, pieces))


def _shared_stream(device: torch.device | None) -> torch.cuda.Stream | None:
    """The stream on which this thread's steps go, which other threads can take up; None if this is no CUDA device."""
    if device is None or device.type != "cuda" or not torch.cuda.is_available():
        return None
    return torch.cuda.current_stream(device)


def _threads() -> int:
    return _SHARED.get() or torch.get_num_threads()


def _as_here(work: Callable[[Piece], Result], stream: torch.cuda.Stream | None = None) -> Callable[[Piece], Result]:
    """The same work in another thread, with the gradient modes of this one, and on a stream if there is one."""
    inference, grad = torch.is_inference_mode_enabled(), torch.is_grad_enabled()

    def run(piece: Piece) -> Result:
        with torch.inference_mode(inference), torch.set_grad_enabled(grad), torch.cuda.stream(stream):
            return work(piece)

    return run


@cache
def _pool(threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(threads, "symalign", initializer=torch.set_num_threads, initargs=(1,))


if hasattr(os, "register_at_fork"):  # Windows has no fork
    os.register_at_fork(after_in_child=_pool.cache_clear)  # threads do not survive one
