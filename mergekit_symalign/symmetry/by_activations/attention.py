"""Heads, value/output and query/key, matched by what a block computes on prompts and by its weights."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from mergekit_symalign.symmetry.by_activations.covariance import (
    BY_ACTIVATIONS,
    TOLERANCE,
    Covariance,
    Covariances,
    inverse_root,
    require_axis,
)
from mergekit_symalign.symmetry.by_activations.evidence import Agreement, Shares, most_likely
from mergekit_symalign.symmetry.by_activations.heads import (
    QUERIES,
    VALUES,
    HeadCovariances,
    blended,
    of_heads,
    reordered,
    units_of_activations,
    units_of_weights,
    value_ratio,
)
from mergekit_symalign.symmetry.element import BlockElement
from mergekit_symalign.symmetry.groups import AxisAction, Chain, HeadRotation, Permutation, Scaling
from mergekit_symalign.symmetry.heads.gated import gate_action
from mergekit_symalign.symmetry.heads.match import HeadProblem, MatchedHeads, match_heads
from mergekit_symalign.symmetry.heads.of_keys import joined_rows, with_attended, with_own_values
from mergekit_symalign.symmetry.heads.order import HeadOrder, after, reordered_gains
from mergekit_symalign.symmetry.heads.shared import SharedOrder, orders, shared_order
from mergekit_symalign.symmetry.heads.shared import reordered as reordered_rows
from mergekit_symalign.symmetry.heads.solve import (
    GAIN_AXES,
    HEAD_AXES,
    AttentionMoments,
    HeadActions,
    dense,
    query_actions,
    solve_gains,
    solve_query,
    value_actions,
)
from mergekit_symalign.symmetry.options import HeadShape, HeadValues, Rotation, Sides, Symmetries
from mergekit_symalign.symmetry.solved import Solved

_SHARES = {"values": VALUES, "queries": QUERIES}


def align_attention_by(seen: Covariances, weights: Sides, shape: HeadShape, use: Symmetries) -> Solved:
    """Match heads, value/output and query/key by their activations and weights.

    Queries and keys (in front of RoPE and of QK-norm) are matched as rows of weights are. Values and attended values
    are both written by the model's value coordinates, so both carry the same rotation; their scale is the one that
    makes the model's as large as the anchor's. Weights count beside activations with the share that is the likeliest
    (`most_likely`), one for values and one for queries. The gains of a QK-norm count as weights.

    Args:
        seen: axes query, key, value, attended.
        weights: the rows of the same axes, and of the gains.
        shape: heads of the block.
        use: what is admitted.

    Raises:
        ShapeError: if an axis is missing or has another length than the shape says.

    >>> shape = HeadShape(query_heads=2, kv_heads=2, head_dim=4, rotary=4)
    >>> seen = torch.randn(8, 64, generator=torch.Generator().manual_seed(0))  # coordinates, tokens
    >>> order = [4, 5, 6, 7, 0, 1, 2, 3]  # the two heads, in the other order
    >>> both = {axis: Covariance.of_rows([(seen, seen[order])]) for axis in HEAD_AXES}
    >>> weights = {axis: [(seen[:, :16], seen[order, :16])] for axis in HEAD_AXES}
    >>> found = align_attention_by(both, weights, shape, Symmetries())
    >>> torch.allclose(found.element.actions["query"](seen[order], 0), seen, atol=1e-5)
    True
    """
    for axis in HEAD_AXES:
        if axis != "value" or not shape.of_keys:
            require_axis(axis, seen, shape.heads(axis) * shape.head_dim)
    if shape.of_keys:
        joined = {**seen, "query": seen["query"].per_layer() + seen["attended"].per_layer()}
        joined |= {axis: _nothing(shape.heads(axis) * shape.head_dim, seen["key"]) for axis in VALUES}
        found = align_attention_by(joined, joined_rows(weights, shape), with_own_values(shape), use)
        return replace(found, element=BlockElement(with_attended(found.element.actions)))
    rows = {axis: Covariance.of_rows(weights[axis]) for axis in HEAD_AXES}
    gains: Sides = {axis: weights[axis] for axis in GAIN_AXES if axis in weights}
    block = _Block(seen, rows, gains, shape, use)
    heads, shares = most_likely(block.solved, block.agreement, tuple(_SHARES))
    return Solved(block.element(heads, shares), BY_ACTIVATIONS)


@dataclass(frozen=True)
class _Heads:
    """How a block's heads are aligned, but for the scale of their values.

    Attributes:
        shared: the order of the coordinates of every head, where they share one.
        order: of the heads; None if they stay.
        found: what each KV head carries behind both.
    """

    shared: SharedOrder | None
    order: HeadOrder | None
    found: HeadActions


@dataclass(frozen=True)
class _Block:
    """Both kinds of evidence.

    Attributes:
        seen, rows: of activations and of weights, axes query, key, value, attended.
        gains: of a QK-norm.
        shape, use: as for the block.
    """

    seen: Covariances
    rows: Covariances
    gains: Sides
    shape: HeadShape
    use: Symmetries

    @cached_property
    def units(self) -> tuple[Covariances, Covariances]:
        return units_of_activations(self.seen, self.shape), units_of_weights(self.rows, self.shape)

    def solved(self, shares: Shares) -> _Heads:
        """The best alignment when weights have these shares."""
        evidence = blended(*self.units, {axes: shares[name] for name, axes in _SHARES.items()})
        gains = _weighed(self.gains, shares["queries"])
        if not self.shape.one_order or self.use.rotation is Rotation.none:
            return self._aligned(evidence, gains, None)

        def moments(order: HeadOrder | None) -> AttentionMoments:
            moved = evidence if order is None else reordered(evidence, of_heads(order, self.shape))
            return HeadProblem(HeadCovariances(moved, self.shape, self.use)).standing

        def source(order: Tensor) -> HeadCovariances:
            return HeadCovariances(reordered(evidence, orders(order, self.shape)), self.shape, self.use)

        shared = shared_order(source, moments, gains)
        evidence = reordered(evidence, orders(shared.order, self.shape))
        return self._aligned(evidence, reordered_rows(gains, shared.order, self.shape), shared)

    def _aligned(self, evidence: Covariances, gains: Sides, shared: SharedOrder | None) -> _Heads:
        """The same for coordinates in their order."""
        problem = HeadProblem(HeadCovariances(evidence, self.shape, self.use))
        matched: MatchedHeads = match_heads(problem) if shared is None else shared.heads
        order = matched.order
        if order is not None:
            moved = reordered(evidence, of_heads(order, self.shape))
            problem = HeadProblem(HeadCovariances(moved, self.shape, self.use))
            gains = reordered_gains(gains, order, self.shape)
        found = problem.standing_actions
        if self.shape.own_orders:
            found = replace(found, query=solve_query(problem.standing, self.shape, self.use, gains))
        return _Heads(shared, order, found)

    def agreement(self, heads: _Heads) -> dict[str, Agreement]:
        """How well anchor and model agree under an alignment."""
        activations, weights = (_correlations(self._moved(x, heads), heads.found, self.shape) for x in self.units)
        return {name: Agreement(activations[name], weights[name]) for name in _SHARES}

    def _moved(self, of_axes: Covariances, heads: _Heads) -> Covariances:
        """With the model's coordinates in the orders of an alignment."""
        if heads.shared is not None:
            of_axes = reordered(of_axes, orders(heads.shared.order, self.shape))
        return of_axes if heads.order is None else reordered(of_axes, of_heads(heads.order, self.shape))

    def element(self, heads: _Heads, shares: Shares) -> BlockElement:
        """What the axes of the block carry, the scale of the values included."""
        shape, order = self.shape, heads.order
        gains = self.gains if heads.shared is None else reordered_rows(self.gains, heads.shared.order, shape)
        gains = gains if order is None else reordered_gains(gains, order, shape)
        actions: dict[str, AxisAction] = {}
        value = heads.found.value
        if self.use.scaling and shape.values is not HeadValues.normed:
            value = self._with_scale(heads, shares["values"])
        if value is not None:
            actions |= value_actions(value, shape)
        if heads.found.query is not None:
            actions |= query_actions(heads.found.query, shape)
        actions |= solve_gains(gains, shape, self.use, heads.found.query)
        actions = {axis: action.snapped(TOLERANCE) for axis, action in actions.items()}
        actions = actions if order is None else after(order, actions, shape)
        return BlockElement(actions if heads.shared is None else heads.shared.before(actions, shape))

    def _with_scale(self, heads: _Heads, share: float) -> AxisAction:
        """The values' action with the scale that makes the model's as large as the anchor's: of each head, or of each
        coordinate where each has a factor of its own. Activations and weights count by their shares.

        Minimises ``‖s V_B − V_A‖² / s`` of activations, which treats both models alike; least squares would shrink
        whatever is noisy.
        """
        g, shape = heads.found.value, self.shape
        sides = [self._moved(x, heads) for x in (self.seen, self.rows)]
        if shape.gated and (order := gate_action(g)) is not None:
            sides = [{**x, **reordered(x, _permutations(order, shape))} for x in sides]
        seen, rows = (value_ratio(x, shape, divided=divided) for x, divided in zip(sides, (False, True), strict=True))
        ratio = (seen ** (1 - share) * rows**share).flatten()
        if not shape.gated:
            eye = torch.eye(shape.head_dim, dtype=ratio.dtype, device=ratio.device).expand(len(ratio), -1, -1)
            return HeadRotation(g.matrix if isinstance(g, HeadRotation) else eye, ratio)
        factors = Scaling(ratio)
        return factors if g is None else Chain((*(g.steps if isinstance(g, Chain) else (g,)), factors))


def _correlations(of_axes: Covariances, found: HeadActions, shape: HeadShape) -> dict[str, float]:
    """Of anchor and model, of what is matched together; 0 where there is nothing."""
    result = {}
    for name, action in (("values", found.value), ("queries", found.query)):
        dual = None if action is None else action.dual()
        inner, anchor, model = [], [], []
        for axis, g in zip(_SHARES[name], (action, dual), strict=True):
            c = of_axes[axis]
            side = c.moments(shape.heads(axis), shape.kv_heads)
            matrix = dense(g, side)
            inner.append((matrix * side.cross).sum())
            anchor.append(c.anchor.sum())
            model.append((matrix.square().sum(-2) * side.model).sum())
        both = torch.stack(anchor).sum() * torch.stack(model).sum()
        result[name] = float(torch.stack(inner).sum() * inverse_root(both))
    return result


def _permutations(order: Permutation, shape: HeadShape) -> dict[str, Permutation]:
    """An order of the value coordinates of every KV head, on values and on what they become."""
    return {axis: g for axis, g in value_actions(order, shape).items() if axis in VALUES and isinstance(g, Permutation)}


def _weighed(gains: Sides, share: float) -> Sides:
    """The gains of a QK-norm, so that all of them together count as much as weights of this share."""
    if not gains:
        return gains
    size = torch.stack([a.double().square().sum() for pairs in gains.values() for a, _ in pairs]).sum()
    unit = share**0.5 * inverse_root(size)
    return {axis: [(a * unit, b * unit) for a, b in pairs] for axis, pairs in gains.items()}


def _nothing(size: int, like: Covariance) -> Covariance:
    """Of coordinates that no token shows."""
    return Covariance(like.cross.new_zeros(size, size), like.anchor.new_zeros(size), like.model.new_zeros(size))
