"""Which neuron of the model belongs to which of the anchor: a linear assignment problem, solved to its optimum.

The mathematics: docs/symmetries.md. Most neurons are settled by a certificate, the others by an assignment.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from mergekit_symalign.symmetry.assignment.linear import LARGE, best_assignment, free_choice, sparse_matching
from mergekit_symalign.symmetry.assignment.shortlist import shortlist_assignment
from mergekit_symalign.symmetry.groups import AxisAction, Chain, Permutation, Scaling
from mergekit_symalign.symmetry.neurons.certificate import PREFIXES, Nearest, nearest_neighbours
from mergekit_symalign.symmetry.neurons.costs import NeuronCosts, NeuronPairs, factors
from mergekit_symalign.symmetry.options import NeuronScale
from mergekit_symalign.symmetry.rows import SLACK

ROUTES = (*(f"neurons_prefix_{i + 1}" for i in range(len(PREFIXES))), "neurons_rows", "neurons_full")
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


@dataclass(frozen=True)
class MatchedNeurons:
    """Where the model's neurons go, and by which factors.

    Attributes:
        gate: the action that gate rows carry.
        up: that of up rows; down columns carry its dual.
        routes: how many neurons were settled by each route.
        distance: squared, that is left; None if neurons were not matched, or have factors.
    """

    gate: AxisAction
    up: AxisAction
    routes: Mapping[str, int]
    distance: float | None


def align_neurons(pairs: NeuronPairs, *, permute: bool, scale: NeuronScale) -> MatchedNeurons:
    """The permutation of neurons, and with ``scale`` their signed scales, that come closest to the anchor.

    Maximises ``Σ_i S[i, π(i)]``, ``S = G_A G_Bᵀ + U_A U_Bᵀ + D_Aᵀ D_B``. With a scale the score of a pair is that of
    its own best factor for ``u → c u, d → d / c``, so that permutation and factors are optimal together.

    Args:
        pairs: rows of anchor and model.
        permute, scale: what is admitted.

    >>> import torch
    >>> from mergekit_symalign.symmetry.options import NeuronScale
    >>> side = [(torch.eye(3), torch.eye(3)[[1, 2, 0]])]
    >>> found = align_neurons(NeuronPairs(side, side, side), permute=True, scale=NeuronScale.none)
    >>> found.gate.index.tolist(), found.distance  # slot 0 takes the model's neuron 2
    ([2, 0, 1], 0.0)
    """
    found = best_permutation(pairs, scale=scale) if permute else None
    index = torch.arange(pairs.neurons, device=pairs.device) if found is None else found.index
    routes, permutation = {} if found is None else found.routes, Permutation(index)
    if scale is NeuronScale.none:
        return MatchedNeurons(permutation, permutation, routes, None if found is None else found.cost)
    factor = Scaling(factors(pairs, index, signed=scale is NeuronScale.signed))
    return MatchedNeurons(permutation, Chain((permutation, factor)), routes, None)


def best_permutation(pairs: NeuronPairs, *, scale: NeuronScale) -> Assignment:
    """The optimal permutation: by nearest neighbours as far as they prove it, the rest as an assignment problem."""
    costs = NeuronCosts(pairs, scale)
    found = nearest_neighbours(costs)
    _reopen_shared(found)
    while len(found.open) <= _FEW * pairs.neurons:
        if len(found.open) == 0 or _complete(found, costs):
            return Assignment(found.index, _routes(found), _total(found, costs))
    return _full(costs)


def _full(costs: NeuronCosts) -> Assignment:
    """The optimum of the whole problem, the identity if it is as good."""
    rows = torch.arange(costs.pairs.neurons, device=costs.pairs.device)
    scores = costs.rounded_scores() if len(rows) >= LARGE else None
    index = shortlist_assignment(scores, sparse_matching) if scores is not None else None
    if scores is None or index is None:
        index, may_stay = best_assignment(costs.scores()), False  # which has compared it with the identity
    else:
        may_stay = not scores.identity_is_worse(index)
    cost = float(costs.of_pairs(rows, index).double().sum())
    if may_stay:
        unmoved = float(costs.of_pairs(rows, rows).double().sum())
        index, cost = (rows, unmoved) if unmoved <= cost else (index, cost)
    return Assignment(index, {ROUTES[-1]: len(index)}, cost)


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
    wanted = settled[torch.isin(found.index[settled], free_choice(price))]
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
        found.cost[rows] = costs.of_pairs(rows, found.index[rows]).double()
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


def _routes(found: Nearest) -> dict[str, int]:
    """How many neurons were settled by each prefix, and how many by their whole rows."""
    counts = torch.bincount(found.route, minlength=len(ROUTES)).tolist()
    return {name: count for name, count in zip(ROUTES, counts, strict=True) if count}
