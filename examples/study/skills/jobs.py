"""Rows measured one after another, or by several processes at once."""

from __future__ import annotations

import multiprocessing
import os
import traceback
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict
from functools import partial

import torch

from ..store import Row, Store
from ..sweep import reproducible
from .comparison import Comparison, Job
from .measuring import threads


def measure_all(jobs: Iterable[Job], comparison: Comparison, store: Store, workers: int) -> None:
    """Measure what the results lack of these rows, and write each as it comes.

    Rows whose files are gone (a model, its statistics) are measured again for the sake of the files. A row that fails
    says so and is left out: the others are worth having.

    Args:
        workers: processes; 1: this one.
    """
    missing = [job for job in jobs if not store.has(**asdict(job)) or not comparison.kept(job)]
    for job, row in zip(missing, _rows(missing, comparison.row, workers), strict=True):
        name = f"{job.part} {job.seed} {job.arm} {job.variant}"
        if isinstance(row, str):
            print(f"{name} FAILED: {row}", flush=True)
        else:
            store.measure(asdict(job), lambda found=row: found)
            print(name, flush=True)


def lacking(jobs: Iterable[Job], store: Store) -> bool:
    """Whether a row of these is missing."""
    return any(not store.has(**asdict(job)) for job in jobs)


def _rows(jobs: Sequence[Job], measure: Callable[[Job], Row], workers: int) -> Iterator[Row | str]:
    attempted = partial(_attempted, measure)
    if workers == 1 or len(jobs) < 2:
        yield from map(attempted, jobs)
        return
    spawn = multiprocessing.get_context("spawn")  # CUDA does not survive a fork
    with ProcessPoolExecutor(workers, mp_context=spawn, initializer=_start, initargs=(threads(workers),)) as pool:
        yield from pool.map(attempted, jobs)


def _attempted(measure: Callable[[Job], Row], job: Job) -> Row | str:
    """The row, or what went wrong."""
    try:
        return measure(job)
    except (Exception, SystemExit) as error:  # commands end by SystemExit
        traceback.print_exc()
        return f"{type(error).__name__}: {error}"


def _start(count: int) -> None:
    settle()
    torch.set_num_threads(count)


def settle() -> None:
    """The same numbers each time on the same machine, on a GPU as far as torch can; no progress bars."""
    reproducible()
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True, warn_only=True)
