"""Which head of the model belongs to which of the anchor: KV heads as a whole, then query heads within their group.

The cost of a pair of KV heads is the distance that remains after the best joint rotation and scale of the pair, with
its query heads matched inside. Solving all pairs would cost more than the rest of the alignment, and siblings do not
need it: a lower bound from the KV heads' own rows alone (and Cauchy–Schwarz for the query heads) rules most pairs out,
and a pair is solved only when the assignment wants it.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import reduce
from operator import add

import torch
from torch import Tensor

from mergekit_symalign.symmetry.assignment import best_assignment, identity_is_optimal, lazy_assignment
from mergekit_symalign.symmetry.attention import (
    AttentionMoments,
    HeadActions,
    dense,
    remaining,
    solve_heads,
)
from mergekit_symalign.symmetry.groups import Permutation, compute_dtype
from mergekit_symalign.symmetry.options import HeadShape, Rotation, Sides, Symmetries
from mergekit_symalign.symmetry.procrustes import Moments, plane_correlation, plane_norm
from mergekit_symalign.symmetry.scale import quartic_scale

_ROUNDS = 2  # of matching query heads by a rotation, and solving the rotation for the match
_SLACK = 1e-5  # of the norms: the bounds are products in float32


@dataclass(frozen=True)
class HeadOrder:
    """Slot ``i`` of the anchor takes the model's head ``kv[i]`` (``query[i]``).

    Attributes:
        kv: int64 [KV heads].
        query: int64 [query heads].
    """

    kv: Tensor
    query: Tensor

    def permutation(self, axis: str, head_dim: int) -> Permutation:
        """The same as a permutation of the coordinates of an axis."""
        order = self.query if axis in ("query", "attended", "query_gain") else self.kv
        within = torch.arange(head_dim, device=order.device)
        return Permutation((order.unsqueeze(1) * head_dim + within).flatten())


def match_heads(problem: HeadProblem, m: AttentionMoments) -> HeadOrder | None:
    """The order of the model's heads that is closest to the anchor, or None if they are in that order already.

    KV heads are assigned to the optimum of the pair costs. Query heads inside a pair are assigned for the pair's
    rotation, which is solved again for that order: two rounds, as rotation and order depend on each other.

    Args:
        problem: the block.
        m: its moments with the heads as they stand.
    """
    shape = problem.shape
    if shape.query_heads == 1:
        return None
    bounds, group = problem.lower_bounds(), shape.queries_per_kv
    kv = torch.arange(shape.kv_heads, device=bounds.device)
    unmoved = remaining(None, m.value, m.attended) + remaining(None, m.query, m.key)
    if identity_is_optimal(unmoved, bounds):
        inner = problem.pairs(kv, kv).order
    else:
        kv = lazy_assignment(bounds, problem.cost)
        inner = torch.stack([problem.inner[i, j] for i, j in enumerate(kv.tolist())])
    query = (kv.unsqueeze(1) * group + inner).flatten()
    same = all(bool((order == torch.arange(len(order), device=order.device)).all()) for order in (kv, query))
    return None if same else HeadOrder(kv, query)


class HeadProblem:
    """All pairs of KV heads of one attention block.

    Another source of the products than rows of weights overrides `all_pairs`, `norms` and `group_moments`
    (symmetry/covariance.py).

    Args:
        sides: rows of the block's axes.
        shape, use: as for the block.
    """

    def __init__(self, sides: Sides, shape: HeadShape, use: Symmetries) -> None:
        self.sides, self.shape, self.use = sides, shape, use
        self.value_scaling = use.scaling
        self.inner: dict[tuple[int, int], Tensor] = {}  # order of the query heads in each pair that was solved

    def solve(self, m: AttentionMoments) -> HeadActions:
        """The best action of every pair that is matched."""
        return solve_heads(m, self.shape, self.use)

    def lower_bounds(self) -> Tensor:
        """A bound of each pair's cost from below [KV heads, KV heads]."""
        k = self.shape.kv_heads
        value, key = (self.all_pairs(axis) for axis in ("value", "key"))
        (o_a, o_b), (q_a, q_b) = (self.norms(axis) for axis in ("attended", "query"))
        outputs = (o_a.sum(-1).unsqueeze(1) * o_b.sum(-1)).sqrt()
        values = (value.model.sum(-1), o_b.sum(-1).expand(k, k), nuclear_bound(value.cross), outputs)
        bound = _least(*values, scale=self.value_scaling)
        scale = self.use.scaling and not self.shape.qk_norm
        turning, rest = self.shape.planes(), self.shape.rest()
        if self.use.rotation is Rotation.full:  # the matrix may mix planes
            turning, rest = [], [*turning, *rest]
        if turning:
            at = torch.tensor(turning, device=q_a.device)
            a, b = (plane_norm(x.index_select(-1, at)) for x in (q_a, q_b))
            queries, keys = (a.unsqueeze(1) * b).sqrt(), key.at(turning)
            correlation = plane_correlation(keys.cross).abs()
            planes = _least(b.expand_as(queries), plane_norm(keys.model), queries, correlation, scale=scale)
            bound = bound + planes.sum(-1)
        if rest:
            at = torch.tensor(rest, device=q_a.device)
            a, b = (x.index_select(-1, at).sum(-1) for x in (q_a, q_b))
            queries, keys = (a.unsqueeze(1) * b).sqrt(), key.at(rest)
            norms = (b.expand_as(queries), keys.model.sum(-1))
            bound = bound + _least(*norms, queries, nuclear_bound(keys.cross), scale=scale)
        sizes = value.model.sum(-1) + (o_b + q_b).sum(-1) + (o_a + q_a).sum(-1).unsqueeze(1)
        return bound - _SLACK * sizes

    def cost(self, i: Tensor, j: Tensor) -> Tensor:
        """Distance that remains between anchor's KV head ``i[n]`` and model's ``j[n]``, less the anchor's norms."""
        pairs = self.pairs(i, j)
        order = pairs.order
        for _ in range(_ROUNDS):
            m = pairs.matched(order)
            found = self.solve(m)
            previous, order = order, pairs.reordered(found)
            if bool((order == previous).all()):
                break
        self.inner.update({(a, b): x for a, b, x in zip(i.tolist(), j.tolist(), previous, strict=True)})
        return remaining(found.value, m.value, m.attended) + remaining(found.query, m.query, m.key)

    def pairs(self, i: Tensor, j: Tensor) -> _Pairs:
        """Moments of some pairs, their query heads ordered by the rotation of the KV heads alone."""
        value, key = (self.group_moments(axis, i, j).summed() for axis in ("value", "key"))
        attended, query = (self.group_moments(axis, i, j) for axis in ("attended", "query"))
        nothing = Moments(torch.zeros_like(value.cross), torch.zeros_like(value.model))
        by_kv = AttentionMoments(value, nothing, nothing, key)
        start = solve_heads(by_kv, self.shape, replace(self.use, scaling=False))
        return _Pairs(value, key, attended, query, _inner_order(start, attended, query))

    def all_pairs(self, axis: str) -> Moments:
        """Moments of every pair of KV heads: cross [k, k, d, d], model [k, k, d]."""
        k = self.shape.kv_heads

        def of(anchor: Tensor, other: Tensor) -> Moments:
            a, b = (x.to(compute_dtype(x.dtype)) for x in (anchor, other))
            product = (a @ b.mT).double().unflatten(1, (k, -1)).unflatten(0, (k, -1)).transpose(1, 2)
            return Moments(product, b.double().square().sum(-1).unflatten(0, (k, -1)).expand(k, k, -1))

        return reduce(add, (of(*pair) for pair in self.sides[axis]))

    def norms(self, axis: str) -> tuple[Tensor, Tensor]:
        """Squared norms of each coordinate, anchor and model [KV heads, d], over the query heads of each group."""
        k, group = self.shape.kv_heads, self.shape.queries_per_kv
        total = [torch.stack([pair[i].double().square().sum(-1) for pair in self.sides[axis]]).sum(0) for i in range(2)]
        anchor, model = (x.unflatten(0, (k, group, -1)).sum(1) for x in total)
        return anchor, model

    def group_moments(self, axis: str, i: Tensor, j: Tensor) -> GroupMoments:
        heads = self.shape.queries_per_kv if axis in ("query", "attended") else 1

        def of(anchor: Tensor, other: Tensor) -> GroupMoments:
            a, b = (x.unflatten(0, (self.shape.kv_heads, heads, -1)) for x in (anchor, other))
            a, b = (x.to(compute_dtype(x.dtype)) for x in (a.index_select(0, i), b.index_select(0, j)))
            return GroupMoments((a.unsqueeze(2) @ b.unsqueeze(1).mT).double(), b.double().square().sum(-1))

        return reduce(add, (of(*pair) for pair in self.sides[axis]))


@dataclass(frozen=True)
class GroupMoments:
    """Moments of every query head of one group with every one of another.

    Attributes:
        cross: [pairs, anchor's heads, model's heads, d, d].
        model: [pairs, model's heads, d].
    """

    cross: Tensor
    model: Tensor

    def __add__(self, other: GroupMoments) -> GroupMoments:
        return GroupMoments(self.cross + other.cross, self.model + other.model)

    def summed(self) -> Moments:
        return Moments(self.cross.sum((1, 2)), self.model.sum(1))

    def matched(self, order: Tensor) -> Moments:
        """Sum over the heads, each of the anchor's with its partner ``order`` [pairs, heads]."""
        index = order.reshape(*order.shape, 1, 1, 1).expand(-1, -1, 1, *self.cross.shape[-2:])
        return Moments(self.cross.gather(2, index).sum((1, 2)), self.model.sum(1))


@dataclass(frozen=True)
class _Pairs:
    """Some pairs of KV heads: the moments of their sides, and a first order of the query heads [pairs, heads]."""

    value: Moments
    key: Moments
    attended: GroupMoments
    query: GroupMoments
    order: Tensor

    def matched(self, order: Tensor) -> AttentionMoments:
        return AttentionMoments(self.value, self.attended.matched(order), self.query.matched(order), self.key)

    def reordered(self, found: HeadActions) -> Tensor:
        return _inner_order(found, self.attended, self.query)


def nuclear_bound(m: Tensor) -> Tensor:
    """An upper bound of the nuclear norm of each matrix [*, d, d]."""
    return m.shape[-1] ** 0.5 * torch.linalg.matrix_norm(m)


def _least(b: Tensor, o: Tensor, p: Tensor, q: Tensor, *, scale: bool) -> Tensor:
    """``min_s s²b + o/s² − 2(s p + q/s)``, or its value at ``s = 1`` where scales are not admitted."""
    s = quartic_scale(b, o, p, q) if scale else torch.ones_like(b)
    return s**2 * b + o / s**2 - 2 * (s * p + q / s)


def _inner_order(found: HeadActions, attended: GroupMoments, query: GroupMoments) -> Tensor:
    """The query heads of each pair matched under the rotation that was found [pairs, heads]."""
    dual = found.value.dual() if found.value is not None else None
    o, q = dense(dual, attended.summed()), dense(found.query, query.summed())
    score = (o[:, None, None] * attended.cross + q[:, None, None] * query.cross).sum((-2, -1))
    return torch.stack([best_assignment(pair) for pair in score])
