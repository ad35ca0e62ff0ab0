"""What the matching of heads asks of the rows of weights: products of pairs, and bounds that need fewer of them."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, reduce
from operator import add

import torch
from torch import Tensor

from mergekit_symalign.symmetry.assignment.linear import identity_is_optimal
from mergekit_symalign.symmetry.groups import AxisAction
from mergekit_symalign.symmetry.heads.bounds import (
    Norms,
    coordinate_norms,
    plane_bounds,
    plane_correlations,
    whole_bounds,
)
from mergekit_symalign.symmetry.heads.gated import GATE, gate_action
from mergekit_symalign.symmetry.heads.moments import Moments, of_planes
from mergekit_symalign.symmetry.heads.pairs import GroupMoments, PlaneMoments
from mergekit_symalign.symmetry.heads.solve import (
    AttentionMoments,
    HeadActions,
    HeadNorms,
    dense,
    remaining_of_side,
    solve_heads,
)
from mergekit_symalign.symmetry.options import HeadShape, Sides, Symmetries
from mergekit_symalign.symmetry.rows import SLACK, compute_dtype
from mergekit_symalign.symmetry.threads import in_parallel

_PREFIX = 1 / 8  # of the columns, which are compared first


@dataclass(frozen=True)
class HeadRows:
    """The rows of a block's weights, as a `HeadSource`.

    Attributes:
        sides: rows of the block's axes.
        own: their moments with the heads as they stand, of each side's own heads.
        anchor: squared norms of the anchor's coordinates, of each side's own heads.
        shape, use: as for the block.
    """

    sides: Sides
    own: AttentionMoments
    anchor: HeadNorms
    shape: HeadShape
    use: Symmetries

    def solve(self, m: AttentionMoments) -> HeadActions:
        return solve_heads(m, self.shape, self.use)

    def identity_route(self, costs: Tensor) -> str | None:
        """``identity`` where no head can be cheaper elsewhere; ``bounds``: by bounds that take the products of all."""
        if self.turning and identity_is_optimal(costs, self.prefix_bounds):
            return "identity"
        if identity_is_optimal(costs, self.plane_bounds):
            return "identity"
        promising = self.plane_bounds.diagonal() <= self.plane_bounds.amin(1)
        if bool(promising.all()) and identity_is_optimal(costs, self.lower_bounds):
            return "bounds"
        return None

    def bounds(self) -> tuple[Tensor, Callable[[], Tensor] | None]:
        """Dearer bounds only for what the cheap ones leave open."""
        return (self.plane_bounds, lambda: self.lower_bounds) if self.turning else (self.lower_bounds, None)

    def query_heads_stay(self, found: HeadActions) -> bool:
        """Whether every query head is proven to be nearest to its own number under the actions of their KV heads.

        With ``δ_h`` the distance that is left between the anchor's head ``h`` and the model's moved one, the model's
        ``h`` is at least ``‖a_g − a_h‖ − δ_h`` from the anchor's ``g``. The anchor's heads are compared by their
        queries, which is less than all of them.
        """
        k, group = self.shape.kv_heads, self.shape.queries_per_kv
        if group == 1:
            return True
        dual = found.value.dual() if found.value is not None else None
        left = self._left(found.query, "query") + self._left(dual, "attended")
        axes = ["query", "attended", *((GATE,) if self.shape.gated else ())]
        if self.shape.gated:
            left = left + self._left(gate_action(found.value), GATE)
        size = torch.stack([x.sum(-1) for axis in axes for x in self._head_norms(axis)]).sum(0)
        near = (left + SLACK * size).clamp_min(0).sqrt().unflatten(0, (k, group))
        apart = self._query_distances().clamp_min(0).sqrt()
        apart = apart.masked_fill(torch.eye(group, dtype=torch.bool, device=apart.device), torch.inf)
        return bool((apart > near.unsqueeze(1) + near.unsqueeze(2)).all())

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
        value = None if self.shape.gated else self.all_pairs("value")
        scale = self.use.scaling and not (self.shape.qk_norm or self.shape.unit)
        scales = {"scale_values": self.use.scaling, "scale_queries": scale}
        return whole_bounds(self.norms, value, self.all_pairs("key"), self.turning, **scales)

    def _left(self, g: AxisAction | None, axis: str) -> Tensor:
        """Squared distance of each query head to the anchor's under an action of its KV head [query heads]."""
        side = self._own(axis)
        standing = side.per_kv_head(self.shape.kv_heads)
        matrix = dense(g, standing).repeat_interleave(self.shape.queries_per_kv, dim=0)
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

        def products(anchor: Tensor, other: Tensor) -> Tensor:
            model = other.to(compute_dtype(other.dtype)).mT

            def row(head: Tensor) -> Tensor:
                return (head.to(model.dtype) @ model).double().unflatten(1, (k, -1)).transpose(0, 1)

            return torch.stack(in_parallel(row, anchor.unflatten(0, (k, -1)).unbind(0), anchor.device))

        return Moments(reduce(add, (products(*pair) for pair in self.sides[axis])), norms)

    @cached_property
    def norms(self) -> Norms:
        """Squared norms of each coordinate, anchor and model [KV heads, d], over the query heads of each group."""
        return {axis: self._of_groups(*self._head_norms(axis)) for axis in self.anchor}

    def _of_groups(self, anchor: Tensor, model: Tensor) -> tuple[Tensor, Tensor]:
        """Sums over the query heads of each group [KV heads, d]."""
        anchor, model = (x.unflatten(0, (self.shape.kv_heads, -1)).sum(1) for x in (anchor, model))
        return anchor, model

    def _head_norms(self, axis: str) -> tuple[Tensor, Tensor]:
        """The same for the axis' own heads."""
        return self.anchor[axis], self._own(axis).model

    def _own(self, axis: str) -> Moments:
        side: Moments = getattr(self.own, "gate" if axis == GATE else axis)
        return side

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

        def products(anchor: Tensor, other: Tensor) -> Tensor:
            def product(at: tuple[int, int]) -> Tensor:
                sides = (z.unflatten(0, groups).select(0, head) for z, head in zip((anchor, other), at, strict=True))
                a, b = (z.to(compute_dtype(z.dtype)) for z in sides)
                by_head = (a @ b.mT).unflatten(1, (heads, -1)).unflatten(0, (heads, -1)).transpose(1, 2)
                return by_head.contiguous().double()

            pairs = list(zip(i.tolist(), j.tolist(), strict=True))
            return torch.stack(in_parallel(product, pairs, i.device))

        return reduce(add, (products(*pair) for pair in self.sides[axis]))
