"""Covariances of a block's heads: what matching them asks for (symmetry/heads/match.py)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from mergekit_symalign.symmetry.assignment.linear import identity_is_optimal
from mergekit_symalign.symmetry.by_activations.covariance import Covariance, Covariances, inverse_root, size_ratio
from mergekit_symalign.symmetry.groups import Permutation
from mergekit_symalign.symmetry.heads.bounds import whole_bounds
from mergekit_symalign.symmetry.heads.moments import Moments
from mergekit_symalign.symmetry.heads.order import HeadOrder
from mergekit_symalign.symmetry.heads.pairs import GroupMoments
from mergekit_symalign.symmetry.heads.solve import (
    HEAD_AXES,
    AttentionMoments,
    HeadActions,
    solve_query,
    solve_values,
)
from mergekit_symalign.symmetry.options import HeadShape, Symmetries

VALUES, QUERIES = ("value", "attended"), ("query", "key")  # axes that are matched together


@dataclass(frozen=True)
class HeadCovariances:
    """Covariances of a block's axes, as a `HeadSource`. Values come in units of their own norm.

    Attributes:
        covariances: axes query, key, value, attended.
        shape, use: as for the block.
    """

    covariances: Covariances
    shape: HeadShape
    use: Symmetries

    @cached_property
    def own(self) -> AttentionMoments:
        heads = {axis: self.shape.heads(axis) for axis in HEAD_AXES}
        return AttentionMoments(**{axis: self.covariances[axis].moments(n, n) for axis, n in heads.items()})

    def solve(self, m: AttentionMoments) -> HeadActions:
        value = solve_values(m, self.shape, replace(self.use, scaling=False))
        return HeadActions(value, solve_query(m, self.shape, self.use))

    def identity_route(self, costs: Tensor) -> str | None:
        return "bounds" if identity_is_optimal(costs, self.lower_bounds) else None

    def bounds(self) -> tuple[Tensor, None]:
        return self.lower_bounds, None

    def query_heads_stay(self, found: HeadActions) -> bool:
        return self.shape.queries_per_kv == 1

    @cached_property
    def lower_bounds(self) -> Tensor:
        """Lower bounds of the pairs' costs [KV heads, KV heads]."""
        scale = self.use.scaling and not (self.shape.qk_norm or self.shape.unit)
        norms = {
            axis: (_by_kv_head(c.anchor, self.shape), _by_kv_head(c.model, self.shape))
            for axis, c in self.covariances.items()
        }
        value, key = (self.all_pairs(axis) for axis in ("value", "key"))
        turning = self.shape.turning(self.use.rotation)
        return whole_bounds(norms, value, key, turning, scale_values=False, scale_queries=scale)

    def all_pairs(self, axis: str) -> Moments:
        k, c = self.shape.kv_heads, self.covariances[axis]
        return Moments(c.by_head(k), c.model.unflatten(0, (k, -1)).expand(k, k, -1))

    def group_moments(self, axis: str, i: Tensor, j: Tensor) -> GroupMoments:
        k, c = self.shape.kv_heads, self.covariances[axis]
        group = self.shape.heads(axis) // k
        pairs = c.by_head(k * group).unflatten(1, (k, group)).unflatten(0, (k, group)).transpose(1, 2)
        at = (i * k + j.to(i)).long()
        return GroupMoments(
            pairs.flatten(0, 1).index_select(0, at), c.model.unflatten(0, (k, group, -1)).index_select(0, j)
        )


def units_of_activations(seen: Covariances, shape: HeadShape) -> dict[str, Covariance]:
    """In units in which activations and weights can be weighed against each other.

    Values and what they become are taken relative to the norm of each KV head of either model, which takes their scale
    out of the problem; relative to the norm of each coordinate where coordinates have factors of their own. Queries and
    keys are taken relative to the anchor's in the layer, as their scale trades one against the other.
    """
    sizes = _value_sizes(seen, shape)
    values = {axis: _in_units_of(sizes, seen[axis], shape) for axis in VALUES}
    return values | {axis: seen[axis].per_layer() for axis in QUERIES}


def units_of_weights(rows: Covariances, shape: HeadShape) -> dict[str, Covariance]:
    """The same of weights: what writes the values is multiplied by their scale, what reads them is divided by it, so
    each is taken relative to its own norm."""
    values = {axis: _in_units_of(2 * _sizes_of(rows[axis], shape), rows[axis], shape) for axis in VALUES}
    return values | {axis: rows[axis].per_layer() for axis in QUERIES}


def blended(one: Covariances, other: Covariances, shares: Mapping[tuple[str, ...], float]) -> dict[str, Covariance]:
    """Two kinds of evidence in one, the other one with a share of its own for `VALUES` and for `QUERIES`."""
    return {axis: one[axis].blended(other[axis], share) for axes, share in shares.items() for axis in axes}


def of_heads(order: HeadOrder, shape: HeadShape) -> dict[str, Permutation]:
    return {axis: order.permutation(axis, shape.head_dim) for axis in HEAD_AXES}


def reordered(of_axes: Covariances, orders: Mapping[str, Permutation]) -> dict[str, Covariance]:
    return {axis: c.reordered(orders[axis]) if axis in orders else c for axis, c in of_axes.items()}


def value_ratio(of_axes: Covariances, shape: HeadShape, *, divided: bool) -> Tensor:
    """The factor that makes the model's values as large as the anchor's: of each KV head [KV heads, 1], or of each
    coordinate where each has a factor of its own [KV heads, d].

    Args:
        divided: whether ``attended`` is what reads the values (rows of weights), not what the values become.
    """
    if not divided:
        return size_ratio(*_value_sizes(of_axes, shape))
    value, attended = (size_ratio(*_sizes_of(of_axes[axis], shape)) for axis in VALUES)
    return (value / attended).sqrt()


def _value_sizes(of_axes: Covariances, shape: HeadShape) -> Tensor:
    """Of values and attended values together, as `_sizes_of`."""
    return torch.stack([_sizes_of(of_axes[axis], shape) for axis in VALUES]).sum(0)


def _sizes_of(c: Covariance, shape: HeadShape) -> Tensor:
    """Squared norms of anchor and model of each KV head, its query heads together [2, KV heads, 1].

    Where each coordinate has a factor of its own, the squared norms of each of them [2, KV heads, d].
    """
    sizes = torch.stack([_by_kv_head(x, shape) for x in (c.anchor, c.model)])
    return sizes if shape.gated else sizes.sum(-1, keepdim=True)


def _by_kv_head(squares: Tensor, shape: HeadShape) -> Tensor:
    """Sums over the query heads of each group [KV heads, d]."""
    return squares.unflatten(0, (shape.kv_heads, -1, shape.head_dim)).sum(1)


def _in_units_of(sizes: Tensor, c: Covariance, shape: HeadShape) -> Covariance:
    anchor, model = (inverse_root(size) * size.numel() ** -0.5 for size in sizes)
    heads = len(c.anchor) // shape.head_dim // shape.kv_heads
    wide = (x.repeat_interleave(heads, dim=0).expand(-1, shape.head_dim).flatten() for x in (anchor, model))
    return c.scaled(*wide)
