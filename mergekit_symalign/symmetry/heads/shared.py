"""One order of the coordinates for all heads of a layer, where they share the gains of a QK-norm.

The order of the coordinates and the order of the heads depend on each other. Each is the optimum for the other in turn,
until neither changes: the distance falls in every round. The search starts from where the coordinates stand, and from
what the keys say whatever the order of their heads is; the better end counts.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from mergekit_symalign.symmetry.assignment.linear import best_assignment
from mergekit_symalign.symmetry.groups import AxisAction, Permutation, behind
from mergekit_symalign.symmetry.heads.coordinates import rest_scores, within_heads
from mergekit_symalign.symmetry.heads.match import HeadProblem, HeadSource, MatchedHeads, match_heads
from mergekit_symalign.symmetry.heads.order import HeadOrder
from mergekit_symalign.symmetry.heads.solve import GAIN_AXES, AttentionMoments, apart, scores_of_gains
from mergekit_symalign.symmetry.options import HeadShape, Sides

_ROUNDS = 8


@dataclass(frozen=True)
class SharedOrder:
    """An order of the coordinates of every head, and the order of heads that belongs to it.

    Attributes:
        order: int64 [d]; slot ``i`` takes the model's coordinate ``order[i]``.
        heads: how the heads are matched.
        cost: squared distance, less what is the same for every order.
    """

    order: Tensor
    heads: MatchedHeads
    cost: float

    @property
    def stays(self) -> bool:
        """Whether every coordinate keeps its place."""
        return bool((self.order == torch.arange(len(self.order), device=self.order.device)).all())

    def before(self, actions: Mapping[str, AxisAction], shape: HeadShape) -> dict[str, AxisAction]:
        """The same actions behind this order."""
        moved = orders(self.order, shape)
        return {**actions, **{axis: behind(order, actions.get(axis)) for axis, order in moved.items()}}


def orders(order: Tensor, shape: HeadShape) -> dict[str, Permutation]:
    """An order of the coordinates of every head [d], on the axes that it moves."""
    heads = {"query": shape.query_heads, "key": shape.kv_heads} | dict.fromkeys(GAIN_AXES, 1)
    return {axis: within_heads(order.expand(n, -1)) for axis, n in heads.items()}


def reordered(sides: Sides, order: Tensor, shape: HeadShape) -> Sides:
    """Rows with the model's coordinates in an order [d]."""
    if torch.equal(order, torch.arange(len(order), device=order.device)):
        return sides
    moved = orders(order, shape)
    return {axis: [(a, moved[axis](b, 0) if axis in moved else b) for a, b in x] for axis, x in sides.items()}


def shared_order(
    source: Callable[[Tensor], HeadSource], moments: Callable[[HeadOrder | None], AttentionMoments], gains: Sides
) -> SharedOrder:
    """The order of the coordinates that brings the model closest to the anchor, with the order of its heads.

    Args:
        source: what the heads are matched by, with the model's coordinates in an order [d].
        moments: per KV head, of the coordinates as they stand, for an order of the heads.
        gains: axes query_gain and key_gain.
    """
    standing = torch.arange(gains["query_gain"][0][0].numel(), device=gains["query_gain"][0][0].device)
    first = source(standing)
    beside = scores_of_gains(gains, first.shape, first.use)[0]
    turning = first.shape.rotary

    def ordered(scores: Tensor) -> Tensor:
        return torch.cat((standing[:turning], turning + best_assignment(scores + beside)))

    def settled(order: Tensor) -> SharedOrder:
        for _ in range(_ROUNDS):
            at = source(order)
            heads = match_heads(HeadProblem(at))
            m = moments(heads.order)
            scores = rest_scores(m.query, m.key, at.shape).sum(0)
            previous, order = order, ordered(scores)
            if torch.equal(order, previous):
                break
        left = apart(m, at.solve(m)).sum()
        gained = (scores + beside).gather(1, (order[turning:] - turning).unsqueeze(1)).sum()
        return SharedOrder(order, heads, float(left + 2 * (scores.diagonal().sum() - gained)))

    guess = ordered(_by_keys(first))
    found = settled(guess)
    if not torch.equal(guess, standing):
        found = min(settled(standing), found, key=lambda x: x.cost)
    return found


def _by_keys(source: HeadSource) -> Tensor:
    """What every two coordinates could contribute at best by the keys alone, each head with its best partner [r, r]."""
    rest = source.shape.rest()
    cross = source.all_pairs("key").at(rest).cross.abs()
    return (
        cross.amax(1) if source.use.heads and not source.shape.locked else cross.diagonal(dim1=0, dim2=1).movedim(-1, 0)
    ).sum(0)
