"""The loops that numba compiles: one pass over bfloat16, where torch takes four (symmetry/compiled.py says when).

All take bfloat16 as the whole numbers that have its bits, hold no lock of Python's, and do not know of threads.
"""

# mypy: disable-error-code="untyped-decorator"

from __future__ import annotations

from typing import Any

import numpy as np
from numba import njit, types, uint16, uint32
from numba.extending import intrinsic
from numpy.typing import NDArray

Bits = NDArray[np.uint16]
Index = NDArray[np.int64]

_TINY = np.finfo(np.float32).tiny
_BLOCK = 4096  # numbers in float32 that are held at once
_TOGETHER = 64  # summands in float32, before they are added in float64


def _same_bits(given: Any, wanted: Any) -> Any:
    """A function from a number of one type to the number of another that has the same bits."""

    def convert(context, number):  # type: ignore[no-untyped-def]
        def generate(context, builder, signature, arguments):  # type: ignore[no-untyped-def]
            return builder.bitcast(arguments[0], context.get_value_type(wanted))

        return wanted(given), generate

    return intrinsic(convert)


_as_float = _same_bits(types.uint32, types.float32)
_bits_of = _same_bits(types.float32, types.uint32)


@njit(inline="always")
def _number(bits):  # type: ignore[no-untyped-def]
    return _as_float(uint32(uint32(bits) << uint32(uint16(16))))


@njit(inline="always")
def _nearest(number):  # type: ignore[no-untyped-def]
    """The bits of the nearest number in bfloat16, the even one of two."""
    found = uint32(_bits_of(number))
    return uint16(uint32(found + uint32(0x7FFF) + ((found >> uint32(16)) & uint32(1))) >> uint32(16))


@njit(inline="always")
def _rounded(number):  # type: ignore[no-untyped-def]
    return _number(_nearest(number))


@njit(fastmath=True, nogil=True, cache=True)
def distances_of_rows(anchor: Bits, model: Bits, rows: Index, columns: Index, out: NDArray[np.float32]) -> None:
    """``out[i] = ‖anchor[rows[i]] − model[columns[i]]‖²``."""
    for i in range(len(rows)):
        a, b = anchor[rows[i]], model[columns[i]]
        total = np.float32(0)
        for k in range(len(a)):
            apart = _number(a[k]) - _number(b[k])
            total += apart * apart
        out[i] = total


@njit(fastmath=True, nogil=True, cache=True)
def distances_of_all_columns(anchor: Bits, model: Bits, out: NDArray[np.float64]) -> None:
    """``out[i] += ‖anchor[:, i] − model[:, i]‖²``."""
    part = np.zeros(len(out), np.float32)
    for k in range(len(anchor)):
        for i in range(len(out)):
            apart = _number(anchor[k, i]) - _number(model[k, i])
            part[i] += apart * apart
        if k % _TOGETHER == _TOGETHER - 1:
            out += part
            part[:] = 0
    out += part


@njit(fastmath=True, nogil=True, cache=True)
def distances_of_columns(anchor: Bits, model: Bits, rows: Index, columns: Index, out: NDArray[np.float64]) -> None:
    """``out[i] += ‖anchor[:, rows[i]] − model[:, columns[i]]‖²``."""
    part = np.zeros(len(out), np.float32)
    for k in range(len(anchor)):
        a, b = anchor[k], model[k]
        for i in range(len(out)):
            apart = _number(a[rows[i]]) - _number(b[columns[i]])
            part[i] += apart * apart
        if k % _TOGETHER == _TOGETHER - 1:
            out += part
            part[:] = 0
    out += part


@njit(fastmath=True, nogil=True, cache=True)
def planes(anchor: Bits, model: Bits, own: Index, other: Index, out: NDArray[np.float64]) -> None:
    """What planes of rows tell of each other: ``out[p]`` are the real and the imaginary part of ``Σ a conj(b)`` with
    ``a = anchor[own[p, 0]] + i anchor[own[p, 1]]`` (and ``b`` alike), then the squared norms of these four rows."""
    for p in range(len(own)):
        a, c = anchor[own[p, 0]], anchor[own[p, 1]]
        b, d = model[other[p, 0]], model[other[p, 1]]
        real = imaginary = own_first = own_partner = other_first = other_partner = 0.0
        for k in range(len(a)):
            x, y = np.float64(_number(a[k])), np.float64(_number(c[k]))
            u, v = np.float64(_number(b[k])), np.float64(_number(d[k]))
            real += x * u + y * v
            imaginary += y * u - x * v
            own_first += x * x
            own_partner += y * y
            other_first += u * u
            other_partner += v * v
        out[p, 0], out[p, 1] = real, imaginary
        out[p, 2], out[p, 3], out[p, 4], out[p, 5] = own_first, own_partner, other_first, other_partner


@njit(nogil=True, cache=True)
def add_task_vectors(
    base: Bits,
    models: tuple[Bits, ...],
    weights: NDArray[np.float32],
    over: NDArray[np.float32],
    out: Bits,
) -> bool:
    """``out = base + over[1] · Σ weights[m] (models[m] − base) / over[0]`` of flat tensors, every step rounded to
    bfloat16 as torch rounds it.

    Returns:
        Whether all numbers are numbers: what infinities leave is left to torch.
    """
    divisor, factor = over
    total, strange = np.empty(_BLOCK, np.float32), uint32(0)
    for start in range(0, len(base), _BLOCK):
        length = min(_BLOCK, len(base) - start)
        total[:] = 0
        own = base[start : start + length]
        for m in range(len(models)):
            other, weight = models[m][start : start + length], weights[m]
            for k in range(length):
                total[k] += _rounded(_rounded(_number(other[k]) - _number(own[k])) * weight)
        to = out[start : start + length]
        if divisor != 1 or factor != 1:
            for k in range(length):
                total[k] = _rounded(_rounded(_rounded(total[k]) / divisor) * factor)
        for k in range(length):
            found = _number(own[k]) + _rounded(total[k])
            strange |= uint32(found != found)
            to[k] = _nearest(found)
    return strange == 0


@njit(nogil=True, cache=True)
def whole_numbers(
    rows: Bits, dither: NDArray[np.float32], out: NDArray[np.int8], step: NDArray[np.float32], steps: int
) -> None:
    """Each row in steps of its own, so many of which reach its largest number, less a dither and rounded."""
    most = np.float32(steps)
    for i in range(len(rows)):
        row, to = rows[i], out[i]
        largest = uint16(0)
        for k in range(len(row)):
            largest = max(largest, uint16(row[k] & uint16(0x7FFF)))  # bits without a sign are in the numbers' order
        unit = max(_number(largest) / most, _TINY)
        step[i] = unit
        for k in range(len(row)):
            found = np.rint(_number(row[k]) / unit - dither[k])
            to[k] = np.int8(min(max(found, -most), most))


@njit(nogil=True, cache=True)
def scores(
    products: NDArray[np.int32],
    across: NDArray[np.float32],
    along: NDArray[np.float32],
    own: NDArray[np.float32],
    other: NDArray[np.float32],
    out: Bits,
) -> None:
    """``out = (products + along + across) · other · own`` in bfloat16, with one of own and across for each row."""
    for i in range(len(products)):
        row, to = products[i], out[i]
        for j in range(len(row)):
            to[j] = _nearest((np.float32(row[j]) + along[j] + across[i]) * other[j] * own[i])
