"""Which neuron of the model belongs to which of the anchor: a linear assignment problem, solved to its optimum.

The mathematics: docs/symmetries.md. The assignment algorithms run on the CPU (scipy); this module is the only one that
moves a tensor there.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from scipy.optimize import linear_sum_assignment
from scipy.sparse import csr_matrix
from scipy.sparse.csgraph import connected_components, min_weight_full_bipartite_matching
from torch import Tensor

from mergekit_symalign.symmetry.certificate import PREFIXES, Nearest, nearest_neighbours
from mergekit_symalign.symmetry.groups import SLACK, AxisAction, Chain, Permutation, Scaling
from mergekit_symalign.symmetry.neuron_costs import NeuronCosts, NeuronPairs, factors, neuron_factors
from mergekit_symalign.symmetry.options import Facts, NeuronScale
from mergekit_symalign.symmetry.shortlist import Scores, shortlist_assignment

__all__ = ["NeuronPairs", "align_neurons", "best_assignment", "best_permutation", "neuron_factors"]

ROUTES = (*(f"neurons_prefix_{i + 1}" for i in range(len(PREFIXES))), "neurons_rows", "neurons_full")
_LARGE = 512  # neurons from which short lists of good pairs are tried first
_FEW = 1 / 4  # of the rows: if more are open, the whole problem is solved at once


@dataclass(frozen=True)
class Assignment:
    """An optimal permutation and how it was proven.

    Attributes:
        index: int64 [neurons]: slot ``i`` takes the model's neuron ``index[i]``.
        routes: how many neurons were settled by each route (docs/performance.md).
        cost: of the whole, under this permutation.
    """

    index: Tensor
    routes: dict[str, int]
    cost: float


def align_neurons(
    pairs: NeuronPairs, *, permute: bool, scale: NeuronScale, facts: Facts | None = None
) -> tuple[AxisAction, AxisAction]:
    """The permutation of neurons, and with ``scale`` their signed scales, that come closest to the anchor.

    Maximises ``Σ_i S[i, π(i)]``, ``S = G_A G_Bᵀ + U_A U_Bᵀ + D_Aᵀ D_B``. With a scale the score of a pair is that of
    its own best factor for ``u → c u, d → d / c``, so that permutation and factors are optimal together.

    Args:
        pairs: rows of anchor and model.
        permute, scale: what is admitted.
        facts: takes the number of neurons that were settled by each route, and without scales the squared distance
            that is left (``distance_after``).

    Returns:
        The actions that gate rows and up rows carry; down columns carry the dual of the latter.
    """
    index = torch.arange(pairs.neurons, device=pairs.device)
    if permute:
        found = best_permutation(pairs, scale=scale)
        index = found.index
        if facts is not None:
            facts.update(found.routes)
            if scale is NeuronScale.none:
                facts["distance_after"] = found.cost
    permutation = Permutation(index)
    if scale is NeuronScale.none:
        return permutation, permutation
    return permutation, Chain((permutation, Scaling(factors(pairs, index, signed=scale is NeuronScale.signed))))


def best_permutation(pairs: NeuronPairs, *, scale: NeuronScale) -> Assignment:
    """The optimal permutation: by nearest neighbours as far as they prove it, the rest as an assignment problem."""
    costs = NeuronCosts(pairs, scale)
    found = nearest_neighbours(costs)
    _reopen_shared(found)
    while len(found.open) <= _FEW * pairs.neurons:
        if len(found.open) == 0 or _complete(found, costs):
            return Assignment(found.index, _routes(found), _total(found, costs))
    return _full(costs)


def best_assignment(score: Tensor) -> Tensor:
    """The permutation ``π`` with the largest ``Σ_i score[i, π(i)]``, to the rounding of each row's scores in float32.

    No cycle of it is there for less than rounding: rows that may as well stay do.

    Args:
        score: [n, n], any float dtype, any device.

    Returns:
        ``π`` as int64 [n], on the device of ``score``.
    """
    identity = torch.arange(score.shape[0], device=score.device)
    rows, columns = score.max(1), score.max(0)
    if bool((rows.values <= score.diagonal()).all()):
        return identity
    if bool((columns.indices[rows.indices] == identity).all()):
        return rows.indices  # every row's own best column is a different one: no assignment can do better
    index = shortlist_assignment(Scores.known(score), _sparse_matching) if len(score) >= _LARGE else None
    if index is None:
        index = _on_cpu(lambda s: linear_sum_assignment(s, maximize=True)[1], score)
    return _without_idle_cycles(index, score)


def _without_idle_cycles(index: Tensor, score: Tensor) -> Tensor:
    """The same permutation [n] with those of its cycles undone that gain no more than the rounding of their scores."""
    rows = torch.arange(len(index), device=index.device)
    unmoved, moved = score.diagonal().double(), score.gather(1, index.unsqueeze(1)).squeeze(1).double()
    worth = moved - unmoved - torch.finfo(score.dtype).eps * unmoved.abs()
    cycle = _on_cpu(lambda to: connected_components(csr_matrix((to >= 0, (range(len(to)), to))))[1], index)
    of_cycles = torch.zeros_like(worth).index_add(0, cycle, worth)
    return torch.where(of_cycles[cycle] > 0, index, rows)


def identity_is_optimal(unmoved: Tensor, bounds: Tensor) -> bool:
    """Whether no pair off the diagonal can be cheaper than the diagonal one already is without any element.

    Args:
        unmoved: [n] costs of the diagonal pairs as they are.
        bounds: [n, n] lower bounds of every pair's cost.
    """
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
    """
    costs = bounds.clone()
    known = torch.zeros_like(costs, dtype=torch.bool)
    rows = torch.arange(len(costs), device=costs.device)
    index = rows if tighter is None else best_assignment(-costs)
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
        index = best_assignment(-costs)
    return index


def _full(costs: NeuronCosts) -> Assignment:
    """The optimum of the whole problem, the identity if it is as good."""
    rows = torch.arange(costs.pairs.neurons, device=costs.pairs.device)
    scores = costs.quantized_scores() if len(rows) >= _LARGE else None
    index = shortlist_assignment(scores, _sparse_matching) if scores is not None else None
    if scores is None or index is None:
        index, may_stay = best_assignment(costs.scores()), False  # which has compared it with the identity
    else:
        may_stay = not scores.identity_is_worse(index)
    cost = float(costs.of(rows, index).double().sum())
    if may_stay:
        unmoved = float(costs.of(rows, rows).double().sum())
        index, cost = (rows, unmoved) if unmoved <= cost else (index, cost)
    return Assignment(index, {ROUTES[-1]: len(index)}, cost)


def _asked(costs: Tensor, known: Tensor, rows: Tensor, index: Tensor, many: int) -> tuple[Tensor, Tensor]:
    """Some rows with the columns that they have, and with the cheapest unknown ones, as many for each row."""
    unknown = costs.index_select(0, rows).masked_fill(known.index_select(0, rows), torch.inf)
    unknown = unknown.scatter(1, index[rows].unsqueeze(1), -torch.inf)
    cheapest = unknown.topk(min(many, len(costs)), dim=1, largest=False)
    row, column = (cheapest.values < torch.inf).nonzero().unbind(1)
    return rows[row], cheapest.indices[row, column]


def _sparse_matching(rows: Tensor, columns: Tensor, cost: Tensor) -> Tensor:
    """The perfect matching with the least cost over some edges: the column of each row."""

    def solve(at: Any, values: Any) -> Any:
        return min_weight_full_bipartite_matching(csr_matrix((values, tuple(at))))[1]

    return _on_cpu(solve, torch.stack((rows, columns)), cost)


def _reopen_shared(found: Nearest) -> None:
    """Rows that share their nearest neighbour cannot all have it."""
    rows = found.settled
    columns = found.index[rows]
    found.reopen(rows[(torch.bincount(columns, minlength=len(found.index)) > 1)[columns]])


def _complete(found: Nearest, costs: NeuronCosts) -> bool:
    """Assign the open rows, or find out more about the rows whose columns they would rather have and return False.

    Settled rows cost the least they can, and whoever takes the column of one adds its gap. If the open rows, free to
    choose among all columns at that price, want only those that are left, then no assignment is better.
    """
    rows, settled = found.open, found.settled
    scores = costs.scores(rows)
    price = costs.norms() - 2 * scores
    price[:, found.index[settled]] += found.gap[settled]
    wanted = settled[torch.isin(found.index[settled], _free_choice(price))]
    if len(wanted):
        _look_closer(found, costs, wanted)
        return False
    left = torch.ones_like(found.index, dtype=torch.bool)
    left[found.index[settled]] = False
    columns = left.nonzero().flatten()
    found.settle(rows, columns[best_assignment(scores.index_select(1, columns))], len(PREFIXES))
    return True


def _total(found: Nearest, costs: NeuronCosts) -> float:
    """The cost of all rows; most of them were asked for theirs already."""
    rows = found.cost.isnan().nonzero().flatten()
    if len(rows):
        found.cost[rows] = costs.of(rows, found.index[rows]).double()
    return float(found.cost.sum())


def _look_closer(found: Nearest, costs: NeuronCosts, rows: Tensor) -> None:
    """Take the gap of settled rows from their whole rows; reopen those for which that was done before."""
    again = found.route[rows] == len(PREFIXES)
    found.reopen(rows[again])
    rows = rows[~again]
    if len(rows) == 0:
        return
    norms, columns = costs.norms(), found.index[rows]
    price = norms - 2 * costs.scores(rows)
    own = price.gather(1, columns.unsqueeze(1))
    gap = price.scatter(1, columns.unsqueeze(1), torch.inf).amin(1, keepdim=True) - own - SLACK * norms.max()
    found.settle(rows, columns, len(PREFIXES), gap.squeeze(1).clamp_min(0))


def _free_choice(cost: Tensor) -> Tensor:
    """A different column for each row [rows, columns] with the least total cost; columns may stay unused."""
    return _on_cpu(lambda c: linear_sum_assignment(c)[1], cost)


def _on_cpu(solve: Callable[..., Any], *given: Tensor) -> Tensor:
    """What one of scipy's solvers finds, int64, on the device of what it is given: the only move to the CPU."""
    found: Tensor = torch.from_numpy(solve(*(x.cpu().numpy() for x in given))).long()
    return found.to(given[0].device)


def _routes(found: Nearest) -> dict[str, int]:
    """How many neurons were settled by each prefix, and how many by their whole rows."""
    counts = torch.bincount(found.route, minlength=len(ROUTES)).tolist()
    return {name: count for name, count in zip(ROUTES, counts, strict=True) if count}
