"""Which numbers the products of many neurons are taken in: those that this processor multiplies fastest.

Processors differ in this more than in anything else: some have units for 8-bit numbers, some for bfloat16, some for
neither, and what a unit promises is not what a library makes of it. So a small part of the first block is multiplied in
each of them, and the fastest is kept for the life of the process. All lead to the same optimum (coarse.py, bfloat.py
and quantized.py): they only differ in what is left to be compared exactly.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from enum import Enum
from threading import Lock

from mergekit_symalign.symmetry.threads import one_thread

_RUNS = 3  # of which the fastest counts, after one that is not timed


class Numbers(Enum):
    """What a product is taken in."""

    whole = "8-bit"
    bfloat16 = "bfloat16"
    float32 = "float32"


Ways = Mapping[Numbers, Callable[[], Callable[[], object]]]
"""For each kind of numbers that is possible: what prepares a part of the work, and gives what is measured of it."""

_MEASURING = Lock()
_MEASURED: dict[tuple[str, int, frozenset[Numbers]], Mapping[Numbers, float]] = {}


def fastest(purpose: str, coordinates: int, ways: Ways) -> Numbers:
    """The kind of numbers in which this CPU is fastest, in one thread; measured once for each purpose and length.

    Args:
        purpose: of the product.
        coordinates: length of its rows; lengths of the same power of two share a measurement.
        ways: what is measured; a single one is not.
    """
    if len(ways) == 1:
        return next(iter(ways))
    key = (purpose, coordinates.bit_length(), frozenset(ways))
    with _MEASURING:  # never two at a time: they would slow each other down
        if key not in _MEASURED:
            with one_thread():
                _MEASURED[key] = {numbers: _seconds(way()) for numbers, way in ways.items()}
    times = _MEASURED[key]
    return min(times, key=times.__getitem__)


def measured() -> Mapping[str, Mapping[str, float]]:
    """What was measured so far: seconds by purpose, and by kind of numbers."""
    return {
        f"{purpose}, {1 << length - 1} to {(1 << length) - 1} coordinates": {n.value: s for n, s in times.items()}
        for (purpose, length, _), times in _MEASURED.items()
    }


def _seconds(work: Callable[[], object]) -> float:
    work()
    return min(_timed(work) for _ in range(_RUNS))


def _timed(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start
