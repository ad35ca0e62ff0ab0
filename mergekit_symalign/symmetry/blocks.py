"""One attention block or one MLP: from the rows of anchor and model to the element that aligns the model.

Knows axes (families/schema.py), not tensor names. Each axis comes with all the tensors that have it, as matrices with
that axis first: a weight and its bias are two of them, and the bias counts as one more column.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import Enum

import torch
from torch import Tensor

from mergekit_symalign.symmetry.assignment import NeuronPairs, align_neurons
from mergekit_symalign.symmetry.element import BlockElement
from mergekit_symalign.symmetry.groups import AxisAction, HeadRotation, PlaneRotation, Scaling
from mergekit_symalign.symmetry.procrustes import (
    Moments,
    align_gains,
    align_heads,
    align_heads_in_turn,
    align_planes,
    align_signs,
    moments,
)

Pair = tuple[Tensor, Tensor]
Sides = Mapping[str, Sequence[Pair]]  # axis -> (anchor, model) rows [axis, columns] of each tensor that has it


class Rotation(str, Enum):
    """Which rotations of the heads are admitted."""

    exact = "exact"  # the largest group that keeps the function
    full = "full"  # the papers' orthogonal matrix for query and key, also under RoPE: the function changes
    none = "none"


@dataclass(frozen=True)
class Symmetries:
    """Which symmetries to use (the parameters of the aligned methods)."""

    permutation: bool = True
    rotation: Rotation = Rotation.exact
    scaling: bool = True
    neuron_scaling: bool = False


@dataclass(frozen=True)
class Heads:
    """The shape of an attention block: heads, and whether queries and keys are normalised."""

    query_heads: int
    kv_heads: int
    qk_norm: bool


def align_attention(sides: Sides, heads: Heads, use: Symmetries) -> BlockElement:
    """Match value/output, and query/key, by the symmetries that ``use`` admits.

    Args:
        sides: axes query, key, value, attended; with QK-norm query_gain and key_gain too.
        heads: shape of the block.
        use: what is admitted.
    """
    group = heads.query_heads // heads.kv_heads
    rotate = use.rotation is not Rotation.none
    actions: dict[str, AxisAction] = {}
    if rotate or use.scaling:
        value, attended = _moments(sides["value"], heads, False), _moments(sides["attended"], heads, True)
        g = align_heads(value, attended, rotate=rotate, scale=use.scaling)
        actions |= {"value": g, "attended": g.dual().per_query_head(group)}
        actions |= _align_query_key(sides, heads, use)
    tolerance = _tolerance(sides["query"])
    return BlockElement({axis: action.snapped(tolerance) for axis, action in actions.items()})


def align_mlp(sides: Sides, use: Symmetries) -> BlockElement:
    """Match the neurons of a gated MLP (axes gate, up, down)."""
    if not (use.permutation or use.neuron_scaling):
        return BlockElement({})
    pairs = NeuronPairs(sides["gate"], sides["up"], sides["down"])
    gate, up = align_neurons(pairs, permute=use.permutation, scale=use.neuron_scaling)
    up = up.snapped(_tolerance(sides["up"]))
    return BlockElement({"gate": gate, "up": up, "down": up.dual()})


def _align_query_key(sides: Sides, heads: Heads, use: Symmetries) -> dict[str, AxisAction]:
    group = heads.query_heads // heads.kv_heads
    rotate = use.rotation is not Rotation.none
    query, key = _moments(sides["query"], heads, True), _moments(sides["key"], heads, False)
    if heads.qk_norm:
        actions: dict[str, AxisAction] = {}
        if rotate:
            sign = align_signs(query, key)
            per_head = sign.factor.unflatten(0, (heads.kv_heads, -1)).repeat_interleave(group, dim=0)
            actions |= {"query": Scaling(per_head.flatten()), "key": sign}
        if use.scaling:
            gains = [(a.squeeze(-1), b.squeeze(-1)) for ((a, b),) in (sides["query_gain"], sides["key_gain"])]
            trade = align_gains(gains[0], gains[1], signed=rotate)
            actions |= {"query_gain": trade, "key_gain": trade.dual()}
        return actions
    g: HeadRotation | PlaneRotation
    if use.rotation is Rotation.full:
        g = align_heads_in_turn(query, key, scale=use.scaling)
    else:
        g = align_planes(query, key, rotate=rotate, scale=use.scaling)
    return {"query": g.per_query_head(group), "key": g.dual()}


def _moments(side: Sequence[Pair], heads: Heads, of_queries: bool) -> Moments:
    """Moments over all tensors with an axis, one for each KV head."""
    count = heads.query_heads if of_queries else heads.kv_heads
    total = moments(*side[0], count)
    for pair in side[1:]:
        total = total + moments(*pair, count)
    return total.per_kv_head(heads.kv_heads)


def _tolerance(side: Sequence[Pair]) -> float:
    """Below this, an angle or a factor's distance from 1 is rounding of the model's weights (at least float32's)."""
    model = side[0][1]
    return max(torch.finfo(torch.promote_types(model.dtype, torch.float32)).eps, 1e-12)
