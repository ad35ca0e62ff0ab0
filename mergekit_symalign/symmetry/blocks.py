"""One attention block or one MLP: from the rows of anchor and model to the element that aligns the model.

Knows axes (families/schema.py), not tensor names. Each axis comes with all the tensors that have it, as matrices with
that axis first: a weight and its bias are two of them, and the bias counts as one more column.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from mergekit_symalign.symmetry.distance import total_distance
from mergekit_symalign.symmetry.element import BlockElement
from mergekit_symalign.symmetry.groups import AxisAction
from mergekit_symalign.symmetry.heads.from_rows import HeadRows
from mergekit_symalign.symmetry.heads.gated import GATE
from mergekit_symalign.symmetry.heads.general import GeneralOptimum, align_general, value_grams
from mergekit_symalign.symmetry.heads.match import HeadProblem, MatchedHeads, match_heads
from mergekit_symalign.symmetry.heads.of_keys import joined_rows, with_attended, with_own_values
from mergekit_symalign.symmetry.heads.order import HeadOrder, after, reordered_gains
from mergekit_symalign.symmetry.heads.shared import reordered, shared_order
from mergekit_symalign.symmetry.heads.solve import (
    GAIN_AXES,
    HEAD_AXES,
    NUMBERS,
    AttentionMoments,
    HeadActions,
    HeadNorms,
    head_moments,
    moved_distance,
    query_actions,
    query_distance,
    solve_gains,
    solve_heads,
    value_actions,
)
from mergekit_symalign.symmetry.neurons.costs import NeuronPairs
from mergekit_symalign.symmetry.neurons.experts import align_experts
from mergekit_symalign.symmetry.neurons.match import align_neurons
from mergekit_symalign.symmetry.options import (
    Facts,
    HeadShape,
    HeadValues,
    MlpShape,
    NeuronScale,
    Pair,
    Rotation,
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
    if shape.of_keys:
        solved = align_attention(
            joined_rows(sides, shape), with_own_values(shape), replace(use, value_output=ValueOutput.orthogonal)
        )
        return Solved(BlockElement(with_attended(solved.element.actions)), solved.facts)
    if not shape.one_order or use.rotation is Rotation.none:
        return _aligned_heads(sides, shape, use)
    own, norms = head_moments(sides, shape, use.rotation)
    standing = own.per_kv_head(shape.kv_heads)

    def moments(order: HeadOrder | None) -> AttentionMoments:
        if order is None:
            return standing
        beside = {axis: order.of_axis(axis) for axis in (*HEAD_AXES, GATE)}
        return head_moments(sides, shape, use.rotation, beside)[0].per_kv_head(shape.kv_heads)

    def source(order: Tensor) -> HeadRows:
        moved = reordered(sides, order, shape)
        return HeadRows(moved, *head_moments(moved, shape, use.rotation), shape, use)

    found = shared_order(source, moments, sides)
    if found.stays:
        return _aligned_heads(sides, shape, use, found.heads)
    solved = _aligned_heads(reordered(sides, found.order, shape), shape, use, found.heads)
    before = heads_distance(standing, norms, HeadActions(None, None), sides, {})
    element = BlockElement(found.before(solved.element.actions, shape))
    return Solved(element, {**solved.facts, "distance_before": before})


def _aligned_heads(sides: Sides, shape: HeadShape, use: Symmetries, matched: MatchedHeads | None = None) -> Solved:
    """The same without an order of the coordinates that is one for all heads, and for heads that may be matched."""
    own, norms = head_moments(sides, shape, use.rotation)
    problem = HeadProblem(HeadRows(sides, own, norms, shape, use))
    m = problem.standing
    before = heads_distance(m, norms, HeadActions(None, None), sides, {})
    if matched is None:
        matched = match_heads(problem)
    order = matched.order
    if order is not None:
        own, _ = head_moments(sides, shape, use.rotation, {axis: order.of_axis(axis) for axis in (*HEAD_AXES, GATE)})
        m = own.per_kv_head(shape.kv_heads)
        sides = {**sides, **reordered_gains(sides, order, shape)}
    settled = order is None and not shape.own_orders
    found = problem.standing_actions if settled else solve_heads(m, shape, use, sides)
    actions: dict[str, AxisAction] = {}
    general = _general_values(sides, shape, use, found, order)
    value = found.value if general is None else general.action
    if value is not None:
        actions |= value_actions(value, shape)
    if found.query is not None:
        actions |= query_actions(found.query, shape)
    actions |= solve_gains(sides, shape, use, found.query)
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
        experts, gate, up = align_experts(sides, shape, permute=use.permutation, scale=scale)
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
    """Squared distance of the gains of a QK-norm, and of the numbers of heads, alone."""
    axes = (*GAIN_AXES, NUMBERS)
    return sum(total_distance(pair, actions.get(axis)) for axis in axes for pair in sides.get(axis, ()))


def _general_values(
    sides: Sides, shape: HeadShape, use: Symmetries, found: HeadActions, order: HeadOrder | None
) -> GeneralOptimum | None:
    """Any invertible matrix for each KV head, from the optimum of rotation and scale; None if not asked for, or not
    exact."""
    if use.value_output is not ValueOutput.general or shape.values is not HeadValues.free:
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
