"""Linear assignment, exactly: which column belongs to which row. Knows no neurons and no heads.

The algorithms run on the CPU (scipy); this module is the only one of the mathematics that moves a tensor there. Small
problems go there as wholes, all of a batch at once, and only their answers come back.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import torch
from scipy.optimize import linear_sum_assignment
from scipy.sparse import csr_matrix
from scipy.sparse.csgraph import connected_components, min_weight_full_bipartite_matching
from torch import Tensor

from mergekit_symalign.symmetry import devices
from mergekit_symalign.symmetry.assignment.shortlist import Scores, shortlist_assignment
from mergekit_symalign.symmetry.fitting import require_shape, require_square

LARGE = 512  # rows from which short lists of good pairs are tried first


def best_assignment(score: Tensor) -> Tensor:
    """The permutation ``π`` with the largest ``Σ_i score[i, π(i)]``, to the rounding of each row's scores in float32.

    No cycle of it is there for less than rounding: rows that may as well stay do.

    Args:
        score: [n, n], any float dtype, any device.

    Returns:
        ``π`` as int64 [n], on the device of ``score``.

    Raises:
        ShapeError: if ``score`` is not square.

    >>> best_assignment(torch.tensor([[4.0, 5.0], [1.0, 4.0]])).tolist()  # 4 + 4 is more than 5 + 1
    [0, 1]
    """
    require_square("scores", score)
    if len(score) >= LARGE or devices.on_cpu(score.device):
        return _assigned(score)
    return _assigned(_host(score)).to(score.device)


def _assigned(score: Tensor) -> Tensor:
    """The same on the device of ``score``, but for scipy's part."""
    identity = torch.arange(score.shape[0], device=score.device)
    rows, columns = score.max(1), score.max(0)
    if bool((rows.values <= score.diagonal()).all()):
        return identity
    if bool((columns.indices[rows.indices] == identity).all()):
        return rows.indices  # every row's own best column is a different one: no assignment can do better
    index = shortlist_assignment(Scores.known(score), sparse_matching) if len(score) >= LARGE else None
    if index is None:
        index = _on_cpu(lambda s: linear_sum_assignment(s, maximize=True)[1], score)
    return without_idle_cycles(index, score)


def best_assignments(scores: Tensor) -> Tensor:
    """`best_assignment` of each of several small problems [problems, n, n]: int64 [problems, n].

    Raises:
        ShapeError: if problems are not square.
    """
    require_shape("scores", scores, (*scores.shape[:2], *scores.shape[1:2]))
    host = scores if devices.on_cpu(scores.device) else _host(scores)
    return torch.stack([_assigned(score) for score in host]).to(scores.device)


def identity_is_optimal(unmoved: Tensor, bounds: Tensor) -> bool:
    """Whether no pair off the diagonal can be cheaper than the diagonal one already is without any element.

    Args:
        unmoved: [n] costs of the diagonal pairs as they are.
        bounds: [n, n] lower bounds of every pair's cost.

    Raises:
        ShapeError: if one does not fit the other.
    """
    require_shape("bounds", bounds, (len(unmoved), len(unmoved)))
    off = bounds.masked_fill(torch.eye(len(bounds), dtype=torch.bool, device=bounds.device), torch.inf)
    return bool((unmoved <= off.amin(1)).all())


def lazy_assignment(
    bounds: Tensor, cost: Callable[[Tensor, Tensor], Tensor], tighter: Callable[[], Tensor] | None = None
) -> Tensor:
    """The assignment with the least total cost, asking for the cost of as few pairs as possible.

    Pairs whose cost was not asked for stand in with their lower bound: an optimum that uses known pairs only is an
    optimum of the true costs. Where bounds say little, rows ask for ever more pairs at once.

    Args:
        bounds: [n, n] lower bounds of every pair's cost.
        cost: from rows and columns [m] of some pairs to their costs [m].
        tighter: better bounds [n, n], asked for once if the first ones leave pairs open after the first round.

    Returns:
        The column of each row, int64 [n].

    Raises:
        ShapeError: if ``bounds`` is not square.

    >>> true = torch.tensor([[3.0, 1.0], [1.0, 3.0]])
    >>> lazy_assignment(true - 0.5, lambda rows, columns: true[rows, columns]).tolist()
    [1, 0]
    """
    require_square("bounds", bounds)
    if devices.on_cpu(bounds.device):
        return _lazily_assigned(bounds, cost, tighter)
    device = bounds.device

    def asked(rows: Tensor, columns: Tensor) -> Tensor:
        return _host(cost(rows.to(device), columns.to(device)))

    better = None if tighter is None else lambda: _host(tighter())
    return _lazily_assigned(_host(bounds), asked, better).to(device)


def _lazily_assigned(
    bounds: Tensor, cost: Callable[[Tensor, Tensor], Tensor], tighter: Callable[[], Tensor] | None
) -> Tensor:
    """The same for bounds and costs on the CPU."""
    costs = bounds.clone()
    known = torch.zeros_like(costs, dtype=torch.bool)
    rows = torch.arange(len(costs), device=costs.device)
    index = rows if tighter is None else _assigned(-costs)
    for turn in itertools.count():
        missing = rows[~known[rows, index]]
        if len(missing) == 0:
            break
        if turn == 1 and tighter is not None:
            costs = torch.where(known, costs, tighter().to(costs.dtype))
        else:
            pairs = _asked(costs, known, missing, index, 2 ** max(0, turn - 2))
            costs[pairs] = cost(*pairs).to(costs.dtype)
            known[pairs] = True
        index = _assigned(-costs)
    return index


def free_choice(cost: Tensor) -> Tensor:
    """A different column for each row [rows, columns] with the least total cost; columns may stay unused."""
    return _on_cpu(lambda c: linear_sum_assignment(c)[1], cost)


def sparse_matching(rows: Tensor, columns: Tensor, cost: Tensor) -> Tensor:
    """The perfect matching with the least cost over some edges: the column of each row."""

    def solve(at: Any, values: Any) -> Any:
        return min_weight_full_bipartite_matching(csr_matrix((values, tuple(at))))[1]

    return _on_cpu(solve, torch.stack((rows, columns)), cost)


def without_idle_cycles(index: Tensor, score: Tensor) -> Tensor:
    """The same permutation [n] with those of its cycles undone that gain no more than the rounding of their scores."""
    rows = torch.arange(len(index), device=index.device)
    unmoved, moved = score.diagonal().double(), score.gather(1, index.unsqueeze(1)).squeeze(1).double()
    worth = moved - unmoved - torch.finfo(score.dtype).eps * unmoved.abs()
    cycle = _on_cpu(lambda to: connected_components(csr_matrix((to >= 0, (range(len(to)), to))))[1], index)
    of_cycles = torch.zeros_like(worth).index_add(0, cycle, worth)
    return torch.where(of_cycles[cycle] > 0, index, rows)


def _asked(costs: Tensor, known: Tensor, rows: Tensor, index: Tensor, many: int) -> tuple[Tensor, Tensor]:
    """Some rows with the columns that they have, and with the cheapest unknown ones, as many for each row."""
    unknown = costs.index_select(0, rows).masked_fill(known.index_select(0, rows), torch.inf)
    unknown = unknown.scatter(1, index[rows].unsqueeze(1), -torch.inf)
    cheapest = unknown.topk(min(many, len(costs)), dim=1, largest=False)
    row, column = (cheapest.values < torch.inf).nonzero().unbind(1)
    return rows[row], cheapest.indices[row, column]


def _on_cpu(solve: Callable[..., Any], *given: Tensor) -> Tensor:
    """What one of scipy's solvers finds, int64, on the device of what it is given: the only move to the CPU."""
    found: Tensor = torch.from_numpy(solve(*(_host(x).numpy() for x in given))).long()
    return found.to(given[0].device)


def _host(x: Tensor) -> Tensor:
    return x.cpu()
