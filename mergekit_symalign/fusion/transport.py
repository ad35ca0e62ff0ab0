"""Optimal transport between the units of two layers: costs, exact and regularised maps (Singh & Jaggi, 2020).

A unit is a neuron or a coordinate. ``T`` [model, anchor] says what each of the anchor's units takes of the model's:
the transport plan between uniform marginals, times the number of units, so that its rows and columns sum to one. The
plans come from POT (Python Optimal Transport), which is imported when the first one is needed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mergekit_symalign.fusion.maps import Map, Mixing
from mergekit_symalign.symmetry.assignment.linear import without_idle_cycles
from mergekit_symalign.symmetry.fitting import require_pair, require_square
from mergekit_symalign.symmetry.groups import Permutation
from mergekit_symalign.symmetry.options import Pair

_ROUNDINGS = 64  # of a unit's squared length: distances below this are rounding
_EMD_STEPS = 10**9  # POT's own limit ends large problems before their optimum
_SINKHORN_STEPS = 10_000
_STOP = 1e-9  # error of the marginals at which POT's Sinkhorn stops
_LOG_DOMAIN = 0.01  # regularisation below which exp(-cost / regularisation) leaves the range of float64


@dataclass(frozen=True)
class Transported:
    """A transport map, and what is known of it.

    Attributes:
        map: from the model's units to the anchor's.
        before: mean cost of the units as they stand, 0 to 1.
        after: mean cost under the map.
        error: how far Sinkhorn's algorithm was from its end: the largest deviation of a sum from 1, before that was
            put right; 0 for exact transport.
    """

    map: Map
    before: float
    after: float
    error: float = 0.0


def weight_costs(sides: Sequence[Pair]) -> Tensor:
    """Distances between units by their weights (OT-WTS).

    The rows of every tensor have unit length; a row of zeros stays. Distances are Euclidean, not squared, over all
    tensors, and divided by their maximum.

    Args:
        sides: anchor's and model's rows [units, columns] of each tensor; the model's columns already transported.

    Returns:
        Costs [model, anchor], float64, from 0 to 1.

    Raises:
        ShapeError: if anchor and model differ in shape.

    >>> rows = torch.tensor([[3.0, 0.0], [0.0, 1.0]])
    >>> weight_costs([(rows, rows.flip(0))]).tolist()
    [[1.0, 0.0], [0.0, 1.0]]
    """
    for pair in sides:
        require_pair("rows of a unit", pair)
    squares = [_squared_distances(_unit_rows(anchor), _unit_rows(model)) for anchor, model in sides]
    rounding = _ROUNDINGS * torch.finfo(torch.float64).eps * len(squares)
    return as_costs(torch.stack(squares).sum(0) if len(squares) > 1 else squares[0], rounding)


def transport(costs: Tensor, regularization: float) -> Transported:
    """The optimal transport map between uniform marginals.

    Args:
        costs: [model, anchor], square.
        regularization: of the entropy. 0: exact (earth mover's distance), which between equally many units is a
            permutation; otherwise Sinkhorn's algorithm.

    Returns:
        A `Permutation` (units that may as well stay do) or a `Mixing` of float64.

    Raises:
        ShapeError: if the costs are not square.

    >>> transport(torch.tensor([[1.0, 0.0], [0.0, 1.0]]), 0.0).map.index.tolist()
    [1, 0]
    """
    require_square("costs", costs)
    before = float(costs.diagonal().mean())
    if regularization == 0:
        found = exact_map(costs)
        after = costs.gather(0, found.index.unsqueeze(0)).mean()
        return Transported(found, before, float(after))
    plan = _sinkhorn(costs.double(), regularization)
    error = float((torch.cat((plan.sum(0), plan.sum(1))) - 1).abs().max())
    matrix = _with_exact_sums(plan)
    return Transported(Mixing(matrix), before, float((matrix * costs).sum(0).mean()), error)


def exact_map(costs: Tensor) -> Permutation:
    """Exact transport: between equally many units of equal mass the optimum is a permutation (Birkhoff)."""
    ot: Any = _pot()
    mass = _uniform(len(costs))
    plan = torch.from_numpy(ot.emd(mass.numpy(), mass.numpy(), costs.double().cpu().numpy(), numItermax=_EMD_STEPS))
    index = plan.argmax(0).to(costs.device)
    return Permutation(without_idle_cycles(index, -costs.double().mT))


def _sinkhorn(costs: Tensor, regularization: float) -> Tensor:
    """``T`` of entropic transport, in the logarithm's domain where plain numbers would underflow."""
    ot: Any = _pot()
    mass = _uniform(len(costs)).to(costs.device)
    method = "sinkhorn_log" if regularization < _LOG_DOMAIN else "sinkhorn"
    plan: Tensor = ot.sinkhorn(
        mass, mass, costs, regularization, method=method, numItermax=_SINKHORN_STEPS, stopThr=_STOP, warn=False
    )
    return plan * len(costs)


def _with_exact_sums(plan: Tensor) -> Tensor:
    """The rounding of Altschuler, Weed & Rigollet (2017): rows and columns sum to one, nearly nothing else changes."""
    plan = plan * (1 / plan.sum(1, keepdim=True)).clamp(max=1.0)
    plan = plan * (1 / plan.sum(0)).clamp(max=1.0)
    rows, columns = (1 - plan.sum(1)).clamp(min=0.0), (1 - plan.sum(0)).clamp(min=0.0)
    missing = rows.sum()
    return plan + torch.outer(rows, columns) / torch.where(missing > 0, missing, 1.0)


def _pot() -> Any:
    import ot  # an optional extra: whoever plans a merge has looked for it (graph/transport_plan.py)

    return ot


def _uniform(n: int) -> Tensor:
    return torch.full((n,), 1 / n, dtype=torch.float64)


def _unit_rows(rows: Tensor) -> Tensor:
    rows = rows.double()
    return rows / rows.norm(dim=1, keepdim=True).masked_fill_(rows.abs().amax(1, keepdim=True) == 0, 1.0)


def _squared_distances(anchor: Tensor, model: Tensor) -> Tensor:
    return model.square().sum(1, keepdim=True) + anchor.square().sum(1) - 2 * model @ anchor.mT


def as_costs(squared: Tensor, rounding: float) -> Tensor:
    """From squared distances to costs between 0 and 1; what is only rounding is 0."""
    distances = squared.masked_fill(squared < rounding, 0.0).sqrt()
    largest = distances.max()
    return distances / torch.where(largest > 0, largest, 1.0)
