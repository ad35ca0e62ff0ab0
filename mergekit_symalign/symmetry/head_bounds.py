"""How near two KV heads can come at best, without solving for them: lower bounds of the costs of all pairs.

Costs and bounds are less the anchor's squared norms, which are the same for every pair (symmetry/heads.py).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from mergekit_symalign.symmetry.groups import SLACK
from mergekit_symalign.symmetry.moments import Moments, plane_correlation, plane_norm
from mergekit_symalign.symmetry.scale import quartic_scale

Norms = Mapping[str, tuple[Tensor, Tensor]]
"""Axis -> squared norm of each coordinate of anchor and model [KV heads, d], over the query heads of each group."""


def plane_bounds(norms: Norms, shown: Norms, correlations: Mapping[str, Tensor], turning: Sequence[int]) -> Tensor:
    """From the planes of query and key alone [KV heads, KV heads].

    Whatever the scale, ``s² b + o/s² − 2 (s p + q/s) ≥ −p²/b − q²/o``. The correlations of planes take ``d`` times
    fewer products than those of whole heads, and tell them apart as well.

    Args:
        norms: of the four axes.
        shown: the same over the columns that the correlations are of.
        correlations: of query and key, ``Σ a conj(b)`` of each plane of every two heads [heads, heads, planes].
        turning: the coordinates that only turn with their plane.
    """
    first, _ = norms["key"]
    k, at = len(first), torch.tensor(turning, device=first.device)
    bound = -torch.stack([anchor.sum(-1) for anchor, _ in norms.values()]).sum(0).unsqueeze(1).expand(k, k)
    for axis, c in correlations.items():
        a, b = (plane_norm(x.index_select(-1, at)) for x in shown[axis])
        best = c.abs().unflatten(1, (k, -1)).unflatten(0, (k, -1)).amax(3).sum(1)  # each of the anchor's query heads
        bound = bound + (a.unsqueeze(1) - best.square() / b.clamp_min(torch.finfo(b.dtype).tiny)).sum(-1)
    return bound - SLACK * _sizes(norms)


def whole_bounds(
    norms: Norms, value: Moments, key: Moments, turning: Sequence[int], *, scale_values: bool, scale_queries: bool
) -> Tensor:
    """From the products of all KV heads, and Cauchy–Schwarz for the query heads [KV heads, KV heads].

    Args:
        norms: of the four axes.
        value, key: moments of every pair, cross [KV heads, KV heads, d, d].
        turning: the coordinates of queries and keys that only turn with their plane.
        scale_values, scale_queries: what is admitted beside rotations.
    """
    (o_a, o_b), (q_a, q_b) = norms["attended"], norms["query"]
    outputs = (o_a.sum(-1).unsqueeze(1) * o_b.sum(-1)).sqrt()
    values = (value.model.sum(-1), o_b.sum(-1).expand_as(outputs), _nuclear_bound(value.cross), outputs)
    bound = _least(*values, scale=scale_values)
    rest = [i for i in range(q_a.shape[-1]) if i not in set(turning)]
    if turning:
        at = torch.tensor(turning, device=q_a.device)
        a, b = (plane_norm(x.index_select(-1, at)) for x in (q_a, q_b))
        queries, keys = (a.unsqueeze(1) * b).sqrt(), key.at(turning)
        correlation = plane_correlation(keys.cross).abs()
        planes = _least(b.expand_as(queries), plane_norm(keys.model), queries, correlation, scale=scale_queries)
        bound = bound + planes.sum(-1)
    if rest:
        at = torch.tensor(rest, device=q_a.device)
        a, b = (x.index_select(-1, at).sum(-1) for x in (q_a, q_b))
        queries, keys = (a.unsqueeze(1) * b).sqrt(), key.at(rest)
        of_keys = (keys.model.sum(-1), queries, _nuclear_bound(keys.cross))
        bound = bound + _least(b.expand_as(queries), *of_keys, scale=scale_queries)
    return bound - SLACK * _sizes(norms)


def _sizes(norms: Norms) -> Tensor:
    """Squared norms of both heads of each pair [KV heads, KV heads]."""
    anchor, model = (torch.stack([x.sum(-1) for x in side]).sum(0) for side in zip(*norms.values(), strict=True))
    return anchor.unsqueeze(1) + model


def _nuclear_bound(m: Tensor) -> Tensor:
    """An upper bound of the nuclear norm of each matrix [*, d, d]."""
    return m.shape[-1] ** 0.5 * torch.linalg.matrix_norm(m)


def _least(b: Tensor, o: Tensor, p: Tensor, q: Tensor, *, scale: bool) -> Tensor:
    """``min_s s²b + o/s² − 2(s p + q/s)``, or its value at ``s = 1`` where scales are not admitted."""
    s = quartic_scale(b, o, p, q) if scale else torch.ones_like(b)
    return s**2 * b + o / s**2 - 2 * (s * p + q / s)
