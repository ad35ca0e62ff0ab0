"""Queries and keys under a QK-norm: the order of a head's coordinates, their signs, and the factors of the gains.

The norm leaves matrices exact that keep the length of a head and go through its gains: orders and signs. Coordinates
that turn with the position stay with their plane, whose two coordinates share one sign. The others may change places,
each with a sign, and their gains move along (docs/symmetries.md).
"""

from __future__ import annotations

import torch
from torch import Tensor

from mergekit_symalign.symmetry import devices
from mergekit_symalign.symmetry.assignment.linear import best_assignments
from mergekit_symalign.symmetry.groups import AxisAction, Chain, Permutation, Scaling
from mergekit_symalign.symmetry.heads.moments import Moments, plane_correlation
from mergekit_symalign.symmetry.heads.procrustes import align_gains
from mergekit_symalign.symmetry.options import GainScope, HeadShape, Pair
from mergekit_symalign.symmetry.scale import best_saving


def align_coordinates(
    query: Moments, key: Moments, shape: HeadShape, *, reorder: bool, gains: Tensor | None = None
) -> AxisAction:
    """The order and the signs of the coordinates of each KV head: jointly optimal.

    Args:
        query, key: of n KV heads; coordinates of whole heads.
        shape: of the heads.
        reorder: whether coordinates that do not turn may change places.
        gains: what the gains of every two such coordinates contribute [n, rest, rest] (`gain_scores`).

    Returns:
        What query and key rows carry; its own dual.
    """
    cross = query.cross + key.cross
    planes, rest = (devices.whole_numbers(x, cross.device) for x in (shape.planes(), shape.rest()))
    turning = plane_correlation(_at(cross, planes)).real
    still = _at(cross, rest)
    if shape.norm is GainScope.centred:
        place, sign = _of_one_sign(turning, still, gains, reorder=reorder)
        of_planes, of_rest = (sign.unsqueeze(1).expand(-1, x.shape[1]) for x in (turning, still))
    else:
        place = _places(still.abs(), gains, reorder=reorder)
        of_planes, of_rest = _sign(turning), _sign(_taken(still, place))
    natural = torch.argsort(torch.cat((planes, rest)))
    factor = torch.cat((of_planes, of_planes, of_rest), dim=-1).index_select(-1, natural)
    moved = rest.expand(len(cross), -1).gather(1, place)
    order = torch.cat((planes.expand(len(cross), -1), moved), dim=-1).index_select(-1, natural)
    signs = Scaling(factor.flatten())
    return Chain((within_heads(order), signs)) if reorder and len(rest) > 1 else signs


def rest_scores(query: Moments, key: Moments, shape: HeadShape) -> Tensor:
    """What every two coordinates that do not turn contribute when matched, each with its best sign [n, rest, rest]."""
    cross = query.cross + key.cross
    return _at(cross, devices.whole_numbers(shape.rest(), cross.device)).abs()


def gain_scores(query: Pair, key: Pair, shape: HeadShape, *, scale: bool, signed: bool) -> Tensor:
    """What the gains of every two coordinates that do not turn contribute when matched.

    Args:
        query, key: gains of anchor and model, [n, heads that share an order, d] each.
        shape: of the heads.
        scale: whether query and key gain trade a factor.
        signed: whether it may be negative.

    Returns:
        [n, rest, rest]: anchor's coordinate, model's.
    """
    rest = devices.whole_numbers(shape.rest(), query[0].device)
    (q_a, q_b), (k_a, k_b) = ([x.index_select(-1, rest).double() for x in pair] for pair in (query, key))
    p, q = q_a.mT @ q_b, k_a.mT @ k_b
    b, o = (x.square().sum(1, keepdim=True) for x in (q_b, k_b))
    return best_saving(p, b, q, o, signed=signed) if scale else p + q


def gain_factors(query: Pair, key: Pair, shape: HeadShape, *, signed: bool) -> Tensor:
    """The factor that query gains may take over from key gains: one for each plane and for each other coordinate.

    Args:
        query, key: gains of anchor and model, [n, heads that share a factor, d] each.
        shape: of the heads.
        signed: whether factors may be negative.

    Returns:
        [n, d]; the key gain carries its inverse.
    """
    device = query[0].device
    planes, rest = (devices.whole_numbers(x, device) for x in (shape.planes(), shape.rest()))
    factors = []
    for at, alone in ((planes, False), (rest, True)):
        if len(at):
            of_axis = [tuple(_paired(x.index_select(-1, at), alone=alone) for x in pair) for pair in (query, key)]
            found = align_gains((of_axis[0][0], of_axis[0][1]), (of_axis[1][0], of_axis[1][1]), signed=signed)
            factors.append(found.narrow(-1, 0, len(at)))
    natural = torch.argsort(torch.cat((planes, rest)))
    return torch.cat(factors, dim=-1).double().index_select(-1, natural)


def within_heads(order: Tensor) -> Permutation:
    """An order of the coordinates of each head [heads, d], as one of all coordinates."""
    heads, d = order.shape
    return Permutation((order + d * torch.arange(heads, device=order.device).unsqueeze(1)).flatten())


def order_within(action: AxisAction | None, d: int) -> Tensor | None:
    """The order of coordinates in an action that moves them within their heads [heads, d]; None if it moves none."""
    first = action.steps[0] if isinstance(action, Chain) else action
    return first.index.unflatten(0, (-1, d)) % d if isinstance(first, Permutation) else None


def _of_one_sign(turning: Tensor, still: Tensor, gains: Tensor | None, *, reorder: bool) -> tuple[Tensor, Tensor]:
    """The places of the rest, and one sign for each head."""
    places, worth = [], []
    for sign in (1, -1):
        place = _places(sign * still, gains, reorder=reorder)
        more = torch.zeros(len(still), device=still.device) if gains is None else _taken(gains, place).sum(-1)
        places.append(place)
        worth.append(sign * (turning.sum(-1) + _taken(still, place).sum(-1)) + more)
    flipped = worth[1] > worth[0]
    place = torch.where(flipped.unsqueeze(1), places[1], places[0])
    return place, torch.where(flipped, -1.0, 1.0).to(still.dtype)


def _places(score: Tensor, gains: Tensor | None, *, reorder: bool) -> Tensor:
    """Which coordinate of the model each of the anchor's takes [n, rest]."""
    n, r, _ = score.shape
    if not reorder or r < 2:
        return torch.arange(r, device=score.device).expand(n, r)
    return best_assignments(score if gains is None else score + gains)


def _taken(x: Tensor, place: Tensor) -> Tensor:
    """``x[n, i, place[n, i]]``."""
    return x.gather(2, place.unsqueeze(2)).squeeze(2)


def _at(cross: Tensor, coordinates: Tensor) -> Tensor:
    return cross.index_select(-1, coordinates).index_select(-2, coordinates)


def _paired(x: Tensor, *, alone: bool) -> Tensor:
    """Planes as they are; single coordinates as planes whose second coordinate is nothing."""
    return torch.cat((x, torch.zeros_like(x)), dim=-1) if alone else x


def _sign(x: Tensor) -> Tensor:
    return torch.where(x < 0, -1.0, 1.0).to(x.dtype)
