"""One attention block or one MLP: from the rows of anchor and model to the element that aligns the model.

Knows axes (families/schema.py), not tensor names. Each axis comes with all the tensors that have it, as matrices with
that axis first: a weight and its bias are two of them, and the bias counts as one more column.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from mergekit_symalign.symmetry.distance import total_distance
from mergekit_symalign.symmetry.element import BlockElement
from mergekit_symalign.symmetry.groups import AxisAction
from mergekit_symalign.symmetry.heads.match import HeadProblem, match_heads
from mergekit_symalign.symmetry.heads.order import after, reordered_gains
from mergekit_symalign.symmetry.heads.solve import (
    GAIN_AXES,
    HEAD_AXES,
    AttentionMoments,
    HeadActions,
    HeadNorms,
    distance,
    head_moments,
    per_query_head,
    solve_gains,
)
from mergekit_symalign.symmetry.neurons.costs import NeuronPairs
from mergekit_symalign.symmetry.neurons.experts import align_experts
from mergekit_symalign.symmetry.neurons.match import align_neurons
from mergekit_symalign.symmetry.options import Facts, HeadShape, MlpShape, NeuronScale, Pair, Sides, Symmetries


def align_attention(sides: Sides, shape: HeadShape, use: Symmetries, facts: Facts | None = None) -> BlockElement:
    """Match heads, value/output and query/key by the symmetries that ``use`` admits.

    Args:
        sides: axes query, key, value, attended; with QK-norm query_gain and key_gain too.
        shape: heads of the block.
        use: what is admitted.
        facts: takes the route by which the order of the heads was proven, and the squared distances before and after.
    """
    own, norms = head_moments(sides, shape, use.rotation)
    problem = HeadProblem(sides, own, norms, shape, use)
    m = problem.standing
    if facts is not None:
        facts["distance_before"] = head_distance(m, norms, HeadActions(None, None), sides, {})
    order = match_heads(problem, facts) if use.heads else None
    if order is None:
        found = problem.standing_actions
    else:
        own, _ = head_moments(sides, shape, use.rotation, {axis: order.of(axis) for axis in HEAD_AXES})
        m = own.per_kv_head(shape.kv_heads)
        found = problem.solve(m)
        sides = {**sides, **reordered_gains(sides, order, shape)}
    actions: dict[str, AxisAction] = {}
    if found.value is not None:
        actions |= {"value": found.value, "attended": per_query_head(found.value.dual(), shape)}
    if found.query is not None:
        actions |= {"query": per_query_head(found.query, shape), "key": found.query.dual()}
    actions |= solve_gains(sides, shape, use)
    tolerance = _tolerance(sides["query"])
    actions = {axis: action.snapped(tolerance) for axis, action in actions.items()}
    if facts is not None:
        facts["distance_after"] = head_distance(m, norms, found, sides, actions)
    return BlockElement(actions if order is None else after(order, actions, shape))


def align_mlp(sides: Sides, shape: MlpShape, use: Symmetries, facts: Facts | None = None) -> BlockElement:
    """Match the neurons of an MLP, and its experts if it has several.

    Args:
        sides: axes gate, up, down (a plain MLP has no gate), [experts × neurons, …]; with experts also expert (router).
        shape: neurons and experts, and which factors the neurons have.
        use: what is admitted.
        facts: takes how many neurons each route settled (of a dense MLP).
    """
    scale = shape.scale if use.neuron_scaling else NeuronScale.none
    if not use.permutation and scale is NeuronScale.none:
        return BlockElement({})
    actions: dict[str, AxisAction] = {}
    if shape.experts > 1:
        actions["expert"], gate, up = align_experts(sides, shape.experts, permute=use.permutation, scale=scale)
    else:
        pairs = NeuronPairs(sides.get("gate", ()), sides["up"], sides["down"])
        gate, up = align_neurons(pairs, permute=use.permutation, scale=scale, facts=facts)
        if facts is not None and "distance_after" in facts:
            facts["distance_before"] = distance_before(pairs, up, facts["distance_after"])
    up = up.snapped(_tolerance(sides["up"]))
    return BlockElement(actions | {"gate": gate, "up": up, "down": up.dual()})


def head_distance(
    m: AttentionMoments, norms: HeadNorms, found: HeadActions, sides: Sides, actions: Mapping[str, AxisAction]
) -> float:
    """Squared distance of an attention block: from the moments, and of the gains of a QK-norm, if there are any."""
    gains = (total_distance(pair, actions.get(axis)) for axis in GAIN_AXES for pair in sides.get(axis, ()))
    return distance(m, norms, found) + sum(gains)


def distance_before(pairs: NeuronPairs, moved_by: AxisAction, after: float) -> float:
    """Squared distance of an MLP as it stands, if it is ``after`` under an action of its neurons."""
    return after if bool(moved_by.is_identity()) else sum(map(total_distance, pairs.all))


def _tolerance(side: Sequence[Pair]) -> float:
    """Below this, an angle or a factor's distance from 1 is rounding of the model's weights (at least float32's)."""
    model = side[0][1]
    return max(torch.finfo(torch.promote_types(model.dtype, torch.float32)).eps, 1e-12)
