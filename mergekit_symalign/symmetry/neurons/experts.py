"""Mixture of experts: which expert of the model belongs to which of the anchor, and the neurons inside each pair.

The cost of a pair is the squared distance of the two router rows plus what remains between the experts after the best
order of their neurons. Solving every pair would cost as many assignment problems as there are pairs, and siblings do
not need it: the router rows and nearest neighbours on a prefix of the coordinates bound a pair from below, and a pair
is solved only when the assignment of experts wants it (symmetry/assignment/linear.py, `lazy_assignment`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor

from mergekit_symalign.symmetry.assignment.linear import best_assignment, identity_is_optimal, lazy_assignment
from mergekit_symalign.symmetry.groups import AxisAction, Chain, Permutation, Scaling
from mergekit_symalign.symmetry.neurons.certificate import prefixes
from mergekit_symalign.symmetry.neurons.costs import NeuronPairs
from mergekit_symalign.symmetry.neurons.match import align_neurons
from mergekit_symalign.symmetry.options import MlpShape, NeuronScale, Pair, Sides
from mergekit_symalign.symmetry.rows import SLACK

_PREFIX = 0.02  # share of the coordinates that the bounds look at
_ROWS = 256  # neurons whose prefix distances to all of the model's are held at once


def align_experts(
    sides: Sides, shape: MlpShape, *, permute: bool, scale: NeuronScale
) -> tuple[Permutation, AxisAction, AxisAction]:
    """The best order of experts, and the best order and factors of the neurons in each.

    Args:
        sides: expert (router rows), gate, up, down; [experts, …] and [experts × neurons, …].
        shape: how many experts, and in how many groups.
        permute: whether experts and neurons may change places.
        scale: which factors the neurons may have.

    Returns:
        The actions on the expert axis, on gate rows and on up rows; down columns carry the dual of the last.
    """
    problem = ExpertProblem(sides, shape.experts, permute, scale)
    order = match_experts(problem, shape.groups) if permute else list(range(shape.experts))
    pairs = [problem.solved(i, j) for i, j in enumerate(order)]
    gate = joined_experts([pair.gate for pair in pairs], order)
    up = gate if scale is NeuronScale.none else joined_experts([pair.up for pair in pairs], order)
    return Permutation(torch.tensor(order, device=sides["up"][0][0].device)), gate, up


def match_experts(problem: ExpertProblem, groups: int = 1) -> list[int]:
    """The model's expert for each of the anchor's: the optimum of the pair costs.

    Args:
        problem: the pairs.
        groups: of experts, which none leaves.
    """
    bounds = problem.lower_bounds()
    if identity_is_optimal(problem.unmoved(), bounds):
        return list(range(problem.experts))
    order: list[int] = grouped_assignment(bounds, problem.costs, groups).tolist()
    return order


def grouped_assignment(bounds: Tensor, cost: Callable[[Tensor, Tensor], Tensor], groups: int) -> Tensor:
    """`lazy_assignment` where rows of one group take columns of one group, all groups being of one size.

    A pair of groups costs what the best assignment inside it does, so groups are assigned in the same way.
    """
    if groups == 1:
        return lazy_assignment(bounds, cost)
    size = len(bounds) // groups
    blocks = bounds.unflatten(1, (groups, size)).unflatten(0, (groups, size)).transpose(1, 2)
    inside: dict[tuple[int, int], Tensor] = {}

    def of_pair(a: int, b: int) -> Tensor:
        index = lazy_assignment(blocks[a, b], lambda i, j: cost(i + a * size, j + b * size)) + b * size
        inside[a, b] = index
        return cost(torch.arange(size, device=index.device) + a * size, index).sum()

    def of_groups(i: Tensor, j: Tensor) -> Tensor:
        return torch.stack([of_pair(a, b) for a, b in zip(i.tolist(), j.tolist(), strict=True)])

    least = torch.stack([_least(block) for block in blocks.flatten(0, 1)]).unflatten(0, (groups, groups))
    chosen = lazy_assignment(least, of_groups)
    return torch.cat([inside[a, b] for a, b in enumerate(chosen.tolist())])


def _least(costs: Tensor) -> Tensor:
    """What the best assignment costs."""
    return costs.gather(1, best_assignment(-costs).unsqueeze(1)).sum()


def joined_experts(actions: Sequence[AxisAction], order: Sequence[int]) -> AxisAction:
    """The actions of single experts as one, behind the permutation of experts."""
    if isinstance(actions[0], Chain):
        permutation, factors = zip(*(a.steps for a in actions if isinstance(a, Chain)), strict=True)
        factor = torch.cat([f.factor for f in factors if isinstance(f, Scaling)])
        return Chain((joined_experts(permutation, order), Scaling(factor)))
    indices = [a.index for a in actions if isinstance(a, Permutation)]
    return Permutation(torch.cat([x + j * len(x) for x, j in zip(indices, order, strict=True)]))


@dataclass(frozen=True)
class _SolvedPair:
    """The actions on gate rows and on up rows of one expert for another's, and what remains between the two."""

    gate: AxisAction
    up: AxisAction
    cost: Tensor


@dataclass(frozen=True)
class ExpertProblem:
    """All pairs of experts of one layer."""

    sides: Sides
    experts: int
    permute: bool
    scale: NeuronScale
    _known: dict[tuple[int, int], _SolvedPair] = field(default_factory=dict)

    @property
    def neurons(self) -> int:
        return self.sides["up"][0][0].shape[0] // self.experts

    def solved(self, i: int, j: int) -> _SolvedPair:
        """Anchor's expert ``i`` and model's ``j``."""
        if (i, j) not in self._known:
            pairs = NeuronPairs(*(self._of_pair(axis, i, j) for axis in ("gate", "up", "down")))
            found = align_neurons(pairs, permute=self.permute, scale=self.scale)
            gate, up, down = found.gate, found.up, found.up.dual()
            actions = ((gate, pairs.fixed), (up, pairs.scaled), (down, pairs.divided))
            cost = torch.stack([_left_between(a, g(b, 0)) for g, side in actions for a, b in side]).sum()
            self._known[i, j] = _SolvedPair(gate, up, cost)
        return self._known[i, j]

    def costs(self, i: Tensor, j: Tensor) -> Tensor:
        """What remains between anchor's experts ``i[n]`` and model's ``j[n]``, router rows included."""
        inside = [self.solved(a, b).cost for a, b in zip(i.tolist(), j.tolist(), strict=True)]
        return self._router.flatten().index_select(0, i * self.experts + j) + torch.stack(inside)

    def unmoved(self) -> Tensor:
        """The same for every expert and the one that stands in its place, neurons as they are [experts]."""
        total = self._router.diagonal()
        for axis in ("gate", "up", "down"):
            for a, b in self.sides.get(axis, ()):
                total = total + (a.double() - b.double()).square().sum(1).unflatten(0, (self.experts, -1)).sum(1)
        return total

    def lower_bounds(self) -> Tensor:
        """A bound of each pair's cost from below [experts, experts]: every neuron takes its nearest on a prefix.

        With factors only the gate rows, which no factor touches, can bound a pair.
        """
        axes = ("gate",) if self.scale is not NeuronScale.none else ("gate", "up", "down")
        both = [pair for axis in axes for pair in self.sides.get(axis, ())]
        if not both:
            return self._router * (1 - SLACK)
        anchor, model = prefixes(both, _PREFIX)
        norms = (1 - SLACK) * model.square().sum(1)
        nearest = []
        for a in anchor.split(_ROWS):
            own = (1 - SLACK) * a.square().sum(1, keepdim=True)
            lowest = torch.addmm(norms.unsqueeze(0), a, model.mT, alpha=-2) + own
            nearest.append(lowest.unflatten(1, (self.experts, -1)).amin(2).clamp_min(0))
        inside = torch.cat(nearest).double().unflatten(0, (self.experts, -1)).sum(1)
        return self._router * (1 - SLACK) + inside

    @cached_property
    def _router(self) -> Tensor:
        """Squared distance of every two router rows [experts, experts]."""
        rows = [(a.double().unsqueeze(1) - b.double()).square().sum(-1) for a, b in self.sides["expert"]]
        return torch.stack(rows).sum(0)

    def _of_pair(self, axis: str, i: int, j: int) -> Sequence[Pair]:
        return [
            (a.narrow(0, i * self.neurons, self.neurons), b.narrow(0, j * self.neurons, self.neurons))
            for a, b in self.sides.get(axis, ())
        ]


def _left_between(a: Tensor, b: Tensor) -> Tensor:
    return (a.double() - b.double()).square().sum()
