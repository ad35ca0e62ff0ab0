"""The best scale for a rotation, or for a pair of neurons, that is already chosen, in a way that suits the device.

On the CPU it comes from the eigenvalues of companion matrices (`quartic_scale`). On a GPU torch moves general matrices
to the CPU for those, and takes them one after the other. So elsewhere the roots are found by bisection, all at once and
element by element.

In the unit ``(o/b)^¼`` the stationary points are the positive roots of ``φ(u) = u⁴ − c u³ + l u − 1``. It is negative
at 0 and positive far out, so it has one or three. Between three of them stand the two positive roots of ``φ'``. With
``v = 1/u`` that is the depressed cubic ``v³ − (3c/l) v + 4/l``: Viète's cosines give its roots. Minima are the first
root of ``φ`` and the last.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from mergekit_symalign.symmetry import devices
from mergekit_symalign.symmetry.scale import joint_log_scale, newton_step, quartic_scale

_HALVINGS = 16  # of a bracket of the logarithm of a root
_POLISH = 3  # of Newton's steps behind them


def best_scale(b: Tensor, o: Tensor, p: Tensor, q: Tensor) -> Tensor:
    """``s > 0`` minimising ``s²b + o/s² − 2(s p + q/s)``: takes and gives what `quartic_scale` does, float64."""
    return quartic_scale(b, o, p, q) if devices.on_cpu(b.device) else bisected_scale(b, o, p, q)


def better_scale(s: Tensor, b: Tensor, o: Tensor, p: Tensor, q: Tensor) -> Tensor:
    """The same next to a scale that is nearly the best: elsewhere than on the CPU, by Newton's steps from there."""
    if devices.on_cpu(b.device):
        return quartic_scale(b, o, p, q)
    t = torch.log(s)
    for _ in range(_POLISH):
        t = newton_step(t, b, o, p, q)
    return torch.where((b > 0) & (o > 0), torch.exp(t), 1.0)


def bisected_scale(b: Tensor, o: Tensor, p: Tensor, q: Tensor) -> Tensor:
    """The same by bisection; asks the device for nothing."""
    usable = (b > 0) & (o > 0)
    b, o = (torch.where(usable, x, 1.0).unsqueeze(-1) for x in (b, o))
    p, q = (torch.where(usable, x, 0.0).unsqueeze(-1) for x in (p, q))
    unit = (o / b) ** 0.25
    t = _log_roots(p / (b * unit), q / (b * unit**3)) + unit.log()
    t = torch.cat((t, torch.zeros_like(b)), -1)
    for _ in range(_POLISH):
        t = newton_step(t, b, o, p, q)
    up, down = torch.exp(t), torch.exp(-t)
    objective = up**2 * b + down**2 * o - 2 * (up * p + down * q)
    best = t.gather(-1, objective.argmin(-1, keepdim=True)).squeeze(-1)
    return torch.where(usable, torch.exp(best), 1.0)


def neuron_factors(scaled: tuple[Tensor, Tensor], divided: tuple[Tensor, Tensor], *, signed: bool) -> Tensor:
    """The best factor of each pair: minimises ``c² b + o / c² − 2 (c p + q / c)`` over ``c ≠ 0``, or ``c > 0``.

    Args:
        scaled: ``p`` (inner products of anchor and model) and ``b`` (squared norms of the model) of what is multiplied.
        divided: the same, ``q`` and ``o``, of what is divided.
        signed: whether ``c`` may be negative.
    """
    (p, b), (q, o) = scaled, divided
    p, b, q, o = torch.broadcast_tensors(p.double(), b.double(), q.double(), o.double())
    if not signed:
        return best_scale(b, o, p, q)

    def g(t: Tensor) -> Tensor:
        return (torch.exp(t) * p.unsqueeze(-1) + torch.exp(-t) * q.unsqueeze(-1)).abs()

    s = torch.exp(joint_log_scale(b, o, (p.abs(), q.abs()), g).log_scale)
    sign = torch.where(s * p + q / s < 0, -1.0, 1.0)
    s = best_scale(b, o, sign * p, sign * q)
    factor: Tensor = sign * s
    return factor


def _log_roots(c: Tensor, linear: Tensor) -> Tensor:
    """Logarithms of the first and the last positive root of ``φ`` [*, 2], from ``c`` and ``l`` [*, 1]."""
    far = torch.log1p(torch.cat((c.abs(), linear.abs(), torch.ones_like(c)), -1).amax(-1, keepdim=True))
    first, second = _between_roots(c, linear, far)
    low, high = torch.cat((-far, second), -1), torch.cat((first, far), -1)
    for _ in range(_HALVINGS):
        middle = torch.lerp(low, high, 0.5)
        u = torch.exp(middle)
        above = u * (u * u * (u - c) + linear) > 1
        low, high = torch.where(above, low, middle), torch.where(above, middle, high)
    return (low + high) / 2


def _between_roots(c: Tensor, linear: Tensor, far: Tensor) -> tuple[Tensor, Tensor]:
    """Logarithms of the two positive roots of ``φ'``; where there are none, the far ends of a bracket of ``φ``'s."""
    three = (c > 0) & (linear > 0) & (c**3 > 4 * linear)
    c, linear = torch.where(three, c, 2.0), torch.where(three, linear, 1.0)
    turn = torch.acos((-2 * (linear / c**3).sqrt()).clamp(-1, 1)) / 3
    size = 2 * (c / linear).sqrt()
    largest, middle = (size * torch.cos(turn - 2 * math.pi * k / 3) for k in (0, 1))
    first, second = (-x.clamp_min(torch.finfo(x.dtype).tiny).log() for x in (largest, middle))
    return torch.where(three, first, far), torch.where(three, second, -far)
