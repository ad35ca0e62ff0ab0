"""An alignment in numbers that a person can read: what moved, how far it turned, and what is left of the distance."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from mergekit_symalign.symmetry.distance import total_distance
from mergekit_symalign.symmetry.element import BlockElement
from mergekit_symalign.symmetry.groups import (
    AxisAction,
    Chain,
    HeadMatrix,
    HeadRotation,
    PartialRotation,
    Permutation,
    PlaneRotation,
    Scaling,
)
from mergekit_symalign.symmetry.options import (
    AttentionShape,
    BlockShape,
    Facts,
    HeadShape,
    LatentShape,
    MlpShape,
    Sides,
)


def describe_distances(element: BlockElement, sides: Sides) -> Facts:
    """Squared distances of one block to the anchor, before and after.

    Returns:
        ``distance_before`` and ``distance_after``, squared, over all tensors of the block.
    """
    before = {axis: sum(map(total_distance, pairs)) for axis, pairs in sides.items()}
    after = dict(before)
    for axis, g in element.actions.items():
        after[axis] = sum(total_distance(pair, g) for pair in sides.get(axis, ()))
    return {"distance_before": sum(before.values()), "distance_after": sum(after.values())}


def describe_block(element: BlockElement, shape: BlockShape) -> Facts:
    """What the element of a block does: `describe_neurons` of an MLP, `describe_heads` of an attention block."""
    return describe_neurons(element, shape) if isinstance(shape, MlpShape) else describe_heads(element, shape)


def describe_heads(element: BlockElement, shape: AttentionShape) -> Facts:
    """What the element of an attention block does to its heads.

    Returns:
        Numbers of heads and of those that moved; median and largest angle, in degrees, of the planes of query and key
        (``query_angle_…``) and of the rotations of value and output (``value_angle_…``; a matrix counts with the root
        mean square of its angles, a general one with its rotation's); smallest and largest factor, of a general matrix
        its singular values, and the largest condition number of those (``value_condition_max``); coordinates whose sign
        was flipped by a QK-norm's sign; where coordinates may change places, how many did within their head
        (``query_coordinates_moved``, ``value_coordinates_moved``). Where heads share latents, also how many of those
        there are and how many moved.
    """
    facts: Facts = {}
    for name, axis, heads, d in _counted(shape):
        order = _order(element.actions.get(axis), heads * d)
        moved = 0 if order is None else _count_moved(order.unflatten(0, (heads, -1)).select(1, 0) // d)
        facts |= {f"{name}_heads": heads, f"{name}_heads_moved": moved}
    if isinstance(shape, LatentShape):
        latents = shape.latents()
        facts |= {"latents": len(latents), "latents_moved": len(element.actions.keys() & latents)}
    factors = []
    queries = ("q_nope", "q_pe") if isinstance(shape, LatentShape) else ("query",)
    for name, axes in (("query", queries), ("value", ("value",))):
        steps = [step for axis in axes for step in _steps(element.actions.get(axis))]
        angles = [angle for step in steps for angle in _angles(step)]
        turned = torch.cat(angles) if angles else torch.zeros(1)
        facts |= {f"{name}_angle_median": float(turned.median()), f"{name}_angle_max": float(turned.max())}
        factors += [factor for step in steps for factor in _factors(step)]
    if isinstance(shape, HeadShape):
        for name, counted in (("query", shape.reorders), ("value", shape.gated)):
            if counted:
                of_axis = _order(element.actions.get(name), shape.heads(name) * shape.head_dim)
                facts[f"{name}_coordinates_moved"] = 0 if of_axis is None else _count_within(of_axis, shape.head_dim)
    return facts | _conditions(element.actions.get("value")) | _range(factors)


def describe_neurons(element: BlockElement, shape: MlpShape) -> Facts:
    """What the element of an MLP does to its neurons and experts.

    Returns:
        Numbers of neurons (and experts) and of those that moved; smallest and largest factor, signs that flipped.
    """
    neurons = shape.neurons * shape.experts
    facts: Facts = {"neurons": neurons, "neurons_moved": _count_moved(_order(element.actions.get("up"), neurons))}
    if shape.experts > 1:
        moved = _count_moved(_order(element.actions.get("expert"), shape.experts))
        facts |= {"experts": shape.experts, "experts_moved": moved}
    return facts | _range([f for step in _steps(element.actions.get("up")) for f in _factors(step)])


def _counted(shape: AttentionShape) -> tuple[tuple[str, str, int, int], ...]:
    """Name, axis, number of heads and coordinates of a head, of what is counted."""
    if isinstance(shape, LatentShape):
        return (("kv", "value", shape.heads, shape.value), ("query", "q_nope", shape.heads, shape.nope))
    d = shape.head_dim
    kv = "key" if shape.of_keys else "value"
    return (("kv", kv, shape.kv_heads, d), ("query", "query", shape.query_heads, d))


def _steps(g: AxisAction | None) -> Iterator[AxisAction]:
    if isinstance(g, Chain):
        for step in g.steps:
            yield from _steps(step)
    elif g is not None:
        yield g


def _order(g: AxisAction | None, size: int) -> Tensor | None:
    """Where each coordinate comes from, or None if none moves."""
    order: Tensor | None = None
    for step in _steps(g):
        if isinstance(step, Permutation):
            order = step.index if order is None else order.index_select(0, step.index)
    return order


def _count_moved(order: Tensor | None) -> int:
    return 0 if order is None else int((order != torch.arange(len(order), device=order.device)).sum())


def _count_within(order: Tensor, d: int) -> int:
    """How many coordinates stand elsewhere in their head of size ``d``."""
    place = torch.arange(len(order), device=order.device)
    return int((order % d != place % d).sum())


def _angles(step: AxisAction) -> list[Tensor]:
    """Absolute angles in degrees."""
    if isinstance(step, PlaneRotation):
        wrapped = torch.remainder(step.angle + math.pi, 2 * math.pi) - math.pi
        return [torch.rad2deg(wrapped.abs().flatten())]
    if isinstance(step, HeadRotation):
        d = step.matrix.shape[-1]
        eye = torch.eye(d, dtype=step.matrix.dtype, device=step.matrix.device)
        chord = torch.linalg.matrix_norm(step.matrix - eye) / (2 * d**0.5)
        return [torch.rad2deg(2 * torch.asin(chord.clamp(max=1)))]
    if isinstance(step, HeadMatrix):
        u, _, vh = torch.linalg.svd(step.matrix)
        return _angles(HeadRotation(u @ vh, torch.ones_like(step.matrix[:, 0, 0])))
    if isinstance(step, PartialRotation):
        return [*_angles(step.planes), *_angles(step.rest)]
    return []


def _factors(step: AxisAction) -> list[Tensor]:
    if isinstance(step, Scaling):
        return [step.factor.double()]
    if isinstance(step, (PlaneRotation, HeadRotation)):
        return [step.scale.double().flatten()]
    if isinstance(step, HeadMatrix):
        return [torch.linalg.svdvals(step.matrix.double()).flatten()]
    if isinstance(step, PartialRotation):
        return [*_factors(step.planes), *_factors(step.rest)]
    return []


def _conditions(g: AxisAction | None) -> Facts:
    """The largest condition number of general matrices, if there are any."""
    found = [torch.linalg.cond(step.matrix.double()).max() for step in _steps(g) if isinstance(step, HeadMatrix)]
    return {"value_condition_max": float(torch.stack(found).max())} if found else {}


def _range(factors: list[Tensor]) -> Facts:
    if not factors:
        return {"scale_min": 1.0, "scale_max": 1.0, "signs_flipped": 0}
    low, high = torch.aminmax(torch.cat([f.abs() for f in factors]))
    flipped = sum(int((f < 0).sum()) for f in factors)
    return {"scale_min": float(low), "scale_max": float(high), "signs_flipped": flipped}
