"""Rotations, plane angles and signs that bring a model's attention heads onto an anchor's.

All of them minimise ``‖s R V_B − V_A‖² + ‖O_B Rᵀ / s − O_A‖²`` (value/output; query/key alike), each over its group.
They need no weights, only `Moments` of the two sides, so that the same solvers serve weights and activations.
Sources: Horoi et al., arXiv 2511.10850 (GQA); Zhang et al., arXiv 2502.00264 (rotation, then scale). Rotation and
scale are found jointly here (symmetry/scale.py).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from mergekit_symalign.symmetry import devices
from mergekit_symalign.symmetry.fitting import require_shape
from mergekit_symalign.symmetry.groups import HeadRotation, PlaneRotation, Scaling
from mergekit_symalign.symmetry.heads.joint import joint_optimum, towards_identity
from mergekit_symalign.symmetry.heads.joint_polar import joint_optimum_by_polar
from mergekit_symalign.symmetry.heads.moments import Moments, plane_correlation, plane_norm
from mergekit_symalign.symmetry.heads.polar import nuclear_norm, polar_factor
from mergekit_symalign.symmetry.quartic import best_scale, better_scale
from mergekit_symalign.symmetry.scale import joint_log_scale
from mergekit_symalign.symmetry.threads import in_parallel

_MATRICES = 4  # that are decomposed at once
_POLISH = 4  # alternating steps after the global search, at most; none of them can be worse than the one before
_STILL = 1e-9  # relative change of a scale after which steps end: the distance changes by its square


def align_heads(first: Moments, second: Moments, *, rotate: bool, scale: bool) -> HeadRotation:
    """One orthogonal matrix and one scale for each KV head: jointly optimal, to the global optimum.

    Args:
        first: the side that is multiplied by ``s`` (value; query without positions).
        second: the side that is divided by it (attended; key).
        rotate: if false, the matrix is the identity.
        scale: if false, ``s = 1``.

    Returns:
        The action on ``first``; ``second`` carries its dual.

    Raises:
        ShapeError: if the sides do not fit together.

    >>> from mergekit_symalign.symmetry.heads.moments import moments
    >>> value = torch.tensor([[1.0, 0.0], [0.0, 2.0]])  # one head of two coordinates
    >>> turn = torch.tensor([[0.0, -1.0], [1.0, 0.0]])
    >>> first, _ = moments(value, 2 * turn @ value, heads=1)
    >>> second, _ = moments(value, turn @ value / 2, heads=1)
    >>> found = align_heads(first, second, rotate=True, scale=True)
    >>> torch.allclose(found(2 * turn @ value, 0), value)
    True
    """
    _require_alike(first, second)
    both = rotate and scale
    found = _jointly(first, second) if both else _in_turn(first, second, rotate=rotate, scale=scale)
    return _unless_noise(found, first, second)


def align_heads_in_turn(first: Moments, second: Moments, *, scale: bool) -> HeadRotation:
    """The papers' two steps: orthogonal Procrustes, then the quartic for the scale (``rotation: full``).

    Under RoPE, applied to query and key, this is not a symmetry: the function changes.
    """
    return _unless_noise(_in_turn(first, second, rotate=True, scale=scale), first, second)


def align_planes(first: Moments, second: Moments, *, rotate: bool, scale: bool) -> PlaneRotation:
    """One angle and one scale for each rotary plane ``(i, i + d/2)`` of each KV head: jointly optimal.

    With the planes as complex numbers ``c = Σ q_A conj(q_B)``, minimises
    ``s²‖Q_B‖² + ‖K_B‖²/s² − 2 |s c_Q + c_K / s|`` and takes ``θ = arg(s c_Q + c_K / s)``.

    Returns:
        The action on the query side; the key side carries its dual. Commutes with RoPE at every position.

    Raises:
        ShapeError: if the sides do not fit together, or have half a plane.

    >>> from mergekit_symalign.symmetry.heads.moments import moments
    >>> rows = torch.tensor([[1.0, 0.0], [0.0, 2.0]])  # one head of one plane
    >>> both, _ = moments(rows, torch.stack((-rows[1], rows[0])), heads=1)  # turned by 90 degrees
    >>> found = align_planes(both, both, rotate=True, scale=False)
    >>> round(float(found.angle), 4), float(found.scale)
    (-1.5708, 1.0)
    """
    _require_alike(first, second)
    _require_planes(first)
    c_q, c_k = plane_correlation(first.cross), plane_correlation(second.cross)
    b, o = plane_norm(first.model), plane_norm(second.model)
    s = torch.ones_like(b)
    if scale and rotate:
        s = torch.exp(_joint_planes(b, o, c_q, c_k))
        s = _alternate(s, lambda s: better_scale(s, b, o, *_along(_mixed(c_q, c_k, s), c_q, c_k)))
    elif scale:
        s = best_scale(b, o, c_q.real, c_k.real)
    angle = torch.angle(_mixed(c_q, c_k, s)) if rotate else torch.zeros_like(b)
    return PlaneRotation(angle, s)


def align_signs(first: Moments, second: Moments, *, of_heads: bool) -> Scaling:
    """One sign for each rotary plane of each KV head: all that QK-norm leaves exact.

    Args:
        of_heads: one sign for each KV head as a whole, all that a norm leaves that also subtracts the mean.

    Returns:
        ±1 for every coordinate of every KV head, flattened; its own dual.

    Raises:
        ShapeError: if the sides do not fit together, or have half a plane.
    """
    _require_alike(first, second)
    _require_planes(first)
    cross = first.cross + second.cross
    if of_heads:
        whole = _sign(cross.diagonal(dim1=-2, dim2=-1).sum(-1))
        return Scaling(whole.repeat_interleave(cross.shape[-1]))
    sign = _sign(plane_correlation(cross).real)
    return Scaling(torch.cat((sign, sign), dim=-1).flatten())


def align_gains(query: tuple[Tensor, Tensor], key: tuple[Tensor, Tensor], *, signed: bool) -> Tensor:
    """The factor that query and key gains of a QK-norm may trade in each plane, jointly optimal.

    Args:
        query: the anchor's and the model's query gain, [n, heads that share a factor, d] each.
        key: the same for the key gain.
        signed: whether the factor may be negative.

    Returns:
        One factor per coordinate [n, d] for the query gain; the key gain carries its inverse.

    Raises:
        ShapeError: if anchor's and model's gains differ in shape.
    """
    for name, (anchor, model) in (("query gains", query), ("key gains", key)):
        require_shape(name, model, anchor.shape)
    (q_a, q_b), (k_a, k_b) = ((a.double(), b.double()) for a, b in (query, key))
    b, o = plane_norm(q_b.square().sum(1)), plane_norm(k_b.square().sum(1))
    p, q = plane_norm((q_a * q_b).sum(1)), plane_norm((k_a * k_b).sum(1))
    if not signed:
        s = best_scale(b, o, p, q)
    else:
        s = torch.exp(_joint_planes(b, o, p, q))
        s = _alternate(s, lambda s: better_scale(s, b, o, *_along(_mixed(p, q, s), p, q)))
        s = s * _sign(_mixed(p, q, s))
    return torch.cat((s, s), dim=-1)


def _require_alike(first: Moments, second: Moments) -> None:
    require_shape("the second side", second.cross, first.cross.shape)


def _require_planes(side: Moments) -> None:
    *heads, d = side.model.shape
    require_shape("coordinates of rotary planes", side.model, (*heads, d // 2 * 2))


def _in_turn(first: Moments, second: Moments, *, rotate: bool, scale: bool) -> HeadRotation:
    """The best rotation without a scale, and the best scale for it; or one of the two."""
    b, o = first.model.sum(-1), second.model.sum(-1)
    eye = torch.eye(first.cross.shape[-1], dtype=b.dtype, device=b.device).expand_as(first.cross)
    r = _polar(first.cross + second.cross) if rotate else eye
    return HeadRotation(r, best_scale(b, o, *_inner(r, first, second)) if scale else torch.ones_like(b))


def _jointly(first: Moments, second: Moments) -> HeadRotation:
    """By Newton's method; heads for which it does not prove what it finds are swept."""
    cpu = devices.on_cpu(first.cross.device)
    sides = (first.cross, second.cross, first.model.sum(-1), second.model.sum(-1))
    pieces = list(zip(*(x.split(_MATRICES if cpu else len(x)) for x in sides), strict=True))
    optimum = joint_optimum if cpu else joint_optimum_by_polar
    parts = in_parallel(lambda piece: optimum(*piece), pieces, first.cross.device)
    matrix, s, proven = (torch.cat(x) for x in zip(*((x.matrix, x.scale, x.proven) for x in parts), strict=True))
    if not devices.are_all(proven):
        left = (~proven).nonzero().flatten()
        swept = _swept(first.some(left), second.some(left))
        matrix, s = matrix.index_copy(0, left, swept.matrix), s.index_copy(0, left, swept.scale)
    return HeadRotation(matrix, s)


def _swept(first: Moments, second: Moments) -> HeadRotation:
    """By sweeps over the scale, which prove the optimum whatever the spectrum is."""
    b, o = first.model.sum(-1), second.model.sum(-1)

    def rotation(s: Tensor) -> Tensor:
        return _polar(_mixed(first.cross, second.cross, s))

    peaks = (_nuclear(first.cross), _nuclear(second.cross))
    start = joint_log_scale(b, o, peaks, _nuclear_path(first, second)).log_scale
    s = _alternate(torch.exp(start), lambda s: better_scale(s, b, o, *_inner(rotation(s), first, second)))
    return HeadRotation(rotation(s), s)


def _inner(r: Tensor, first: Moments, second: Moments) -> tuple[Tensor, Tensor]:
    return (r * first.cross).sum((-2, -1)), (r * second.cross).sum((-2, -1))


def _alternate(s: Tensor, step: Callable[[Tensor], Tensor]) -> Tensor:
    for _ in range(_POLISH):
        previous, s = s, step(s)
        if devices.are_all((s - previous).abs() <= _STILL * s):
            break
    return s


def _mixed(m: Tensor, n: Tensor, s: Tensor) -> Tensor:
    """``s M + N / s``, with ``s`` broadcast over the matrix axes if there are any."""
    s = s.reshape(s.shape + (1,) * (m.ndim - s.ndim))
    return s * m + n / s


def _polar(m: Tensor) -> Tensor:
    """The orthogonal matrix nearest to ``m`` [*, d, d]; where ``m`` says nothing, the one nearest to the identity."""
    return polar_factor(towards_identity(m))


def _unless_noise(g: HeadRotation, first: Moments, second: Moments) -> HeadRotation:
    """``g``, but the identity for each head where it saves no more than weights in float32 could tell apart.

    A turn by the angle ε saves ``ε²`` of the squared norm. Heads of low rank may turn freely in directions without any
    weight: that saves nothing, and is left alone.
    """
    b, o = first.model.sum(-1), second.model.sum(-1)
    p, q = _inner(g.matrix, first, second)
    at_identity = sum(side.cross.diagonal(dim1=-2, dim2=-1).sum(-1) for side in (first, second))
    saved = 2 * (g.scale * p + q / g.scale - at_identity) - (g.scale**2 - 1) * b - (g.scale**-2 - 1) * o
    noise = saved <= torch.finfo(torch.float32).eps ** 2 * (b + o)
    eye = torch.eye(g.matrix.shape[-1], dtype=b.dtype, device=b.device)
    return HeadRotation(
        torch.where(noise.reshape(-1, 1, 1), eye, g.matrix), torch.where(noise, torch.ones_like(b), g.scale)
    )


def _nuclear(m: Tensor) -> Tensor:
    return nuclear_norm(m if devices.on_cpu(m.device) else towards_identity(m))


def _nuclear_path(first: Moments, second: Moments) -> Callable[[Tensor], Tensor]:
    def g(t: Tensor) -> Tensor:
        return _nuclear(_mixed(first.cross.unsqueeze(1), second.cross.unsqueeze(1), torch.exp(t)))

    return g


def _joint_planes(b: Tensor, o: Tensor, c_q: Tensor, c_k: Tensor) -> Tensor:
    def g(t: Tensor) -> Tensor:
        return _mixed(c_q.unsqueeze(-1), c_k.unsqueeze(-1), torch.exp(t)).abs()

    return joint_log_scale(b, o, (c_q.abs(), c_k.abs()), g).log_scale


def _along(direction: Tensor, c_q: Tensor, c_k: Tensor) -> tuple[Tensor, Tensor]:
    """The parts of both correlations along the direction of their mixture (inner products after turning)."""
    unit = torch.where(direction.abs() > 0, direction / direction.abs(), torch.ones_like(direction))
    return (c_q * unit.conj()).real, (c_k * unit.conj()).real


def _sign(x: Tensor) -> Tensor:
    return torch.where(x < 0, -1.0, 1.0).to(x.dtype)
