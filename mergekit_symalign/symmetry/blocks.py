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
from mergekit_symalign.symmetry.heads.from_rows import HeadRows
from mergekit_symalign.symmetry.heads.general import GeneralOptimum, align_general, value_grams
from mergekit_symalign.symmetry.heads.match import HeadProblem, MatchedHeads, match_heads
from mergekit_symalign.symmetry.heads.order import HeadOrder, after, reordered_gains
from mergekit_symalign.symmetry.heads.solve import (
    GAIN_AXES,
    HEAD_AXES,
    AttentionMoments,
    HeadActions,
    HeadNorms,
    head_moments,
    moved_distance,
    per_query_head,
    query_distance,
    solve_gains,
    solve_heads,
)
from mergekit_symalign.symmetry.neurons.costs import NeuronPairs
from mergekit_symalign.symmetry.neurons.experts import align_experts
from mergekit_symalign.symmetry.neurons.match import align_neurons
from mergekit_symalign.symmetry.options import (
    Facts,
    HeadShape,
    MlpShape,
    NeuronScale,
    Pair,
    Sides,
    Symmetries,
    ValueOutput,
)
from mergekit_symalign.symmetry.solved import Solved


def align_attention(sides: Sides, shape: HeadShape, use: Symmetries) -> Solved:
    """Match heads, value/output and query/key by the symmetries that ``use`` admits.

    Args:
        sides: axes query, key, value, attended; with QK-norm query_gain and key_gain too.
        shape: heads of the block.
        use: what is admitted.

    Returns:
        The element; the route by which the order of the heads was proven, and the squared distances before and after.

    >>> import torch
    >>> from mergekit_symalign.symmetry.options import HeadShape, Symmetries
    >>> shape = HeadShape(query_heads=2, kv_heads=2, head_dim=4, rotary=4)
    >>> rows = torch.randn(8, 16, generator=torch.Generator().manual_seed(0))
    >>> swapped = rows[[4, 5, 6, 7, 0, 1, 2, 3]]  # the two heads, in the other order
    >>> sides = {axis: [(rows, swapped)] for axis in ("query", "key", "value", "attended")}
    >>> found = align_attention(sides, shape, Symmetries())
    >>> torch.equal(found.element.actions["value"](swapped, 0), rows)
    True
    """
    own, norms = head_moments(sides, shape, use.rotation)
    problem = HeadProblem(HeadRows(sides, own, norms, shape, use))
    m = problem.standing
    before = heads_distance(m, norms, HeadActions(None, None), sides, {})
    matched = match_heads(problem) if use.heads and not shape.locked_heads else MatchedHeads(None, None)
    order = matched.order
    if order is None:
        found = problem.standing_actions
    else:
        own, _ = head_moments(sides, shape, use.rotation, {axis: order.of_axis(axis) for axis in HEAD_AXES})
        m = own.per_kv_head(shape.kv_heads)
        found = solve_heads(m, shape, use)
        sides = {**sides, **reordered_gains(sides, order, shape)}
    actions: dict[str, AxisAction] = {}
    general = _general_values(sides, shape, use, found, order)
    value = found.value if general is None else general.action
    if value is not None:
        actions |= {"value": value, "attended": per_query_head(value.dual(), shape)}
    if found.query is not None:
        actions |= {"query": per_query_head(found.query, shape), "key": found.query.dual()}
    actions |= solve_gains(sides, shape, use)
    tolerance = _tolerance(sides["query"])
    actions = {axis: action.snapped(tolerance) for axis, action in actions.items()}
    left = heads_distance(m, norms, found, sides, actions)
    if general is not None:
        left = query_distance(m, norms, found.query) + general.whole_distance + gains_distance(sides, actions)
    distances = {"distance_before": before, "distance_after": left}
    element = BlockElement(actions if order is None else after(order, actions, shape))
    return Solved(element, matched.facts | distances)


def align_mlp(sides: Sides, shape: MlpShape, use: Symmetries) -> Solved:
    """Match the neurons of an MLP, and its experts if it has several.

    Args:
        sides: axes gate, up, down (a plain MLP has no gate), [experts × neurons, …]; with experts also expert (router).
        shape: neurons and experts, and which factors the neurons have.
        use: what is admitted.

    Returns:
        The element; of a dense MLP how many neurons each route settled, and without factors the squared distances.

    >>> import torch
    >>> from mergekit_symalign.symmetry.options import MlpShape, Symmetries
    >>> rows = torch.eye(3)
    >>> sides = {axis: [(rows, rows[[2, 0, 1]])] for axis in ("gate", "up", "down")}
    >>> found = align_mlp(sides, MlpShape(3), Symmetries())
    >>> found.element.actions["up"](rows[[2, 0, 1]], 0).equal(rows)
    True
    """
    scale = shape.scale if use.neuron_scaling else NeuronScale.none
    if not use.permutation and scale is NeuronScale.none:
        return Solved(BlockElement({}))
    if shape.experts > 1:
        experts, gate, up = align_experts(sides, shape.experts, permute=use.permutation, scale=scale)
        return Solved(_neurons({"expert": experts}, gate, up, sides))
    pairs = NeuronPairs(sides.get("gate", ()), sides["up"], sides["down"])
    found = align_neurons(pairs, permute=use.permutation, scale=scale)
    facts: Facts = dict(found.routes)
    if found.distance is not None:
        facts["distance_before"] = neurons_distance(pairs, found.up, found.distance)
        facts["distance_after"] = found.distance
    return Solved(_neurons({}, found.gate, found.up, sides), facts)


def _neurons(actions: dict[str, AxisAction], gate: AxisAction, up: AxisAction, sides: Sides) -> BlockElement:
    up = up.snapped(_tolerance(sides["up"]))
    return BlockElement(actions | {"gate": gate, "up": up, "down": up.dual()})


def heads_distance(
    m: AttentionMoments, norms: HeadNorms, found: HeadActions, sides: Sides, actions: Mapping[str, AxisAction]
) -> float:
    """Squared distance of an attention block: from the moments, and of the gains of a QK-norm, if there are any."""
    return moved_distance(m, norms, found) + gains_distance(sides, actions)


def gains_distance(sides: Sides, actions: Mapping[str, AxisAction]) -> float:
    """Squared distance of the gains of a QK-norm alone."""
    return sum(total_distance(pair, actions.get(axis)) for axis in GAIN_AXES for pair in sides.get(axis, ()))


def _general_values(
    sides: Sides, shape: HeadShape, use: Symmetries, found: HeadActions, order: HeadOrder | None
) -> GeneralOptimum | None:
    """Any invertible matrix for each KV head, from the optimum of rotation and scale; None if not asked for."""
    if use.value_output is not ValueOutput.general:
        return None
    beside = None if order is None else {axis: order.of_axis(axis) for axis in ("value", "attended")}
    value, attended = value_grams(sides, shape, beside)
    eye = torch.eye(shape.head_dim, dtype=value.cross.dtype, device=value.cross.device).repeat(shape.kv_heads, 1)
    start = (eye if found.value is None else found.value(eye, 0)).unflatten(0, (shape.kv_heads, -1))
    return align_general(value, attended, start, condition=use.condition)


def neurons_distance(pairs: NeuronPairs, moved_by: AxisAction, after: float) -> float:
    """Squared distance of an MLP as it stands, if it is ``after`` under an action of its neurons."""
    return after if bool(moved_by.is_identity()) else sum(map(total_distance, pairs.all))


def _tolerance(side: Sequence[Pair]) -> float:
    """Below this, an angle or a factor's distance from 1 is rounding of the model's weights (at least float32's)."""
    model = side[0][1]
    return max(torch.finfo(torch.promote_types(model.dtype, torch.float32)).eps, 1e-12)
