"""Distances and scores of all pairs of neurons from products in bfloat16, with how far each may be from the truth.

Most checkpoints hold bfloat16, so nothing is lost by multiplying it. Products are added up in float32; only the result
is rounded to eight binary digits, which moves it by less than a share that is known. Norms go through the product as
six more columns, so that a result is a squared distance, and none is negative: then their bits are in the order of
whole numbers, which are compared many times faster.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import ceil

import torch
from torch import Tensor

from mergekit_symalign.symmetry.assignment.shortlist import Scores
from mergekit_symalign.symmetry.neurons.coarse import TwoNearest
from mergekit_symalign.symmetry.neurons.tiles import two_nearest
from mergekit_symalign.symmetry.options import Pair
from mergekit_symalign.symmetry.rows import SLACK, copy_rows
from mergekit_symalign.symmetry.threads import in_parallel

_ROUNDING = 2.0**-8  # of a number: how far bfloat16 may be from it, at most
_OFFSET = 4 * SLACK  # of the norms, which keeps results from being negative
_HIDDEN = _OFFSET + 2 * SLACK  # of the norms: the offset, and what sums in float32 may be off
_PARTS = 3  # numbers in bfloat16 that together are as precise as one in float32
_MULTIPLE = 32  # columns of which units for bfloat16 take together
_ROWS = 1024  # of the anchor that are multiplied at once


@dataclass(frozen=True)
class BfloatRows:
    """Rows of anchor and model in bfloat16, with their norms as more columns: their product is a squared distance.

    Attributes:
        anchor: bfloat16 [neurons, k'].
        model: bfloat16 [neurons, k'].
        norms: float32 [neurons], squared norms of the anchor's.
        share: how far rounding to bfloat16 moved a row, as a share of its length.
    """

    anchor: Tensor
    model: Tensor
    norms: Tensor
    share: float

    @staticmethod
    def rounded(anchor: Tensor, model: Tensor) -> BfloatRows:
        """From float32 [neurons, k] each."""
        a, b = anchor.bfloat16(), model.bfloat16()
        exact = torch.equal(a.float(), anchor) and torch.equal(b.float(), model)
        own, other = (x.float().square().sum(1) for x in (a, b))
        ones = torch.ones(_PARTS, dtype=a.dtype, device=a.device).expand(len(a), -1)
        rows = torch.cat((a, _parts((1 + _OFFSET) * own), ones), dim=1)
        columns = torch.cat((-2 * b, ones, _parts((1 + _OFFSET) * other)), dim=1)
        width = ceil(rows.shape[1] / _MULTIPLE) * _MULTIPLE - rows.shape[1]
        rows, columns = (torch.nn.functional.pad(x, (0, width)) for x in (rows, columns))
        return BfloatRows(rows, columns, own, 0.0 if exact else _ROUNDING)

    def nearest(self, rows: Tensor) -> TwoNearest:
        """For some of the anchor's rows (their numbers).

        The norm of a far row is bounded by the anchor's and their distance: ``‖b‖² ≤ 2 ‖a‖² + 2 ‖a − b‖²``. So one
        row of an outlying size does not spoil the bounds of the others.
        """
        columns, second = two_nearest(self._tiles, rows, len(self.model))
        own = self.norms.index_select(0, rows)
        seen = (1 - _ROUNDING) * second.view(torch.bfloat16).float() - 3 * _HIDDEN * own
        apart = (seen / (1 + 2 * _HIDDEN)).clamp_min(0).sqrt() - 2 * self.share * own.sqrt()
        return TwoNearest(columns, (apart / (1 + self.share)).clamp_min(0).square())

    def _tiles(self, rows: Tensor) -> Callable[[slice], Tensor]:
        """Squared distances, as the whole numbers that have their bits."""
        anchor = self.anchor.index_select(0, rows)
        scratch = anchor.new_empty(0)

        def tile(at: slice) -> Tensor:
            nonlocal scratch
            model = self.model[at].mT
            if scratch.shape != (len(anchor), model.shape[1]):
                scratch = anchor.new_empty(len(anchor), model.shape[1])
            return torch.mm(anchor, model, out=scratch).view(torch.int16)

        return tile


def bfloat_scores(
    pairs: Sequence[Pair], anchor: Tensor, model: Tensor, exact: Callable[[Tensor, Tensor], Tensor]
) -> Scores:
    """``Σ a_i · b_j`` over all rows of a neuron, for all pairs of neurons.

    Args:
        pairs: the rows, in bfloat16.
        anchor, model: length of each neuron [neurons], float64.
        exact: the same for some pairs, from their numbers.
    """
    other = _side_by_side([b for _, b in pairs])
    values = other.new_empty(len(anchor), len(model))

    def multiply(work: tuple[Tensor, Sequence[Tensor]]) -> None:
        block, rows = work
        torch.mm(_side_by_side(rows), other.mT, out=block)

    work = list(zip(values.split(_ROWS), zip(*(a.split(_ROWS) for a, _ in pairs), strict=True), strict=True))
    in_parallel(multiply, work, anchor.device)
    return Scores(values, (anchor.unsqueeze(1), SLACK * model.unsqueeze(1)), _ROUNDING, exact)


def tried(rows: int, neurons: int, columns: int) -> Callable[[], Tensor]:
    """The scores of some rows with some neurons: a share of the whole work, to be measured."""
    own, other = (torch.ones(n, columns, dtype=torch.bfloat16) for n in (rows, neurons))
    return lambda: torch.mm(own, other.mT)


def _parts(x: Tensor) -> Tensor:
    """Numbers in bfloat16 whose sum is ``x`` [rows] to the precision of float32 [rows, 3]."""
    parts = []
    for _ in range(_PARTS):
        parts.append(x.bfloat16())
        x = x - parts[-1].float()
    return torch.stack(parts, dim=1)


def _side_by_side(rows: Sequence[Tensor]) -> Tensor:
    """Several matrices [neurons, …] as one."""
    joined = rows[0].new_empty(len(rows[0]), sum(x.shape[1] for x in rows))
    for to, x in zip(joined.split([x.shape[1] for x in rows], dim=1), rows, strict=True):
        copy_rows(to, x)
    return joined
