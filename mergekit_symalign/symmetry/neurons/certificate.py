"""Which neuron of the model is nearest to each of the anchor's, proven without comparing all of them in full.

Stack each neuron as one vector. A distance over some of the coordinates bounds the whole distance from below, so the
best candidate on a short prefix is proven to be the nearest as soon as its whole distance is below the prefix distance
of every other. Where the nearest neighbours are all different, they are the optimal permutation: each row takes its
own minimum (symmetry/neurons/match.py finishes what is left open).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from mergekit_symalign.symmetry import devices
from mergekit_symalign.symmetry.neurons import coarse
from mergekit_symalign.symmetry.neurons.bfloat import BfloatRows
from mergekit_symalign.symmetry.neurons.coarse import CoarseRows
from mergekit_symalign.symmetry.neurons.costs import NeuronCosts
from mergekit_symalign.symmetry.neurons.products import Numbers, fastest
from mergekit_symalign.symmetry.options import Pair
from mergekit_symalign.symmetry.rows import SLACK, two_lowest
from mergekit_symalign.symmetry.threads import in_parallel

PREFIXES = (0.015, 0.07, 0.16)  # shares of the coordinates; rows that one leaves open get the next
_BLOCK = 1 << 21  # prefix distances that are held at once
_SAMPLE = 64  # rows that are asked whether prefixes can settle anything
_RIVALS = 256  # pairs of neurons that are compared in full where no more of a prefix's pairs stay open
_RUN = 8  # neighbouring columns that are taken together
_TRIED = 512  # rows whose nearest are looked for in each kind of numbers, to find out which is fastest

Rounding = Callable[[Tensor, Tensor], CoarseRows | BfloatRows]


@dataclass
class Nearest:
    """Nearest neighbours that are proven.

    Attributes:
        index: int64 [neurons], the model's neuron that is nearest to each of the anchor's, −1 where nothing is proven.
        route: int64 [neurons], the number of the prefix that proved it, counted from 0.
        gap: float64 [neurons], how much more each settled row would cost anywhere else, at least.
        cost: float64 [neurons], what each settled row costs, NaN where that was not asked for.
    """

    index: Tensor
    route: Tensor
    gap: Tensor
    cost: Tensor

    @staticmethod
    def nothing(neurons: int, device: torch.device) -> Nearest:
        index = torch.full((neurons,), -1, device=device)
        gap = torch.zeros(neurons, dtype=torch.float64, device=device)
        return Nearest(index, torch.zeros_like(index), gap, torch.full_like(gap, torch.nan))

    @property
    def open(self) -> Tensor:
        """Rows without a proof."""
        return (self.index < 0).nonzero().flatten()

    @property
    def settled(self) -> Tensor:
        """Rows with one."""
        return (self.index >= 0).nonzero().flatten()

    def settle(self, rows: Tensor, columns: Tensor, route: int, gap: Tensor | float = 0.0) -> None:
        self.index[rows], self.route[rows] = columns, route
        self.gap[rows] = torch.as_tensor(gap, dtype=self.gap.dtype, device=self.gap.device)

    def reopen(self, rows: Tensor) -> None:
        self.index[rows], self.cost[rows] = -1, torch.nan


@dataclass(frozen=True)
class _Candidates:
    """For some rows of the anchor: the best candidate on a prefix, its cost, and the least prefix distance of others.

    Attributes:
        rows, columns: int64, the anchor's rows and their candidates.
        cost: whole cost of the candidate.
        bound: prefix distance of the second nearest, less the rounding that both may hide.
    """

    rows: Tensor
    columns: Tensor
    cost: Tensor
    bound: Tensor

    @property
    def settled(self) -> Tensor:
        return self.cost < self.bound

    @property
    def open_rows(self) -> Tensor:
        return self.rows[~self.settled]

    @property
    def open_costs(self) -> Tensor:
        return self.cost[~self.settled]

    def promising_rows(self, growth: float) -> Tensor:
        """Rows that a prefix ``growth`` times as long would settle, if distances grew with its length."""
        return self.rows[~self.settled & (self.cost < growth * self.bound)]


def nearest_neighbours(costs: NeuronCosts) -> Nearest:
    """Every nearest neighbour that prefixes of the coordinates can prove."""
    rows = torch.arange(costs.pairs.neurons, device=costs.pairs.device)
    found = Nearest.nothing(len(rows), rows.device)
    if not costs.bounding:
        return found
    for number, share in enumerate(PREFIXES):
        growth = PREFIXES[-1] / share if number + 1 < len(PREFIXES) else 0.0
        rows = _settle(costs, rows, number, growth, found)
        if len(rows) == 0:
            break
    return found


def _settle(costs: NeuronCosts, rows: Tensor, number: int, growth: float, found: Nearest) -> Tensor:
    """Settle what one prefix can; returns the open rows for which a longer one is worth its cost.

    Where none of a sample of rows settles, the others are not tried, and if a longer prefix would not do better
    (unrelated models), none is returned. A sample of all the rows there are is not compared again.
    """
    prefix = _Prefix.taken_from(costs.bounding, PREFIXES[number])
    few = torch.linspace(0, len(rows) - 1, min(len(rows), _SAMPLE), device=rows.device).round().long()
    sample = prefix.candidates(costs, rows[few])
    if len(few) == len(rows):
        return _left_by(prefix, sample, costs, number, growth, found)
    if not bool(sample.settled.any()):
        return rows if len(sample.promising_rows(growth)) else rows.narrow(0, 0, 0)
    rounded = prefix.rounded()
    if rounded is not None:
        rows = _settled_by(prefix.coarse_candidates(costs, rows, rounded), number, found).open_rows
        if len(rows) == 0:
            return rows
    return _left_by(prefix, prefix.candidates(costs, rows), costs, number, growth, found)


def _left_by(
    prefix: _Prefix, candidates: _Candidates, costs: NeuronCosts, number: int, growth: float, found: Nearest
) -> Tensor:
    """Settle what candidates prove; a few rows that stay open are compared in full with what the prefix leaves them.

    Returns the open rows for which a longer prefix is worth its cost: it has nothing to add to whole costs.
    """
    open_rows = _settled_by(candidates, number, found).open_rows
    few = 0 < len(open_rows) <= _SAMPLE
    in_full = prefix.compared_in_full(costs, open_rows, candidates.open_costs) if few else None
    if in_full is None:
        return candidates.promising_rows(growth)
    _settled_by(in_full, number, found)
    return open_rows.narrow(0, 0, 0)


def _settled_by(candidates: _Candidates, number: int, found: Nearest) -> _Candidates:
    """Note the rows that are proven."""
    settled = candidates.settled
    rows = candidates.rows[settled]
    found.settle(rows, candidates.columns[settled], number, (candidates.bound - candidates.cost)[settled])
    found.cost[rows] = candidates.cost[settled].double()
    return candidates


@dataclass(frozen=True)
class _Prefix:
    """Some columns of every kind of row, in float32: [neurons, columns] of anchor and model."""

    anchor: Tensor
    model: Tensor
    norms: Tensor

    @staticmethod
    def taken_from(pairs: Sequence[Pair], share: float) -> _Prefix:
        anchor, model = prefixes(pairs, share)
        return _Prefix(anchor, model, model.square().sum(1))

    @property
    def height(self) -> int:
        """Rows whose distances to all columns are held at once."""
        return max(1, _BLOCK // len(self.model))

    def candidates(self, costs: NeuronCosts, rows: Tensor) -> _Candidates:
        parts = in_parallel(self._nearest, rows.split(self.height), rows.device)
        columns, bound = (torch.cat(x) for x in zip(*parts, strict=True))
        return _Candidates(rows, columns, costs.of_pairs(rows, columns), bound)

    def compared_in_full(self, costs: NeuronCosts, rows: Tensor, most: Tensor) -> _Candidates | None:
        """For rows that cost at most so much: the nearest of all columns whose prefix distance does not rule them out.

        None if these are many.
        """
        lowest, own = self._lowest(rows)
        floor = lowest + own.unsqueeze(1)
        possible = floor <= most.unsqueeze(1)
        at, columns = possible.nonzero().unbind(1)
        if len(at) > _RIVALS:
            return None
        cost = torch.full(floor.shape, torch.inf, dtype=most.dtype, device=most.device)
        cost[at, columns] = costs.of_pairs(rows[at], columns)
        best, second = two_lowest(cost)
        bound = torch.minimum((1 - SLACK) * second, floor.masked_fill(possible, torch.inf).amin(1).to(second.dtype))
        return _Candidates(rows, best, cost.gather(1, best.unsqueeze(1)).squeeze(1), bound)

    def rounded(self) -> CoarseRows | BfloatRows | None:
        """The same in numbers whose products are faster than those in float32 here; None if there are none."""
        device, columns = self.anchor.device, self.anchor.shape[1]
        if not devices.on_cpu(device):
            return None
        kinds: dict[Numbers, Rounding] = {Numbers.bfloat16: BfloatRows.rounded}
        if coarse.usable(device, columns):
            kinds[Numbers.whole] = CoarseRows.rounded
        few = torch.arange(min(_TRIED, len(self.anchor)))

        def of_kind(kind: Rounding) -> Callable[[], object]:
            rounded = kind(self.anchor, self.model)
            return lambda: rounded.nearest(few)

        def exact() -> Callable[[], object]:
            return lambda: [self._nearest(some) for some in few.split(self.height)]

        ways = {numbers: partial(of_kind, kind) for numbers, kind in kinds.items()}
        chosen = kinds.get(fastest("nearest neurons", columns, {Numbers.float32: exact, **ways}))
        return chosen(self.anchor, self.model) if chosen else None

    def coarse_candidates(self, costs: NeuronCosts, rows: Tensor, rounded: CoarseRows | BfloatRows) -> _Candidates:
        """The same candidates from rounded rows: cheaper, and fewer rows settle."""
        found = rounded.nearest(rows)
        bound = (1 - SLACK) * found.bound
        return _Candidates(rows, found.columns, costs.of_pairs(rows, found.columns), bound)

    def _nearest(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Column that looks nearest on the prefix, and the least that the prefix distance of any other can be."""
        lowest, own = self._lowest(rows)
        columns, second = two_lowest(lowest)
        return columns, second + own

    def _lowest(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """In two summands, [rows, columns] and [rows]: the prefix distances, less what rounding may add to each."""
        a = self.anchor.index_select(0, rows)
        own, norms = ((1 - SLACK) * x for x in (a.square().sum(1), self.norms))
        return torch.addmm(norms.unsqueeze(0), a, self.model.mT, alpha=-2), own


def prefixes(pairs: Sequence[Pair], share: float) -> list[Tensor]:
    """Some columns of every matrix side by side, of anchor and of model [rows, columns], in float32."""

    def of_side(rows: Sequence[Tensor]) -> Tensor:
        return torch.cat([spread_columns(x, share) for x in rows], dim=1)

    return in_parallel(of_side, list(zip(*pairs, strict=True)), pairs[0][0].device)


def spread_columns(rows: Tensor, share: float) -> Tensor:
    """Evenly spaced runs of columns of a matrix, at least one column, in float32."""
    width = rows.shape[1]
    runs = max(1, round(share * width / _RUN))
    length = min(_RUN, width)
    starts = torch.linspace(0, width - length, runs, device="cpu").round().long().unique().tolist()
    ends = [*starts[1:], width]
    parts = [rows.narrow(1, at, min(length, end - at)).float() for at, end in zip(starts, ends, strict=True)]
    return torch.cat(parts, dim=1)
