"""Gram matrices of what linear layers read, summed batch by batch."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from mergekit_symalign.activations.inputs import Shared
from mergekit_symalign.activations.linear import Rows, Use

_BLOCKS = 6  # along the diagonal; of the products on both sides of it, one is computed
_LEAST = 128  # columns of a block
_EXACT_BYTES = 2 << 30  # up to this size, sums over batches are kept in float64


@dataclass(frozen=True)
class Gram:
    """What was found of one input.

    Attributes:
        names: of the tensors that read it.
        squares: Σ x xᵀ / tokens in float32, [in, in], or [in] of a diagonal one; experts first where there are some.
        mean: Σ x / tokens, [in].
        tokens: that reached it; one number for each expert.
    """

    names: tuple[str, ...]
    squares: Tensor
    mean: Tensor
    tokens: int | tuple[int, ...]


class GramSum:
    """Sums products of rows with themselves.

    Products of a batch are taken in the dtype of the rows. Sums over batches are kept in float64, or in that dtype
    where they would take more than 2 GiB.

    Args:
        width: numbers of a row.
        experts: how many sums there are; None for one.
        full: whether whole matrices are wanted, or their diagonals.
    """

    def __init__(self, width: int, experts: int | None, *, full: bool) -> None:
        self._experts, self._full, self._width = experts, full, width
        self._squares: Tensor | None = None
        self._sum: Tensor | None = None
        self._count = [0] * (experts or 1)

    def add(self, rows: Tensor, expert: int | None = None) -> None:
        """Count some rows [rows, in] in."""
        if self._squares is None or self._sum is None:
            self._squares, self._sum = self._zeros(rows)
        at = expert or 0
        self._count[at] += len(rows)
        if len(rows):
            self._sum[at] += rows.sum(0)
            if self._full:
                add_products(self._squares[at], rows)
            else:
                self._squares[at] += rows.square().sum(0)

    def found(self, names: tuple[str, ...]) -> Gram:
        """The sums by tokens. The accumulator is used up."""
        if self._squares is None or self._sum is None:
            self._squares, self._sum = self._zeros(torch.zeros(0))
        squares, mean, counts = self._squares, self._sum, tuple(self._count)
        self._squares = self._sum = None
        for one, total, count in zip(squares, mean, counts, strict=True):
            if self._full:
                mirror(one)
            one /= max(count, 1)
            total /= max(count, 1)
        squares, mean = squares.float(), mean.float()
        return (
            Gram(names, squares, mean, counts)
            if self._experts is not None
            else Gram(names, squares[0], mean[0], counts[0])
        )

    def _zeros(self, like: Tensor) -> tuple[Tensor, Tensor]:
        count = self._experts or 1
        shape = (count, self._width, self._width) if self._full else (count, self._width)
        exact = torch.Size(shape).numel() * 8 <= _EXACT_BYTES
        squares = torch.zeros(shape, dtype=torch.float64 if exact else like.dtype, device=like.device)
        return squares, torch.zeros(count, self._width, dtype=torch.float64, device=like.device)


def add_products(total: Tensor, rows: Tensor) -> None:
    """Add rowsᵀ · rows to the blocks on and right of the diagonal, in place.

    Args:
        total: [in, in]. What is below the diagonal blocks stays as it is, until `mirror` fills it.
        rows: [rows, in].
    """
    for start, end in _blocks(len(total)):
        total[start:end, start:] += rows[:, start:end].mT @ rows[:, start:]


def mirror(total: Tensor) -> None:
    """Make a matrix symmetric by what stands on and right of its diagonal, in place, block by block."""
    for start, end in _blocks(len(total)):
        block = total[start:end, start:end]
        block.copy_(block.triu() + block.triu(1).mT)
        total[end:, start:end] = total[start:end, end:].mT


def _blocks(width: int) -> list[tuple[int, int]]:
    size = max(_LEAST, -(-width // _BLOCKS))
    return [(start, min(start + size, width)) for start in range(0, width, size)]


class GramSums:
    """The sums of several inputs.

    Args:
        inputs: those that are wanted.
        full: whether whole matrices are wanted, or their diagonals.
    """

    def __init__(self, inputs: Iterable[Shared], *, full: bool) -> None:
        self._names = {shared.names[0]: shared.names for shared in inputs}
        self._sums = {shared.names[0]: GramSum(shared.width, shared.experts, full=full) for shared in inputs}

    def note(self, use: Use, rows: Rows) -> None:
        """Count a use in, if its input is wanted and this tensor stands for it."""
        if use.name in self._sums:
            self.add(use.name, rows.of(use).detach(), use.expert)

    def add(self, name: str, rows: Tensor, expert: int | None) -> None:
        self._sums[name].add(rows, expert)

    def found(self) -> Iterable[Gram]:
        """One after another, so that none is kept that was written."""
        while self._sums:
            name = next(iter(self._sums))
            yield self._sums.pop(name).found(self._names[name])
