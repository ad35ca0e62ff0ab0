"""One attention block: rotations, angles, signs and scales of heads that are already paired.

Knows axes (families/schema.py), not tensor names. What it needs of the weights are `Moments`, one entry for each KV
head (or for each candidate pair of KV heads, symmetry/heads/match.py).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import reduce
from operator import add

import torch
from torch import Tensor

from mergekit_symalign.symmetry.groups import (
    AxisAction,
    Chain,
    PerHead,
    Permutation,
    Scaling,
    rotary_action,
)
from mergekit_symalign.symmetry.heads.coordinates import (
    align_coordinates,
    gain_factors,
    gain_scores,
    order_within,
    within_heads,
)
from mergekit_symalign.symmetry.heads.gated import GATE, align_gated, gate_action, gate_matrix
from mergekit_symalign.symmetry.heads.moments import Moments, moments
from mergekit_symalign.symmetry.heads.procrustes import align_heads, align_heads_in_turn, align_planes
from mergekit_symalign.symmetry.options import HeadShape, HeadValues, Pair, Rotation, Sides, Symmetries

HEAD_AXES = ("query", "key", "value", "attended")
GAIN_AXES = ("query_gain", "key_gain")
NUMBERS = "query_head"  # of each query head by itself

HeadNorms = Mapping[str, Tensor]  # axis -> squared norm of each of the anchor's coordinates [heads, d]


@dataclass(frozen=True)
class AttentionMoments:
    """Moments of the four sides, [n, …] each: n KV heads, or n candidate pairs of KV heads (or each side's heads).

    Attributes:
        value, attended, query, key: by axis.
        gate: of what multiplies the attended values, if anything does.
    """

    value: Moments
    attended: Moments
    query: Moments
    key: Moments
    gate: Moments | None = None

    def per_kv_head(self, kv_heads: int) -> AttentionMoments:
        """Sums over the query heads of each group."""
        sides = (self.value, self.attended, self.query, self.key, self.gate)
        return AttentionMoments(*(x if x is None else x.per_kv_head(kv_heads) for x in sides))  # type: ignore[arg-type]


@dataclass(frozen=True)
class HeadActions:
    """What value and query rows carry; attended and key carry the duals. None: nothing is admitted."""

    value: AxisAction | None
    query: AxisAction | None


def head_moments(
    sides: Sides, shape: HeadShape, rotation: Rotation, order: Mapping[str, Tensor] | None = None
) -> tuple[AttentionMoments, HeadNorms]:
    """Moments over all tensors of each axis, of each head by itself: KV heads of value and key, else query heads.

    Args:
        sides: rows of the axes.
        shape: heads of the block.
        rotation: which is admitted; of heads that only turn in planes, the moments hold what turns can see.
        order: for each axis the model's heads that stand beside the anchor's, if not those of the same number.

    Returns:
        The moments, and the squared norms of the anchor's coordinates.
    """

    def of_axis(axis: str) -> tuple[Moments, Tensor]:
        planes = shape.planes() if shape.only_turns(axis, rotation) else ()
        beside = order[axis] if order else None
        found = (moments(*pair, shape.heads(axis), beside, planes) for pair in sides[axis])
        of_models, of_anchors = zip(*found, strict=True)
        return reduce(add, of_models), reduce(add, of_anchors)

    found = {axis: of_axis(axis) for axis in (*HEAD_AXES, *((GATE,) if shape.gated else ()))}
    own = {"gate" if axis == GATE else axis: m for axis, (m, _) in found.items()}
    return AttentionMoments(**own), {axis: a for axis, (_, a) in found.items()}


def solve_heads(m: AttentionMoments, shape: HeadShape, use: Symmetries, gains: Sides | None = None) -> HeadActions:
    """The best action of each KV head on its own coordinates, jointly over rotation and scale.

    Args:
        m: moments of KV heads.
        shape, use: as for the block.
        gains: of a QK-norm, with the heads as ``m`` pairs them, where each head has its own; they count when
            coordinates change places.
    """
    return HeadActions(solve_values(m, shape, use), solve_query(m, shape, use, gains))


def solve_values(m: AttentionMoments, shape: HeadShape, use: Symmetries) -> AxisAction | None:
    """What value rows carry: the largest group that admits what stands between them and the output projection."""
    rotate, scale = use.rotation is not Rotation.none, use.scaling and shape.values is not HeadValues.normed
    if shape.gated:
        return align_gated(m.value, m.attended, m.gate, rotate=rotate, scale=scale)
    return align_heads(m.value, m.attended, rotate=rotate, scale=scale) if rotate or scale else None


def scores_of_gains(sides: Sides, shape: HeadShape, use: Symmetries) -> Tensor:
    """What the gains of every two coordinates that do not turn contribute (`gain_scores`), by KV head or for all."""
    query, key = (_gains(sides, axis, shape) for axis in GAIN_AXES)
    return gain_scores(query, key, shape, scale=use.scaling, signed=use.rotation is not Rotation.none)


def solve_gains(
    sides: Sides, shape: HeadShape, use: Symmetries, query: AxisAction | None = None
) -> dict[str, AxisAction]:
    """What the gains of a QK-norm carry: the order of their coordinates, and the factors that they trade.

    Args:
        sides: axes query_gain and key_gain; one set of gains for the layer, or one for each head.
        shape, use: as for the block.
        query: what the query rows of each KV head carry.
    """
    if not shape.qk_norm:
        return {}
    of_axis = {axis: _gains(sides, axis, shape) for axis in GAIN_AXES}
    order = order_within(query, shape.head_dim)
    steps: dict[str, list[AxisAction]] = {axis: [] for axis in GAIN_AXES}
    if order is not None:
        for axis, (anchor, model) in of_axis.items():
            at = order.unsqueeze(1).expand_as(model)
            of_axis[axis] = (anchor, model.gather(2, at))
            steps[axis].append(within_heads(at.flatten(0, 1)))
    if use.scaling:
        signed = use.rotation is not Rotation.none
        factor = gain_factors(of_axis["query_gain"], of_axis["key_gain"], shape, signed=signed)
        for axis, found in zip(GAIN_AXES, (factor, 1 / factor), strict=True):
            heads = of_axis[axis][0].shape[1]
            steps[axis].append(Scaling(found.repeat_interleave(heads, dim=0).flatten()))
    return {axis: found[0] if len(found) == 1 else Chain(tuple(found)) for axis, found in steps.items() if found}


def _gains(sides: Sides, axis: str, shape: HeadShape) -> Pair:
    """Of anchor and model [KV heads, their heads, d]; one for all if they share them."""
    n = shape.kv_heads if shape.norm.per_head else 1
    anchor, model = (x.reshape(n, -1, shape.head_dim) for x in sides[axis][0])
    return anchor, model


def per_query_head(g: AxisAction, shape: HeadShape) -> AxisAction:
    """The action of each KV head, for each query head of its group."""
    group = shape.queries_per_kv
    if isinstance(g, Chain):
        return Chain(tuple(per_query_head(step, shape) for step in g.steps))
    if isinstance(g, Permutation):
        order = g.index.unflatten(0, (shape.kv_heads, -1)) % shape.head_dim
        return within_heads(order.repeat_interleave(group, dim=0))
    if isinstance(g, Scaling):
        return Scaling(g.factor.unflatten(0, (shape.kv_heads, -1)).repeat_interleave(group, dim=0).flatten())
    assert isinstance(g, PerHead)
    return g.per_query_head(group)


def value_actions(value: AxisAction, shape: HeadShape) -> dict[str, AxisAction]:
    """What the values' axes carry under an action on values; a gate's rows follow its order."""
    gate = gate_action(value) if shape.gated else None
    own = {"value": value, "attended": per_query_head(value.dual(), shape)}
    return own if gate is None else own | {GATE: per_query_head(gate, shape)}


def query_actions(query: AxisAction, shape: HeadShape) -> dict[str, AxisAction]:
    """What queries and keys carry under an action on the queries of each KV head."""
    return {"query": per_query_head(query, shape), "key": query.dual()}


def solve_query(
    m: AttentionMoments, shape: HeadShape, use: Symmetries, gains: Sides | None = None
) -> AxisAction | None:
    """What query rows carry: the largest group that positions and norms admit. Takes what `solve_heads` does.

    An order of coordinates that is one for all heads (`HeadShape.one_order`) is not solved here.
    """
    rotate = use.rotation is not Rotation.none
    if shape.qk_norm:
        reorder = rotate and shape.own_orders
        beside = scores_of_gains(gains, shape, use) if gains and reorder else None
        return align_coordinates(m.query, m.key, shape, reorder=reorder, gains=beside) if rotate else None
    scale = use.scaling and not shape.unit
    if not (rotate or scale):
        return None
    if use.rotation is Rotation.full:
        return align_heads_in_turn(m.query, m.key, scale=scale)
    if shape.rotary == 0:
        return align_heads(m.query, m.key, rotate=rotate, scale=scale)
    query, key = (side.at(shape.planes()) for side in (m.query, m.key))
    planes = align_planes(query, key, rotate=rotate, scale=scale)
    if shape.rotary == shape.head_dim:
        return rotary_action(planes, None, interleaved=shape.interleaved)
    query, key = (side.at(shape.rest()) for side in (m.query, m.key))
    rest = align_heads(query, key, rotate=rotate, scale=scale)
    return rotary_action(planes, rest, interleaved=shape.interleaved)


def dense(g: AxisAction | None, like: Moments) -> Tensor:
    """The matrix of an action on each head [n, d, d]."""
    n, d = like.model.shape
    eye = torch.eye(d, dtype=like.model.dtype, device=like.model.device).repeat(n, 1)
    return (eye if g is None else g(eye, 0)).unflatten(0, (n, d))


def moved_distance(m: AttentionMoments, norms: HeadNorms, found: HeadActions) -> float:
    """Squared distance of all rows of heads to the anchor's under ``found``, to the rounding of float64.

    Args:
        m: moments of the KV heads.
        norms: the anchor's.
        found: what the model is moved by.
    """
    left = apart(m, found)
    *parts, change = torch.stack([x.sum() for x in (*norms.values(), left)]).tolist()  # asks the device once
    own = sum(parts)
    total = own + change
    return total if total > 64 * torch.finfo(left.dtype).eps * own else 0.0


def query_distance(m: AttentionMoments, norms: HeadNorms, query: AxisAction | None) -> float:
    """Squared distance of query and key alone. Takes what `moved_distance` does."""
    own = float(norms["query"].sum() + norms["key"].sum())
    total = own + float(remaining(query, m.query, m.key).sum())
    return total if total > 64 * torch.finfo(torch.float64).eps * own else 0.0


def apart(m: AttentionMoments, found: HeadActions) -> Tensor:
    """Squared distance of each head's rows under ``found``, less the anchor's squared norms [n]."""
    left = remaining(found.value, m.value, m.attended) + remaining(found.query, m.query, m.key)
    return left if m.gate is None else left + remaining_of_side(gate_matrix(found.value, m.gate.model), m.gate)


def remaining(g: AxisAction | None, first: Moments, second: Moments) -> Tensor:
    """Squared distance of each head after ``g``, less the anchor's squared norms, which no action changes [n]."""
    total = torch.zeros_like(first.model.sum(-1))
    for action, side in ((g, first), (g.dual() if g is not None else None, second)):
        total = total + remaining_of_side(dense(action, side), side)
    return total


def remaining_of_side(matrix: Tensor, side: Moments) -> Tensor:
    """The same of one side alone, under a matrix for each head [n, d, d]."""
    return (matrix.square().sum(-2) * side.model).sum(-1) - 2 * (matrix * side.cross).sum((-2, -1))
