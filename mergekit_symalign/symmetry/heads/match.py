"""Which head of the model belongs to which of the anchor: KV heads as a whole, then query heads within their group.

The cost of a pair of KV heads is the distance that remains after the best joint rotation and scale of the pair, with
its query heads matched inside. Solving all pairs would cost more than the rest of the alignment, and siblings do not
need it: a lower bound from the KV heads' own rows alone (and Cauchy–Schwarz for the query heads) rules most pairs out,
and a pair is solved only when the assignment wants it.
"""

from __future__ import annotations

import math
from dataclasses import replace
from functools import cached_property, reduce
from operator import add

import torch
from torch import Tensor

from mergekit_symalign.symmetry.assignment.linear import identity_is_optimal, lazy_assignment
from mergekit_symalign.symmetry.groups import AxisAction
from mergekit_symalign.symmetry.heads.bounds import (
    Norms,
    coordinate_norms,
    plane_bounds,
    plane_correlations,
    whole_bounds,
)
from mergekit_symalign.symmetry.heads.moments import Moments, of_planes
from mergekit_symalign.symmetry.heads.order import HeadOrder
from mergekit_symalign.symmetry.heads.pairs import GroupMoments, HeadPairs, PlaneMoments
from mergekit_symalign.symmetry.heads.solve import (
    HEAD_AXES,
    AttentionMoments,
    HeadActions,
    HeadNorms,
    dense,
    remaining,
    remaining_of_side,
    solve_heads,
)
from mergekit_symalign.symmetry.options import Facts, HeadShape, Sides, Symmetries
from mergekit_symalign.symmetry.rows import SLACK, compute_dtype
from mergekit_symalign.symmetry.threads import in_parallel

_PREFIX = 1 / 8  # of the columns, which are compared first
_ROUNDS = 2  # of matching query heads by a rotation, and solving the rotation for the match
_PAIRS = 4  # of KV heads that one thread solves together


def match_heads(problem: HeadProblem, facts: Facts | None = None) -> HeadOrder | None:
    """The order of the model's heads that is closest to the anchor, or None if they are in that order already.

    KV heads are assigned to the optimum of the pair costs. Query heads inside a pair are assigned for the pair's
    rotation, which is solved again for that order: two rounds, as rotation and order depend on each other.

    Args:
        problem: the block.
        facts: takes the route: ``identity`` (no head can be cheaper elsewhere), ``bounds`` (the same by bounds that
            took the products of all heads), or ``pairs`` (some pairs were solved).
    """
    shape = problem.shape
    if shape.query_heads == 1:
        return None
    kv = torch.arange(shape.kv_heads, device=problem.own.value.model.device)
    route = problem.identity_route()
    if route is None:
        route, kv = "pairs", problem.assignment()
        inner = torch.stack([problem.inner[i, j] for i, j in enumerate(kv.tolist())])
    elif problem.query_heads_stay():
        inner = torch.arange(shape.queries_per_kv, device=kv.device).expand(len(kv), -1)
    else:
        inner = problem.start(problem.pairs(kv, kv))
    if facts is not None:
        facts["heads_route"] = route
    query = (kv.unsqueeze(1) * shape.queries_per_kv + inner).flatten()
    same = all(bool((order == torch.arange(len(order), device=order.device)).all()) for order in (kv, query))
    return None if same else HeadOrder(kv, query)


class HeadProblem:
    """All pairs of KV heads of one attention block.

    Another source of the products than rows of weights (by_activations/covariance.py) overrides `all_pairs` and
    `group_moments`, and the cheap proofs `identity_route`, `assignment` and `query_heads_stay`.

    Args:
        sides: rows of the block's axes.
        own: their moments with the heads as they stand, of each side's own heads.
        anchor: squared norms of the anchor's coordinates, of each side's own heads.
        shape, use: as for the block.
    """

    def __init__(
        self, sides: Sides, own: AttentionMoments, anchor: HeadNorms, shape: HeadShape, use: Symmetries
    ) -> None:
        self.sides, self.own, self.anchor, self.shape, self.use = sides, own, anchor, shape, use
        self.value_scaling = use.scaling
        self.inner: dict[tuple[int, int], Tensor] = {}  # order of the query heads in each pair that was solved

    def solve(self, m: AttentionMoments) -> HeadActions:
        """The best action of every pair that is matched."""
        return solve_heads(m, self.shape, self.use)

    def identity_route(self) -> str | None:
        """By which bounds the KV heads are proven to stand best where they are, if by any."""
        costs = self.standing_costs()
        if self.turning and identity_is_optimal(costs, self.prefix_bounds):
            return "identity"
        if identity_is_optimal(costs, self.plane_bounds):
            return "identity"
        promising = self.plane_bounds.diagonal() <= self.plane_bounds.amin(1)
        if bool(promising.all()) and identity_is_optimal(costs, self.lower_bounds):
            return "bounds"
        return None

    def assignment(self) -> Tensor:
        """The best KV head of the model for each of the anchor's; dearer bounds only for what the cheap leave open."""
        if not self.turning:
            return lazy_assignment(self.lower_bounds, self.cost)
        return lazy_assignment(self.plane_bounds, self.cost, lambda: self.lower_bounds)

    @cached_property
    def standing(self) -> AttentionMoments:
        """Moments of every KV head with its own number, all query heads where they are."""
        return self.own.per_kv_head(self.shape.kv_heads)

    @cached_property
    def standing_actions(self) -> HeadActions:
        """The best action of every KV head there."""
        return self.solve(self.standing)

    def standing_costs(self) -> Tensor:
        """What every KV head costs there without any action, less the anchor's norms [KV heads]."""
        m = self.standing
        return remaining(None, m.value, m.attended) + remaining(None, m.query, m.key)

    @property
    def turning(self) -> list[int]:
        """The coordinates of query and key that only turn with their plane."""
        return self.shape.turning(self.use.rotation)

    @cached_property
    def plane_bounds(self) -> Tensor:
        """Lower bounds of the pairs' costs, from the planes of query and key alone [KV heads, KV heads]."""
        correlations = self.plane_correlations if self.turning else {}
        return plane_bounds(self.norms, self.norms, correlations, self.turning)

    @property
    def prefix_bounds(self) -> Tensor:
        """The same from the first columns of queries and keys: lower, and enough for siblings."""
        shown, correlations, d = {}, {}, self.shape.head_dim
        for axis in ("query", "key"):
            anchor, model = (x.narrow(1, 0, math.ceil(_PREFIX * x.shape[1])) for x in self.sides[axis][0])
            correlations[axis] = plane_correlations([(anchor, model)], d, self.turning)
            shown[axis] = self._of_groups(coordinate_norms(anchor, d), coordinate_norms(model, d))
        return plane_bounds(self.norms, shown, correlations, self.turning)

    @cached_property
    def lower_bounds(self) -> Tensor:
        """Lower bounds of the pairs' costs, from the products of all KV heads [KV heads, KV heads]."""
        value, key = (self.all_pairs(axis) for axis in ("value", "key"))
        scale = self.use.scaling and not self.shape.qk_norm
        return whole_bounds(self.norms, value, key, self.turning, scale_values=self.value_scaling, scale_queries=scale)

    def query_heads_stay(self) -> bool:
        """Whether every query head is proven to be nearest to its own number, under the action that is best for them.

        With ``δ_h`` the distance that is left between the anchor's head ``h`` and the model's moved one, the model's
        ``h`` is at least ``‖a_g − a_h‖ − δ_h`` from the anchor's ``g``. The anchor's heads are compared by their
        queries, which is less than all of them.
        """
        k, group = self.shape.kv_heads, self.shape.queries_per_kv
        if group == 1:
            return True
        found = self.standing_actions
        dual = found.value.dual() if found.value is not None else None
        left = self._left(found.query, "query") + self._left(dual, "attended")
        size = torch.stack([x.sum(-1) for axis in ("query", "attended") for x in self._head_norms(axis)]).sum(0)
        near = (left + SLACK * size).clamp_min(0).sqrt().unflatten(0, (k, group))
        apart = self._query_distances().clamp_min(0).sqrt()
        apart = apart.masked_fill(torch.eye(group, dtype=torch.bool, device=apart.device), torch.inf)
        return bool((apart > near.unsqueeze(1) + near.unsqueeze(2)).all())

    def _left(self, g: AxisAction | None, axis: str) -> Tensor:
        """Squared distance of each query head to the anchor's under an action of its KV head [query heads]."""
        side: Moments = getattr(self.own, axis)
        matrix = dense(g, getattr(self.standing, axis)).repeat_interleave(self.shape.queries_per_kv, dim=0)
        return self.anchor[axis].sum(-1) + remaining_of_side(matrix, side)

    def _query_distances(self) -> Tensor:
        """Squared distances, with their rounding taken off, of the anchor's queries within each group [k, g, g]."""
        k, group = self.shape.kv_heads, self.shape.queries_per_kv
        total = torch.zeros(k, group, group, dtype=torch.float64, device=self.sides["query"][0][0].device)
        for anchor, _ in self.sides["query"]:
            for i, heads in enumerate(anchor.unflatten(0, (k, -1)).unbind(0)):
                x = heads.to(compute_dtype(heads.dtype)).reshape(group, -1)
                total[i] += (x @ x.mT).double()
        own = total.diagonal(dim1=1, dim2=2)
        sizes = own.unsqueeze(1) + own.unsqueeze(2)
        return (1 - SLACK) * sizes - 2 * total

    def cost(self, i: Tensor, j: Tensor) -> Tensor:
        """Distance that remains between anchor's KV head ``i[n]`` and model's ``j[n]``, less the anchor's norms."""
        few = _PAIRS if i.device.type == "cpu" else len(i)
        parts = in_parallel(
            lambda some: self._cost(*some), list(zip(i.split(few), j.split(few), strict=True)), i.device
        )
        costs, orders = (torch.cat(x) for x in zip(*parts, strict=True))
        self.inner.update({(a, b): x for a, b, x in zip(i.tolist(), j.tolist(), orders, strict=True)})
        return costs

    def _cost(self, i: Tensor, j: Tensor) -> tuple[Tensor, Tensor]:
        """The same, and the order of the query heads that belongs to it [n, heads]."""
        pairs = self.pairs(i, j)
        order = self.start(pairs)
        for _ in range(_ROUNDS):
            m = pairs.matched(order)
            found = self.solve(m)
            previous, order = order, pairs.order(found)
            if bool((order == previous).all()):
                break
        return remaining(found.value, m.value, m.attended) + remaining(found.query, m.query, m.key), previous

    def pairs(self, i: Tensor, j: Tensor) -> HeadPairs:
        """Moments of some pairs."""
        value, key = (self.group_moments(axis, i, j).summed() for axis in ("value", "key"))
        attended, query = (self.group_moments(axis, i, j) for axis in ("attended", "query"))
        return HeadPairs(value, key, attended, query)

    def start(self, pairs: HeadPairs) -> Tensor:
        """A first order of the query heads of each pair [pairs, heads], by the rotation of the KV heads alone."""
        return pairs.order(self._by_kv_heads(pairs.value, pairs.key))

    def _by_kv_heads(self, value: Moments, key: Moments) -> HeadActions:
        """The rotations that value and key alone ask for."""
        nothing = Moments(torch.zeros_like(value.cross), torch.zeros_like(value.model))
        by_kv = AttentionMoments(value, nothing, nothing, key)
        return solve_heads(by_kv, self.shape, replace(self.use, scaling=False))

    @cached_property
    def plane_correlations(self) -> dict[str, Tensor]:
        """``Σ a conj(b)`` of each plane of every pair of query and of key heads [anchor's, model's, planes]."""
        d, turning = self.shape.head_dim, self.turning
        return {axis: plane_correlations(self.sides[axis], d, turning) for axis in ("query", "key")}

    def all_pairs(self, axis: str) -> Moments:
        """Moments of every pair of KV heads: cross [k, k, d, d], model [k, k, d]."""
        k = self.shape.kv_heads
        norms = self.norms[axis][1].expand(k, k, -1)
        if self.shape.only_turns(axis, self.use.rotation):
            return Moments(of_planes(self.plane_correlations[axis], self.turning), norms)

        def of(anchor: Tensor, other: Tensor) -> Tensor:
            model = other.to(compute_dtype(other.dtype)).mT

            def row(head: Tensor) -> Tensor:
                return (head.to(model.dtype) @ model).double().unflatten(1, (k, -1)).transpose(0, 1)

            return torch.stack(in_parallel(row, anchor.unflatten(0, (k, -1)).unbind(0), anchor.device))

        return Moments(reduce(add, (of(*pair) for pair in self.sides[axis])), norms)

    @cached_property
    def norms(self) -> Norms:
        """Squared norms of each coordinate, anchor and model [KV heads, d], over the query heads of each group."""
        return {axis: self._of_groups(*self._head_norms(axis)) for axis in HEAD_AXES}

    def _of_groups(self, anchor: Tensor, model: Tensor) -> tuple[Tensor, Tensor]:
        """Sums over the query heads of each group [KV heads, d]."""
        anchor, model = (x.unflatten(0, (self.shape.kv_heads, -1)).sum(1) for x in (anchor, model))
        return anchor, model

    def _head_norms(self, axis: str) -> tuple[Tensor, Tensor]:
        """The same for the axis' own heads."""
        return self.anchor[axis], getattr(self.own, axis).model

    def group_moments(self, axis: str, i: Tensor, j: Tensor) -> GroupMoments | PlaneMoments:
        """Of anchor's KV heads ``i`` and model's ``j``; where planes only turn, no more than their turns can see."""
        norms = self._head_norms(axis)[1].unflatten(0, (self.shape.kv_heads, -1)).index_select(0, j)
        if self.shape.only_turns(axis, self.use.rotation):
            groups = (self.shape.kv_heads, -1)
            c = self.plane_correlations[axis].unflatten(1, groups).unflatten(0, groups)
            return PlaneMoments(c.transpose(1, 2)[i, j], norms, self.turning)
        return GroupMoments(self._cross(axis, i, j), norms)

    def _cross(self, axis: str, i: Tensor, j: Tensor) -> Tensor:
        """``A Bᵀ`` of every two heads of each pair of KV heads [pairs, anchor's heads, model's heads, d, d]."""
        heads = self.shape.heads(axis) // self.shape.kv_heads
        groups = (self.shape.kv_heads, -1)

        def of(anchor: Tensor, other: Tensor) -> Tensor:
            def product(at: tuple[int, int]) -> Tensor:
                sides = (z.unflatten(0, groups).select(0, head) for z, head in zip((anchor, other), at, strict=True))
                a, b = (z.to(compute_dtype(z.dtype)) for z in sides)
                by_head = (a @ b.mT).unflatten(1, (heads, -1)).unflatten(0, (heads, -1)).transpose(1, 2)
                return by_head.contiguous().double()

            pairs = list(zip(i.tolist(), j.tolist(), strict=True))
            return torch.stack(in_parallel(product, pairs, i.device))

        return reduce(add, (of(*pair) for pair in self.sides[axis]))
