"""How near two KV heads can come at best, without solving for them: lower bounds of the costs of all pairs.

Costs and bounds are less the anchor's squared norms, which are the same for every pair (symmetry/heads/match.py).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from mergekit_symalign.symmetry import devices
from mergekit_symalign.symmetry.heads.moments import Moments, plane_correlation, plane_norm
from mergekit_symalign.symmetry.options import Pair
from mergekit_symalign.symmetry.quartic import best_scale
from mergekit_symalign.symmetry.rows import SLACK, compute_dtype
from mergekit_symalign.symmetry.threads import in_parallel

_BLOCK = 1 << 19  # numbers that are held in a wider dtype at once: small enough to stay in the cache

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
    k, at = len(first), devices.whole_numbers(turning, first.device)
    bound = -torch.stack([anchor.sum(-1) for anchor, _ in norms.values()]).sum(0).unsqueeze(1).expand(k, k)
    for axis, c in correlations.items():
        a, b = (plane_norm(x.index_select(-1, at)) for x in shown[axis])
        best = c.abs().unflatten(1, (k, -1)).unflatten(0, (k, -1)).amax(3).sum(1)  # each of the anchor's query heads
        bound = bound + (a.unsqueeze(1) - best.square() / b.clamp_min(torch.finfo(b.dtype).tiny)).sum(-1)
    return bound - SLACK * _sizes(norms)


def plane_correlations(side: Sequence[Pair], head_dim: int, turning: Sequence[int]) -> Tensor:
    """``Σ a conj(b)`` of each plane of every two heads [anchor's heads, model's heads, planes], complex.

    Args:
        side: rows [heads · head_dim, columns] of queries or of keys, anchor and model.
        head_dim: coordinates of a head.
        turning: first the first coordinates of all planes, then their partners.
    """
    total, at = None, devices.whole_numbers(turning, side[0][0].device)
    for pair in side:
        anchor, model = (x.unflatten(0, (-1, head_dim)) for x in pair)
        few = max(1, _BLOCK // (2 * anchor.shape[0] * anchor.shape[2]))
        chunks = list(zip(*(half.split(few) for half in at.chunk(2)), strict=True))

        def products(ends: Pair, anchor: Tensor = anchor, model: Tensor = model) -> Tensor:
            return _plane_products(anchor, model, *ends)

        parts = torch.cat(in_parallel(products, chunks, at.device))
        total = parts if total is None else total + parts
    assert total is not None
    return total.to(torch.complex128).permute(1, 2, 0)


def coordinate_norms(rows: Tensor, head_dim: int) -> Tensor:
    """Squared norm of each coordinate [heads, head_dim] of rows [heads · head_dim, columns]."""
    return rows.to(compute_dtype(rows.dtype)).square().sum(1).double().unflatten(0, (-1, head_dim))


def whole_bounds(
    norms: Norms,
    value: Moments | None,
    key: Moments,
    turning: Sequence[int],
    *,
    scale_values: bool,
    scale_queries: bool,
) -> Tensor:
    """From the products of all KV heads, and Cauchy–Schwarz for the query heads [KV heads, KV heads].

    Args:
        norms: of the four axes, and of what multiplies the attended values.
        value, key: moments of every pair, cross [KV heads, KV heads, d, d]; no value where values carry a factor for
            each coordinate, so that they could come as near as nothing.
        turning: the coordinates of queries and keys that only turn with their plane.
        scale_values, scale_queries: what is admitted beside rotations.
    """
    q_a, q_b = norms["query"]
    if value is None:
        bound = -torch.stack([a.sum(-1) for axis, (a, _) in norms.items() if axis not in ("query", "key")]).sum(0)
        bound = bound.unsqueeze(1).expand(len(bound), -1)
    else:
        o_a, o_b = norms["attended"]
        outputs = (o_a.sum(-1).unsqueeze(1) * o_b.sum(-1)).sqrt()
        values = (value.model.sum(-1), o_b.sum(-1).expand_as(outputs), _nuclear_bound(value.cross), outputs)
        bound = _least(*values, scale=scale_values)
    rest = [i for i in range(q_a.shape[-1]) if i not in set(turning)]
    if turning:
        at = devices.whole_numbers(turning, q_a.device)
        a, b = (plane_norm(x.index_select(-1, at)) for x in (q_a, q_b))
        queries, keys = (a.unsqueeze(1) * b).sqrt(), key.at(turning)
        correlation = plane_correlation(keys.cross).abs()
        planes = _least(b.expand_as(queries), plane_norm(keys.model), queries, correlation, scale=scale_queries)
        bound = bound + planes.sum(-1)
    if rest:
        at = devices.whole_numbers(rest, q_a.device)
        a, b = (x.index_select(-1, at).sum(-1) for x in (q_a, q_b))
        queries, keys = (a.unsqueeze(1) * b).sqrt(), key.at(rest)
        of_keys = (keys.model.sum(-1), queries, _nuclear_bound(keys.cross))
        bound = bound + _least(b.expand_as(queries), *of_keys, scale=scale_queries)
    return bound - SLACK * _sizes(norms)


def _plane_products(anchor: Tensor, model: Tensor, first: Tensor, partner: Tensor) -> Tensor:
    """``Σ a conj(b)`` [planes, anchor's heads, model's heads], complex.

    Args:
        anchor, model: [heads, d, columns].
        first, partner: coordinates of some planes.
    """
    dtype, at = compute_dtype(anchor.dtype), torch.stack((first, partner), dim=1).flatten()
    a, b = (
        x.transpose(0, 1).index_select(0, at).to(dtype).unflatten(0, (-1, 2)).flatten(1, 2) for x in (anchor, model)
    )
    products = (a @ b.mT).unflatten(2, (2, -1)).unflatten(1, (2, -1))
    (ii, ij), (ji, jj) = (x.unbind(2) for x in products.unbind(1))
    return torch.complex(ii + jj, ji - ij)


def _sizes(norms: Norms) -> Tensor:
    """Squared norms of both heads of each pair [KV heads, KV heads]."""
    anchor, model = (torch.stack([x.sum(-1) for x in side]).sum(0) for side in zip(*norms.values(), strict=True))
    return anchor.unsqueeze(1) + model


def _nuclear_bound(m: Tensor) -> Tensor:
    """An upper bound of the nuclear norm of each matrix [*, d, d]."""
    return m.shape[-1] ** 0.5 * torch.linalg.matrix_norm(m)


def _least(b: Tensor, o: Tensor, p: Tensor, q: Tensor, *, scale: bool) -> Tensor:
    """``min_s s²b + o/s² − 2(s p + q/s)``, or its value at ``s = 1`` where scales are not admitted."""
    s = best_scale(b, o, p, q) if scale else torch.ones_like(b)
    return s**2 * b + o / s**2 - 2 * (s * p + q / s)
