"""The heads of multi-head latent attention: which belongs to which, and how each is turned and scaled.

Heads have values of their own, and a part of query and key without positions: each of the two sides carries an
orthogonal matrix and a scale for every head. The part that turns with the position has one key for all heads, so each
rotary plane has one angle and one scale for all of them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import reduce
from operator import add

import torch
from torch import Tensor

from mergekit_symalign.symmetry import devices
from mergekit_symalign.symmetry.assignment.linear import identity_is_optimal, lazy_assignment
from mergekit_symalign.symmetry.groups import AxisAction, Chain, PerHead, Permutation, PlaneRotation, rotary_action
from mergekit_symalign.symmetry.heads.bounds import whole_bounds
from mergekit_symalign.symmetry.heads.general import align_general, value_grams
from mergekit_symalign.symmetry.heads.moments import Moments, moments, plane_correlation, plane_norm
from mergekit_symalign.symmetry.heads.procrustes import align_heads, align_planes
from mergekit_symalign.symmetry.heads.solve import dense, remaining
from mergekit_symalign.symmetry.options import (
    HeadShape,
    LatentShape,
    Pair,
    Rotation,
    Sides,
    Symmetries,
    ValueOutput,
)
from mergekit_symalign.symmetry.rows import compute_dtype
from mergekit_symalign.symmetry.threads import in_parallel

ORDERED = ("value", "attended", "q_nope", "k_nope", "q_pe")  # axes that an order of the heads moves
_SIDES = (("value", "attended"), ("q_nope", "k_nope"))  # what is multiplied by a scale, and what is divided by it
_PAIRS = 4  # of heads that one thread solves together


@dataclass(frozen=True)
class MatchedLatentHeads:
    """What brings the model's heads to the anchor's.

    Attributes:
        order: the model's head for each of the anchor's; None if they stay where they are.
        route: ``identity`` (no head can be cheaper elsewhere) or ``pairs`` (some pairs were solved); None if the order
            was not asked for.
        planes: of the queries' part that turns; None if nothing is admitted.
        turns: what follows the order, by axis.
    """

    order: Tensor | None
    route: str | None
    planes: PlaneRotation | None
    turns: Mapping[str, AxisAction]

    def actions(self, shape: LatentShape) -> dict[str, AxisAction]:
        """What each axis carries."""
        order = self.order
        if order is None:
            return dict(self.turns)
        first = {axis: Permutation.of_wholes(order, shape.parts()[axis][1]) for axis in ORDERED}
        both = {axis: Chain((first[axis], g)) if axis in first else g for axis, g in self.turns.items()}
        return {**first, **both}


def align_latent_heads(
    sides: Sides, shape: LatentShape, use: Symmetries, planes: PlaneRotation | None = None
) -> MatchedLatentHeads:
    """The best order of the heads, and the best turns and scales behind it (`turned_latent_heads`).

    Args:
        sides: axes q_nope, k_nope, q_pe, k_pe, value, attended; the model's latents stand as the anchor's do.
        shape: of the block.
        use: what is admitted.
        planes: a guess for the order of the heads; from the shared key alone if not given.
    """
    if not use.heads or shape.heads == 1:
        return turned_latent_heads(sides, shape, use, None, None)
    guess = planes or _by_key(sides, shape, rotate=use.rotation is not Rotation.none, scale=use.scaling)
    return turned_latent_heads(sides, shape, use, *_order(sides, shape, use, guess))


def turned_latent_heads(
    sides: Sides, shape: LatentShape, use: Symmetries, order: Tensor | None, route: str | None
) -> MatchedLatentHeads:
    """The best turns and scales behind an order of the heads, each jointly optimal.

    Args:
        sides, shape, use: as for `align_latent_heads`.
        order, route: of the heads.
    """
    rotate = use.rotation is not Rotation.none
    admitted = rotate or use.scaling
    turns: dict[str, AxisAction] = {}
    found = _planes(sides, shape, order, rotate=rotate, scale=use.scaling) if admitted else None
    if found is not None:
        turned = rotary_action(found, None, interleaved=shape.interleaved)
        turns |= {"q_pe": turned.per_query_head(shape.heads), "k_pe": turned.dual()}
    for first, second in _SIDES if admitted else ():
        one, other = (_moments(sides[axis], shape.heads, order) for axis in (first, second))
        action: AxisAction = align_heads(one, other, rotate=rotate, scale=use.scaling)
        if first == "value" and use.value_output is ValueOutput.general:
            action = _general(sides, shape, use, order, dense(action, one))
        turns |= {first: action, second: action.dual()}
    return MatchedLatentHeads(order, route, found, turns)


def _planes(
    sides: Sides, shape: LatentShape, order: Tensor | None, *, rotate: bool, scale: bool
) -> PlaneRotation | None:
    """One angle and one scale for each plane, over the queries of all heads and the shared key [1, rope/2]."""
    if not shape.rope:
        return None
    query = _moments(sides["q_pe"], shape.heads, order).per_kv_head(1).at(shape.planes())
    key = _moments(sides["k_pe"], 1, None).at(shape.planes())
    return align_planes(query, key, rotate=rotate, scale=scale)


def _by_key(sides: Sides, shape: LatentShape, *, rotate: bool, scale: bool) -> PlaneRotation:
    """The same from the shared key alone, which knows no order of heads."""
    key = _moments(sides["k_pe"], 1, None).at(shape.planes())
    c, norm = plane_correlation(key.cross), plane_norm(key.model)
    size = c.abs() if rotate else c.real.clamp_min(0)
    s = torch.where(size > 1e-6 * norm, norm / size.clamp_min(torch.finfo(norm.dtype).tiny), 1.0)
    return PlaneRotation(torch.angle(c) if rotate else torch.zeros_like(s), s if scale else torch.ones_like(s))


def _order(sides: Sides, shape: LatentShape, use: Symmetries, planes: PlaneRotation) -> tuple[Tensor | None, str]:
    """The order with the least distance that remains under the best turns of each pair; None if nothing moves."""
    turning = _turning_costs(sides, shape, planes)
    bounds = _bounds(sides, shape, use) + turning
    number = torch.arange(shape.heads, device=bounds.device)
    pairs = {axis: _moments(sides[axis], shape.heads, None) for of in _SIDES for axis in of}
    standing = sum(remaining(None, pairs[first], pairs[second]) for first, second in _SIDES) + turning.diagonal()
    if identity_is_optimal(standing, bounds):
        return None, "identity"

    def cost(i: Tensor, j: Tensor) -> Tensor:
        few = _PAIRS if devices.on_cpu(i.device) else len(i)
        some = list(zip(i.split(few), j.split(few), strict=True))
        inside = in_parallel(lambda at: _pair_costs(sides, shape, use, *at), some, i.device)
        return torch.cat(inside) + turning[i, j]

    order = lazy_assignment(bounds, cost)
    return (None if torch.equal(order, number) else order), "pairs"


def _pair_costs(sides: Sides, shape: LatentShape, use: Symmetries, i: Tensor, j: Tensor) -> Tensor:
    """What remains between anchor's heads ``i`` and model's ``j`` without positions, less the anchor's norms."""
    rotate = use.rotation is not Rotation.none
    total = torch.zeros(len(i), dtype=torch.float64, device=i.device)
    for first, second in _SIDES:
        one, other = (_of_pairs(sides[axis], shape.heads, i, j) for axis in (first, second))
        total = total + remaining(align_heads(one, other, rotate=rotate, scale=use.scaling), one, other)
    return total


def _turning_costs(sides: Sides, shape: LatentShape, planes: PlaneRotation) -> Tensor:
    """The same of the queries' part that turns, under one action for all heads [heads, heads]."""
    turned = rotary_action(planes, None, interleaved=shape.interleaved).per_query_head(shape.heads)
    total = torch.zeros(shape.heads, shape.heads, dtype=torch.float64, device=planes.angle.device)
    for anchor, model in sides["q_pe"] if shape.rope else ():
        a, b = (x.reshape(shape.heads, -1) for x in (anchor.double(), turned(model.double(), 0)))
        total = total + b.square().sum(1) - 2 * a @ b.mT
    return total


def _bounds(sides: Sides, shape: LatentShape, use: Symmetries) -> Tensor:
    """Lower bounds of what remains between any two heads without positions, a row of pairs at a time."""
    names = {"value": "value", "attended": "attended", "query": "q_nope", "key": "k_nope"}
    norms = {name: _norms(sides[axis], shape.heads) for name, axis in names.items()}

    def row(i: int) -> Tensor:
        value, key = (_with_all(sides[names[of]], shape.heads, i, norms[of][1]) for of in ("value", "key"))
        own = {name: (anchor.narrow(0, i, 1), model) for name, (anchor, model) in norms.items()}
        return whole_bounds(own, value, key, (), scale_values=use.scaling, scale_queries=use.scaling)

    return torch.cat(in_parallel(row, range(shape.heads), sides["value"][0][0].device))


def _norms(side: Sequence[Pair], heads: int) -> tuple[Tensor, Tensor]:
    """Squared norms of each coordinate, anchor and model [heads, d]."""
    anchors, models = zip(*side, strict=True)
    one, other = (
        reduce(add, (x.double().square().sum(1).unflatten(0, (heads, -1)) for x in of)) for of in (anchors, models)
    )
    return one, other


def _with_all(side: Sequence[Pair], heads: int, i: int, norms: Tensor) -> Moments:
    """Moments of one of the anchor's heads with all of the model's [1, heads, d, d]."""
    found = []
    for anchor, model in side:
        b = model.to(compute_dtype(model.dtype))
        a = anchor.unflatten(0, (heads, -1))[i].to(b.dtype)
        found.append((a @ b.mT).double().unflatten(1, (heads, -1)).transpose(0, 1))
    return Moments(reduce(add, found).unsqueeze(0), norms.unsqueeze(0))


def _of_pairs(side: Sequence[Pair], heads: int, i: Tensor, j: Tensor) -> Moments:
    """Moments of some pairs of heads."""
    found = []
    for pair in side:
        a, b = (x.unflatten(0, (heads, -1)).index_select(0, at).double() for x, at in zip(pair, (i, j), strict=True))
        found.append(Moments(a @ b.mT, b.square().sum(-1)))
    return reduce(add, found)


def _moments(side: Sequence[Pair], heads: int, order: Tensor | None) -> Moments:
    """Moments of each head of the anchor and the one that stands beside it."""
    return reduce(add, (moments(*pair, heads, order)[0] for pair in side))


def _general(sides: Sides, shape: LatentShape, use: Symmetries, order: Tensor | None, start: Tensor) -> PerHead:
    """Any invertible matrix for the values of each head."""
    heads = HeadShape(shape.heads, shape.heads, shape.value, 0)
    beside = None if order is None else {"value": order, "attended": order}
    return align_general(*value_grams(sides, heads, beside), start, condition=use.condition).action
