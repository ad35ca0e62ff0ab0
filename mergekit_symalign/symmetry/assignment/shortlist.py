"""Large assignment problems from short lists of good pairs, with a proof that no other pair can improve them.

The lists hold the columns that are best for each row at the prices of an auction (auction.py). The optimum over them
is a small sparse problem. Its dual prices ``u, v`` prove it for the whole matrix where no score exceeds
``u_i + v_j``; pairs whose score does join the lists, and it is solved again. (Column generation; the prices are
shortest paths in the residual graph of the sparse optimum.)

The scores of the whole matrix may be rounded. Then the first prices tell which pairs can matter, only those are asked
for their exact scores, and the prices have to hold against all others at the best that rounding may hide.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from mergekit_symalign.symmetry import devices
from mergekit_symalign.symmetry.assignment.auction import auction_prices
from mergekit_symalign.symmetry.fitting import require_shape, require_square
from mergekit_symalign.symmetry.rows import in_chunks
from mergekit_symalign.symmetry.threads import in_parallel

_LIST = 16  # columns of each row at first, at least
_MOST = 128  # pairs for each row: with more of them lists are not short
_CHUNKS = 256  # of columns, at least: the best score of each says where a list may end
_NEAR = 2  # errors within which pairs are looked at again before all are: prices from rounded scores are rounded too
_ROUNDS = 20  # of adding pairs
_SAMPLE = 64  # rows that tell how large the scores of an ordinary column are
_SPAN = 2.0**-24  # the least tolerance of a row, as a share of the largest
_FIRST = 4  # the first unit of costs, as a share of the largest row's tolerance
_STEPS = 1 << 20  # units that a gap is divided into: the sparse solver may outbid as many times
_RELAXATIONS = 1000  # of the shortest paths
_ROUGH = 50  # of them where prices only say where to look
_PIECE = 512  # rows for one thread
_BLOCK = 1 << 19  # scores that are looked through at once: small enough to stay in the cache

Matching = Callable[[Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Scores:
    """What each pair contributes to the total.

    Attributes:
        stored: [n, n].
        error: how far a stored score may be from the exact one: the inner product of what its row and its column have
            here, float64 [n, any] each,
        relative: and beyond that, as a share of its size.
        exact: from rows and columns of some pairs [pairs] to their exact scores; None: ``stored`` has them.

    Raises:
        ShapeError: if stored scores are not square, or errors do not fit them.
    """

    stored: Tensor
    error: tuple[Tensor, Tensor]
    relative: float = 0.0
    exact: Callable[[Tensor, Tensor], Tensor] | None = None

    def __post_init__(self) -> None:
        require_square("scores", self.stored)
        of_rows, of_columns = self.error
        for x in (of_rows, of_columns):
            require_shape("errors of scores", x, (len(self.stored), *of_rows.shape[1:2]))

    @staticmethod
    def known(score: Tensor) -> Scores:
        none = score.new_empty(len(score), 0, dtype=torch.float64)
        return Scores(score, (none, none))

    @cached_property
    def largest(self) -> float:
        """Largest absolute value."""
        low, high = (float(x) for x in self.stored.aminmax())
        return max(-low, high)

    @cached_property
    def tolerance(self) -> Tensor:
        """Differences that are taken for the rounding of a row's scores in float32 [n], float64.

        Each row has its own, for an ordinary column: one neuron of a thousand times the size does not blur the others.
        """
        tiny = torch.finfo(self.wide).tiny
        largest = torch.maximum(self.stored.amax(1), -self.stored.amin(1)).to(self.wide).clamp_min(tiny)
        few = slice(None, None, max(1, len(largest) // _SAMPLE))
        ordinary = (self.stored[few].to(self.wide).abs() / largest[few].unsqueeze(1)).amax(0).median()
        wanted = 4 * torch.finfo(torch.float32).eps * (ordinary * largest).double()
        return wanted.clamp_min(max(float(wanted.max()) * _SPAN, tiny))

    @property
    def wide(self) -> torch.dtype:
        """What scores are compared in."""
        return torch.promote_types(self.stored.dtype, torch.float32)

    def at(self, keys: Tensor, *, exactly: bool = True) -> Tensor:
        """Of some pairs ``row · n + column``, float64."""
        rows, columns = keys // len(self.stored), keys % len(self.stored)
        if exactly and self.exact is not None:
            return self.exact(rows, columns).double()
        return self.stored[rows, columns].double()

    def within(self, keys: Tensor, errors: float = 1) -> tuple[Tensor, Tensor]:
        """The highest and the lowest that the scores of some pairs can be, float64, with so many times their error."""
        rows, columns = keys // len(self.stored), keys % len(self.stored)
        stored = self.at(keys, exactly=False)
        hidden = torch.linalg.vecdot(self.error[0][rows], self.error[1][columns]) + self.relative * stored.abs()
        return stored + errors * hidden, stored - errors * hidden

    def identity_is_worse(self, index: Tensor) -> bool:
        """Whether the total of the diagonal is below that of a permutation, whatever is rounded."""
        rows = torch.arange(len(index), device=index.device)
        highest, _ = self.within(rows * (len(rows) + 1))
        _, lowest = self.within(rows * len(rows) + index)
        return bool(highest.sum() < lowest.sum())


def shortlist_assignment(scores: Scores, match: Matching) -> Tensor | None:
    """The permutation with the largest total score, to the rounding of exact scores, or None if lists grow too long.

    Args:
        scores: of all pairs.
        match: the optimum of a sparse problem, from rows, columns and costs (positive whole numbers) of its edges
            [edges] to the column of each row [n].

    >>> from mergekit_symalign.symmetry.assignment.linear import sparse_matching
    >>> score = torch.eye(4)[[1, 0, 3, 2]]
    >>> shortlist_assignment(Scores.known(score), sparse_matching).tolist()
    [1, 0, 3, 2]
    """
    n = len(scores.stored)
    diagonal = torch.arange(n, device=scores.stored.device) * (n + 1)
    prices = auction_prices(scores.stored)
    keys = torch.cat((_lists(scores, prices), diagonal)).unique()
    values, near = scores.at(keys, exactly=False), keys[:0]
    if scores.exact is None:
        solved = _solve(keys, values, match, prices, scores)
    else:  # prices that say where to look
        unit = float(scores.tolerance.max())
        solved = _solve_rounded(keys, values, match, prices, unit, math.inf, rough=True)
    if solved is not None and scores.exact is not None:  # from here on lists are what can matter, exactly
        near = _cheaper_pairs(scores, solved, _NEAR)
        if len(near) > _MOST * n:
            return None
        keys = torch.cat((_cheaper_of(near, scores, solved), solved.keys)).unique()
        values = scores.at(keys)
        solved = _solve(keys, values, match, solved.column, scores)
    for _ in range(_ROUNDS):
        if solved is None or len(keys) > _MOST * n:
            return None
        new = _others(_cheaper_of(near, scores, solved), keys)
        if len(new) == 0:
            new = _others(_cheaper_pairs(scores, solved), keys)
        if len(new) == 0:
            return solved.index
        keys, order = torch.cat((keys, new)).sort()
        values = torch.cat((values, scores.at(new)))[order]
        solved = _solve(keys, values, match, solved.column, scores)
    return None


@dataclass(frozen=True)
class _Solved:
    """The optimum of the listed pairs: columns [n], and dual prices: no listed score exceeds ``row_i + column_j``."""

    index: Tensor
    row: Tensor
    column: Tensor

    @property
    def keys(self) -> Tensor:
        return torch.arange(len(self.index), device=self.index.device) * len(self.index) + self.index


def _lists(scores: Scores, price: Tensor) -> Tensor:
    """About the `_LIST` columns of each row that are best at these prices, less those that are as good as the last."""

    def last(_: int, best: Tensor) -> Tensor:
        return best.topk(min(_LIST + 1, best.shape[1]), dim=1).values.select(1, -1)

    return _exceeding(scores, price, last)


def _solve(keys: Tensor, values: Tensor, match: Matching, start: Tensor, scores: Scores) -> _Solved | None:
    """The optimum of some pairs, sorted by rows, with prices that prove it; None if they do not settle.

    The sparse solver outbids by the least difference that there is, and takes minutes where that is tiny. So costs are
    whole numbers of a unit: about the largest row's rounding, then less, until no row gives away more than its own.
    """
    tolerance = scores.tolerance
    finest, unit, gap = float(tolerance.min()), float(tolerance.max()) / _FIRST, math.inf
    while True:
        solved = _solve_rounded(keys, values, match, start, max(unit, finest), gap)
        if solved is None or unit <= finest:
            return solved
        own = _gaps(solved, keys, values)
        if bool((own <= tolerance).all()):
            return solved
        start, gap = solved.column, float(own.sum())
        unit = min(gap / _STEPS, unit / 2)


def _gaps(solved: _Solved, keys: Tensor, values: Tensor) -> Tensor:
    """How far each row's column is from the best that its listed pairs promise at these prices [n]."""
    n = len(solved.row)
    rows, columns = keys // n, keys % n
    worth = values - solved.column[columns]
    best = worth.new_full((n,), -torch.inf).scatter_reduce(0, rows, worth, "amax")
    return best - worth[columns == solved.index[rows]]


def _solve_rounded(
    keys: Tensor, values: Tensor, match: Matching, start: Tensor, unit: float, gap: float, *, rough: bool = False
) -> _Solved | None:
    """The same with costs in whole numbers of ``unit``, and prices from ``start`` [n] down.

    Args:
        gap: how far the best assignment is from the best that the prices promise, at most: it has no pair that
            costs more.
        rough: the prices need not settle.
    """
    n = len(start)
    rows, columns = keys // n, keys % n
    worth = values - start[columns]
    top = worth.new_full((n,), -torch.inf).scatter_reduce(0, rows, worth, "amax")
    cost = ((top[rows] - worth) / unit).round() * unit
    few = cost <= gap + n * unit
    index = match(rows[few], columns[few], cost[few] / unit + 1)
    via = index[rows]
    own = cost[columns == via]
    price = torch.zeros_like(own)
    step = cost - own[rows]
    for _ in range(_ROUGH if rough else _RELAXATIONS):
        lower = price.scatter_reduce(0, columns, price.index_select(0, via) + step, "amin")
        if bool((lower >= price - 1e-12 * own.abs().max()).all()):
            break
        price = lower
    else:
        if not rough:
            return None
    return _Solved(index, top - own + price[index], start - price)


def _cheaper_pairs(scores: Scores, solved: _Solved, errors: float = 1) -> Tensor:
    """Pairs whose score, with so many times its error, exceeds their prices."""
    ceiling = solved.row - errors * scores.relative * scores.largest  # as if each were the largest

    def limit(first: int, best: Tensor) -> Tensor:
        return ceiling.narrow(0, first, len(best)).to(best.dtype)

    return _cheaper_of(_exceeding(scores, solved.column, limit, errors), scores, solved, errors)


def _cheaper_of(keys: Tensor, scores: Scores, solved: _Solved, errors: float = 1) -> Tensor:
    """The same among some pairs."""
    rows, columns = keys // len(solved.row), keys % len(solved.row)
    highest, _ = scores.within(keys, errors)
    return keys[highest > solved.row[rows] + solved.column[columns] + scores.tolerance[rows]]


def _others(keys: Tensor, known: Tensor) -> Tensor:
    return keys[~torch.isin(keys, known)]


def _exceeding(scores: Scores, price: Tensor, limit: Callable[[int, Tensor], Tensor], errors: float = 0) -> Tensor:
    """Pairs ``row · n + column``, in order, whose score less the column's price is above the limit of its row.

    Looked for in chunks of columns: their maxima take a tenth of the time of comparing every number.

    Args:
        limit: [rows], from the number of the first of some rows and the best of each of their chunks [rows, chunks].
        errors: how many times their error scores get.
    """
    n, column = len(price), price.to(scores.wide)
    of_rows, of_columns = (x.to(scores.wide) for x in scores.error)
    factors = list(zip(of_rows.mT.unsqueeze(2), of_columns.mT.contiguous(), strict=True)) if errors else []
    height = max(1, devices.at_once(price.device, _BLOCK) // n)
    piece = max(_PIECE, height) if not devices.on_cpu(price.device) else _PIECE

    def of_piece(start: int) -> Tensor:
        scratch = torch.empty(height, n, dtype=scores.wide, device=price.device)
        rows, found = scores.stored.narrow(0, start, min(piece, n - start)), []
        for i, block in enumerate(rows.split(height)):
            first = start + i * height
            worth = scratch.narrow(0, 0, len(block)).copy_(block).sub_(column)
            for of_row, of_column in factors:
                worth.addcmul_(of_row.narrow(0, first, len(block)), of_column, value=errors)
            chunks = in_chunks(worth, max(1, n // _CHUNKS))
            best = chunks.amax(2)
            above = limit(first, best).unsqueeze(1)
            row, chunk = (best > above).nonzero().unbind(1)
            hit, place = (chunks[row, chunk] > above[row]).nonzero().unbind(1)
            found.append((row[hit] + first) * n + chunk[hit] * chunks.shape[2] + place)
        return torch.cat(found)

    return torch.cat(in_parallel(of_piece, range(0, n, piece), price.device))
