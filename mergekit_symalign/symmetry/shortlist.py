"""Large assignment problems from short lists of good pairs, with a proof that no other pair can improve them.

The optimum over the best columns of each row is a small sparse problem. Its dual prices ``u, v`` prove it for the whole
matrix where ``u_i + v_j`` is at most the cost of every pair; pairs that are cheaper join the lists, and it is solved
again. (Column generation; the prices are shortest paths in the residual graph of the sparse optimum.)
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

_LIST = 64  # columns of each row at first
_ROUNDS = 20  # of adding pairs
_RELAXATIONS = 1000  # of the shortest paths
_BLOCK = 1 << 22  # reduced costs that are held at once

Matching = Callable[[Tensor, Tensor, Tensor], Tensor]


def shortlist_assignment(score: Tensor, match: Matching) -> Tensor | None:
    """The permutation with the largest total score, to the rounding of the scores, or None if rounds run out.

    Args:
        score: [n, n].
        match: the optimum of a sparse problem, from rows, columns and positive costs of its edges [edges] to the
            column of each row [n].
    """
    n, top = len(score), score.max(1).values.double()  # of each row: from a common one the solver may take minutes
    blocks = [block.topk(min(_LIST, n), dim=1).indices for block in score.split(max(1, _BLOCK // n))]
    listed = torch.cat(blocks)
    diagonal = torch.arange(n, device=score.device)
    keys = torch.cat((diagonal.unsqueeze(1) * n + listed, (diagonal * (n + 1)).unsqueeze(1)), dim=1).unique()
    tolerance = float(torch.finfo(score.dtype).eps * score.abs().max())
    for _ in range(_ROUNDS):
        rows, columns = keys // n, keys % n
        cost = top[rows] - score[rows, columns].double()
        index = match(rows, columns, cost + 1)
        own = top - score.gather(1, index.unsqueeze(1)).squeeze(1).double()
        price = _prices(rows, columns, cost, own, index)
        if price is None:
            return None
        cheaper = _cheaper_pairs(score, top, own - price[index], price, tolerance)
        if len(cheaper) == 0:
            return index
        keys = torch.cat((keys, cheaper)).unique()
    return None


def _prices(rows: Tensor, columns: Tensor, cost: Tensor, own: Tensor, index: Tensor) -> Tensor | None:
    """Prices ``v`` of the columns with ``cost ≥ u_i + v_j`` on every edge, ``u_i = own_i − v[index_i]``."""
    price = torch.zeros_like(own)
    step = cost - own[rows]
    via = index[rows]
    for _ in range(_RELAXATIONS):
        lower = price.scatter_reduce(0, columns, price[via] + step, "amin")
        if bool((lower >= price - 1e-12 * own.abs().max()).all()):
            return price
        price = lower
    return None


def _cheaper_pairs(score: Tensor, top: Tensor, u: Tensor, v: Tensor, tolerance: float) -> Tensor:
    """Pairs whose cost is below their prices, as ``row · n + column``."""
    n, found = len(score), []
    height = max(1, _BLOCK // n)
    ceiling, v = (top - u).to(score.dtype), v.to(score.dtype)
    for start, block in zip(range(0, n, height), score.split(height), strict=True):
        surplus = block + v > (ceiling.narrow(0, start, len(block)) + 4 * tolerance).unsqueeze(1)
        at = surplus.nonzero()
        found.append((at.select(1, 0) + start) * n + at.select(1, 1))
    return torch.cat(found)
