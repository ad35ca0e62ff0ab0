"""One rotation and one scale for each head without any singular value decomposition: for devices other than the CPU.

The problem, the bound and the proof are those of symmetry/heads/joint.py. What is taken from decompositions there comes
from polar factors here: ``R`` of ``X(t)``, and ``P = X(t) Rᵀ``, which is symmetric and not negative. The bound's
weights ``w`` may be such a matrix:

    2 ‖X(t)‖_* ≤ <X(t), P⁻¹ X(t)> + tr P        for every positive ``P``, with equality at ``t = c`` for that one.

The slope of ``f`` needs only ``R``. Its bend needs the singular values, so two slopes take its place (secants).
"""

from __future__ import annotations

import torch
from torch import Tensor

from mergekit_symalign.symmetry import devices
from mergekit_symalign.symmetry.heads.joint import FLOOR, LAST, JointOptimum, towards_identity
from mergekit_symalign.symmetry.heads.polar import are_orthogonal, newton_polar
from mergekit_symalign.symmetry.quartic import best_scale
from mergekit_symalign.symmetry.scale import PROVEN, newton_step

_STEPS = 6  # at most
_LONGEST = 0.1  # of a secant step


def joint_optimum_by_polar(m: Tensor, n: Tensor, b: Tensor, o: Tensor) -> JointOptimum:
    """Minimise ``s² b + o / s² − 2 <R, s M + N / s>`` over orthogonal ``R`` and ``s > 0``.

    Takes what `joint_optimum` does. The device is asked after each step whether it was the last.
    """
    usable = (b > 0) & (o > 0)
    t = torch.where(usable, torch.log(torch.where(usable, o / b, 1.0)) / 4, 0.0)  # both sides of one size
    before = None
    for _ in range(_STEPS):
        r = newton_polar(_mixed(t, m, n))
        p, q = (r * m).sum((-2, -1)), (r * n).sum((-2, -1))
        slope = _slope(t, b, o, p, q)
        if before is None:
            step = torch.where(usable, torch.log(best_scale(b, o, p, q)) - t, 0.0)  # the best for this rotation
        else:
            step = torch.where(usable, _secant(t, slope, *before, newton_step(t, b, o, p, q) - t), 0.0)
        if devices.are_all(step.abs() <= LAST):
            break
        before, t = (t, slope), t + step
    else:
        t = before[0] if before is not None else t
    scale = torch.exp(newton_step(t, b, o, p, q))
    proven = (step.abs() <= LAST) & are_orthogonal(r) & _is_lowest(t, r, (m, n), (b, o), (p, q))
    return JointOptimum(r, torch.where(usable, scale, 1.0), proven)


def _secant(t: Tensor, slope: Tensor, last_t: Tensor, last_slope: Tensor, still: Tensor) -> Tensor:
    """A step from two slopes; where they say nothing, Newton's, as if the rotation stayed."""
    bend = (slope - last_slope) / torch.where(t == last_t, 1.0, t - last_t)
    told = (t != last_t) & (bend > 0) & bend.isfinite()
    step = (-slope / torch.where(told, bend, 1.0)).clamp(-_LONGEST, _LONGEST)
    return torch.where(told, step, still)


def _is_lowest(
    t: Tensor, r: Tensor, cross: tuple[Tensor, Tensor], norms: tuple[Tensor, Tensor], along: tuple[Tensor, Tensor]
) -> Tensor:
    """Whether ``f`` is nowhere lower than at ``t``, up to `PROVEN` of the norms; bool [heads]."""
    (m, n), (b, o), (p, q) = cross, norms, along
    up, down = torch.exp(t), torch.exp(-t)
    size = _mixed(t, m, n) @ r.mT
    d = size.shape[-1]
    floor = (FLOOR / d * (b + o)).reshape(-1, 1, 1) * torch.eye(d, dtype=size.dtype, device=size.device)
    w = (size + size.mT) / 2 + floor
    inverse = torch.linalg.inv_ex(w).inverse
    of_m, of_n = inverse @ m, inverse @ n
    free_b, free_o = b - (m * of_m).sum((-2, -1)), o - (n * of_n).sum((-2, -1))
    rest = 2 * (m * of_n).sum((-2, -1)) + w.diagonal(dim1=-2, dim2=-1).sum(-1)
    lowest = 2 * (free_b.clamp_min(0) * free_o.clamp_min(0)).sqrt() - rest
    here = up**2 * b + down**2 * o - 2 * (up * p + down * q)
    return (free_b > 0) & (free_o > 0) & (here - lowest <= PROVEN * (b + o))


def _slope(t: Tensor, b: Tensor, o: Tensor, p: Tensor, q: Tensor) -> Tensor:
    up, down = torch.exp(t), torch.exp(-t)
    return 2 * (up**2 * b - down**2 * o) - 2 * (up * p - down * q)


def _mixed(t: Tensor, m: Tensor, n: Tensor) -> Tensor:
    """``X(t)``, regular."""
    up = torch.exp(t).reshape(-1, 1, 1)
    return towards_identity(up * m + n / up)
