"""One rotation and one scale for each head: by Newton's method, and proven by the decomposition of its last step.

The problem is that of symmetry/scale.py, ``f(t) = e^{2t} b + e^{-2t} o − 2 ‖X(t)‖_*`` with ``X(t) = e^t M + e^{-t} N``.
For every orthogonal ``U`` and every ``w > 0``, by Cauchy–Schwarz and ``2 x y ≤ x² + y²``,

    2 ‖X(t)‖_* ≤ Σ_i ‖u_iᵀ X(t)‖² / w_i + w_i,

with equality at ``t = c`` if ``U w Vᵀ`` is the singular value decomposition of ``X(c)``. Expanded, this reads
``f(t) ≥ e^{2t} (b − m) + e^{-2t} (o − n) − r`` for all ``t``. Where ``m < b`` and ``n < o`` the right side has one
minimum, in closed form; if ``f(c)`` is as low, nothing is lower. Heads of which some singular value is next to zero may
fail that: they are left to the sweeps.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from mergekit_symalign.symmetry.scale import PROVEN, newton_step, quartic_scale

_STEPS = 4  # at most
LAST = 1e-7  # a step after which there is nothing to gain: the distance changes by its square
FLOOR = 1e-8  # of the norms: what singular values next to zero may cost the bound


@dataclass(frozen=True)
class JointOptimum:
    """Where Newton's method ended.

    Attributes:
        matrix: [n, d, d], orthogonal.
        scale: [n], the best one for the matrix.
        proven: bool [n], whether no rotation and scale is better by more than `PROVEN` of the norms.
    """

    matrix: Tensor
    scale: Tensor
    proven: Tensor


@dataclass(frozen=True)
class _Problem:
    """Correlations ``M`` and ``N`` [n, d, d], and the model's squared norms ``b`` and ``o`` [n]."""

    m: Tensor
    n: Tensor
    b: Tensor
    o: Tensor

    def at(self, t: Tensor) -> _Point:
        up = torch.exp(t).reshape(-1, 1, 1)
        u, s, vh = torch.linalg.svd(towards_identity(up * self.m + self.n / up))
        return _Point(self, t, u, s, vh)


@dataclass(frozen=True)
class _Point:
    """The decomposition of ``X(t)``."""

    problem: _Problem
    t: Tensor
    u: Tensor
    s: Tensor
    vh: Tensor

    @cached_property
    def rotation(self) -> Tensor:
        return self.u @ self.vh

    @cached_property
    def along(self) -> tuple[Tensor, Tensor]:
        """Inner products of ``M`` and ``N`` with the rotation."""
        return (self.rotation * self.problem.m).sum((-2, -1)), (self.rotation * self.problem.n).sum((-2, -1))

    def step(self) -> Tensor:
        """Newton's, towards the minimum of ``f``."""
        b, o, (p, q) = self.problem.b, self.problem.o, self.along
        up, down = torch.exp(self.t), torch.exp(-self.t)
        y = up.reshape(-1, 1, 1) * self.problem.m - self.problem.n / up.reshape(-1, 1, 1)
        y = self.u.mT @ y @ self.vh.mT
        sums = (self.s.unsqueeze(-1) + self.s.unsqueeze(-2)).clamp_min(torch.finfo(y.dtype).tiny)
        turning = ((y - y.mT).square() / sums).sum((-2, -1)) / 2
        slope = 2 * (up**2 * b - down**2 * o) - 2 * (up * p - down * q)
        bend = 4 * (up**2 * b + down**2 * o) - 2 * (up * p + down * q + turning)
        return torch.where(bend > 0, -slope / bend, -torch.sign(slope)).clamp(-0.1, 0.1)

    def proven(self) -> Tensor:
        """Whether ``f`` is nowhere lower than here, up to `PROVEN` of the norms."""
        b, o, (p, q) = self.problem.b, self.problem.o, self.along
        up, down = torch.exp(self.t), torch.exp(-self.t)
        w = torch.maximum(self.s, (FLOOR / self.s.shape[-1] * (b + o)).unsqueeze(-1))
        m, n = self.u.mT @ self.problem.m, self.u.mT @ self.problem.n
        free_b, free_o = (x - (y.square().sum(-1) / w).sum(-1) for x, y in ((b, m), (o, n)))
        rest = (2 * (m * n).sum(-1) / w + w).sum(-1)
        lowest = 2 * (free_b.clamp_min(0) * free_o.clamp_min(0)).sqrt() - rest
        here = up**2 * b + down**2 * o - 2 * (up * p + down * q)
        return (free_b > 0) & (free_o > 0) & (here - lowest <= PROVEN * (b + o))


def joint_optimum(m: Tensor, n: Tensor, b: Tensor, o: Tensor) -> JointOptimum:
    """Minimise ``s² b + o / s² − 2 <R, s M + N / s>`` over orthogonal ``R`` and ``s > 0``.

    Args:
        m, n: correlations of what is multiplied by the scale, and of what is divided by it, [n, d, d] each.
        b, o: the model's squared norms, [n] each.
    """
    problem = _Problem(m, n, b, o)
    t = torch.log(quartic_scale(b, o, *(torch.linalg.svdvals(x).sum(-1) for x in (m, n))))
    for _ in range(_STEPS):
        point = problem.at(t)
        step = point.step()
        if bool((step.abs() <= LAST).all()):
            break
        t = t + step
    scale = torch.exp(newton_step(point.t, b, o, *point.along))
    return JointOptimum(point.rotation, scale, (step.abs() <= LAST) & point.proven())


def towards_identity(m: Tensor) -> Tensor:
    """``m`` [*, d, d] with as much of the identity as decides where ``m`` says nothing."""
    d = m.shape[-1]
    norm = torch.linalg.matrix_norm(m, keepdim=True)
    eye = torch.eye(d, dtype=m.dtype, device=m.device)
    return m + 4 * d * torch.finfo(m.dtype).eps * torch.where(norm > 0, norm, 1.0) * eye
