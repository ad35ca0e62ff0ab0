"""The one-dimensional problem behind every joint optimum of rotation and scale.

A rotation and a scale ``s = e^t`` are shared by two matrices, one multiplied by ``s``, the other divided by it. With
the best rotation for each ``t`` already inserted, what is left to minimise is

    f(t) = e^{2t} b + e^{-2t} o − 2 g(t),        g(t) = max_R <R, e^t M + e^{-t} N>,

where ``b`` and ``o`` are the squared norms of the model's two matrices and ``g`` is a nuclear norm (heads) or an
absolute value (planes). ``g`` is convex in ``t``: it is a maximum of functions ``e^t α + e^{-t} β``, each of which has
itself as second derivative and is not negative where it is the maximum. So between two points ``g`` lies below its
chord, which bounds ``f`` from below on every interval, and intervals that cannot hold the optimum are thrown away for
good. The papers take rotation first and scale second, one coordinate step of this problem (docs/symmetries.md).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from mergekit_symalign.symmetry.threads import one_thread

_DENSE = 128  # intervals of the first sweep, which needs no decomposition
_STEPS = (6e-4, 3e-3, 1.5e-2, torch.inf)  # to either side of what looks like the optimum: the second sweep
_NEAR = 1e-3  # distance of the points that tell where it is
_SECTIONS = 8  # intervals of each later sweep
_SWEEPS = 6  # at most
PROVEN = 1e-7  # of the norms: a gap with which the search is at its end


@dataclass(frozen=True)
class ScaleOptimum:
    """Where ``f`` is smallest, and how much smaller it could still be elsewhere.

    Attributes:
        log_scale: [*batch], ``t``.
        gap: [*batch], ``f(t)`` minus a proven lower bound of ``f`` everywhere; not negative.
    """

    log_scale: Tensor
    gap: Tensor


@dataclass(frozen=True)
class _Sweep:
    """Grid ``t`` [*batch, k + 1] over the bracket; ``g`` at its points (or an upper bound of it)."""

    t: Tensor
    g: Tensor
    b: Tensor
    o: Tensor

    def objective(self) -> Tensor:
        return _convex(self.t, self.b, self.o) - 2 * self.g

    def lower_bounds(self) -> Tensor:
        """A lower bound of ``f`` on each interval [*batch, k]: the least of its convex part less the chord of ``g``."""
        left, right = _ends(self.t)
        start, _ = _ends(self.g)
        width = self.t.diff(dim=-1).clamp_min(torch.finfo(self.t.dtype).tiny)
        chord = self.g.diff(dim=-1) / width
        # the convex part rises as fast as the chord where b y − o / y = chord, with y = e^{2t}
        root = torch.sqrt(chord.square() + 4 * self.b * self.o)
        y = torch.where(chord > 0, (chord + root) / (2 * self.b), 2 * self.o / (root - chord))
        lowest = torch.minimum(torch.maximum(torch.log(y) / 2, left), right)
        return _convex(lowest, self.b, self.o) - 2 * (start + chord * (lowest - left))

    def bracket(self, best: Tensor) -> tuple[Tensor, Tensor]:
        """Hull of the intervals whose lower bound does not exceed ``best`` [*batch, 1]."""
        slack = 1e-15 * (self.b + self.o)
        alive = self.lower_bounds() <= best + slack
        left, right = _ends(self.t)
        low = torch.where(alive, left, torch.inf).amin(-1, keepdim=True)
        high = torch.where(alive, right, -torch.inf).amax(-1, keepdim=True)
        return low, high


def joint_log_scale(
    b: Tensor, o: Tensor, peaks: tuple[Tensor, Tensor], correlation: Callable[[Tensor], Tensor]
) -> ScaleOptimum:
    """Minimise ``f`` over ``t`` globally, for a batch of problems at once.

    A first sweep needs only ``g(t) ≤ e^t α + e^{-t} β`` and leaves a small bracket. Where a Newton step from its best
    point leads, a few points with ``g`` itself mostly close it: the chord bound loses no more than the square of an
    interval, and farther from the optimum ``f`` has more to spare. Otherwise evenly spaced sweeps follow.

    Args:
        b: [*batch] squared norms of what is multiplied by ``e^t``.
        o: [*batch] squared norms of what is divided by it. Where either is 0, the scale stays 1.
        peaks: ``α`` and ``β``, [*batch] each.
        correlation: ``g``, from ``t`` [*batch, k] to [*batch, k].
    """
    usable = ((b > 0) & (o > 0)).unsqueeze(-1)
    b, o = (torch.where(usable, x.unsqueeze(-1), 1.0) for x in (b, o))
    alpha, beta = (torch.where(usable, x.unsqueeze(-1), 0.0) for x in peaks)

    def masked(t: Tensor) -> Tensor:
        return torch.where(usable, correlation(t), 0.0)

    low, high = _first_bracket(b, o, alpha, beta)
    t = _grid(low, high, _DENSE)
    sweep = _Sweep(t, torch.exp(t) * alpha + torch.exp(-t) * beta, b, o)
    promising = t.gather(-1, sweep.objective().argmin(-1, keepdim=True))
    candidates = torch.cat((promising - _NEAR, promising, promising + _NEAR, torch.zeros_like(promising)), dim=-1)
    g = masked(candidates)
    best, where = (_convex(candidates, b, o) - 2 * g).min(-1, keepdim=True)
    at = candidates.gather(-1, where)
    for number in range(_SWEEPS):
        low, high = sweep.bracket(best)
        t = _grid(low, high, _SECTIONS) if number else _graded(low, high, _refined(promising, g, b, o))
        sweep = _Sweep(t, masked(t), b, o)
        value, where = sweep.objective().min(-1, keepdim=True)
        at = torch.where(value < best, t.gather(-1, where), at)
        best = torch.minimum(value, best)
        gap = (best - sweep.lower_bounds().amin(-1, keepdim=True)).clamp_min(0)
        if gap.device.type == "cpu" and bool((gap <= PROVEN * (b + o)).all()):
            break  # elsewhere the remaining sweeps cost less than asking the device
    return ScaleOptimum(at.squeeze(-1), gap.squeeze(-1))


def quartic_scale(b: Tensor, o: Tensor, p: Tensor, q: Tensor) -> Tensor:
    """The best scale for a rotation that is already chosen: ``s > 0`` minimising ``s²b + o/s² − 2(s p + q/s)``.

    Its stationary points are the positive real roots of ``b s⁴ − p s³ + q s − o`` (Horoi et al., appendix; the
    objective is compared at the roots).

    Args:
        b, o: [*batch] squared norms; where either is 0, the scale stays 1.
        p, q: [*batch] inner products of anchor and rotated model.

    Returns:
        ``s`` [*batch].
    """
    usable = (b > 0) & (o > 0)
    b, o = (torch.where(usable, x, 1.0) for x in (b, o))
    p, q = (torch.where(usable, x, 0.0) for x in (p, q))
    # In the unit (o/b)^¼ of s the quartic is monic with constant term −1: no overflow, well conditioned.
    unit = (o / b) ** 0.25
    cubic, linear = p / (b * unit), q / (b * unit**3)
    zero, one = torch.zeros_like(b), torch.ones_like(b)
    companion = torch.stack(
        (
            torch.stack((cubic, zero, -linear, one), -1),
            torch.stack((one, zero, zero, zero), -1),
            torch.stack((zero, one, zero, zero), -1),
            torch.stack((zero, zero, one, zero), -1),
        ),
        -2,
    )
    with one_thread():
        roots = torch.linalg.eigvals(companion).real
    t = torch.cat((torch.where(roots > 0, roots, 1.0).log(), zero.unsqueeze(-1)), -1) + unit.log().unsqueeze(-1)
    t = torch.cat((t, zero.unsqueeze(-1)), -1)
    b, o, p, q = (x.unsqueeze(-1) for x in (b, o, p, q))
    for _ in range(3):
        t = newton_step(t, b, o, p, q)
    objective = _convex(t, b, o) - 2 * (torch.exp(t) * p + torch.exp(-t) * q)
    best = t.gather(-1, objective.argmin(-1, keepdim=True)).squeeze(-1)
    return torch.where(usable, torch.exp(best), 1.0)


def best_saving(p: Tensor, b: Tensor, q: Tensor, o: Tensor, *, signed: bool) -> Tensor:
    """``max_c c p + q/c − (c² b + o/c²) / 2`` for every pair, plus ``(b + o) / 2``, which no permutation changes.

    Every stationary point lies between ``c = p/b`` and ``c = o/q``: Newton from both ends, from the point where the
    norms balance and from 1, with the sign that the mixture has there; the best of the four.

    Args:
        p, q: [*, rows, columns] inner products of the anchor's rows and the model's.
        b, o: squared norms of the model's rows, broadcast with them.
        signed: whether ``c`` may be negative.
    """
    b, o = (x.to(p.dtype).clamp_min(torch.finfo(p.dtype).tiny) for x in (b, o))
    balance = (torch.log(o / b) / 4).expand_as(p)
    starts = (
        torch.log((p.abs() / b).clamp(1e-4, 1e4)),
        -torch.log((q.abs() / o).clamp(1e-4, 1e4)),
        balance,
        torch.zeros_like(p),
    )
    best = torch.full_like(p, -torch.inf)
    for t in starts:
        sign = torch.where(torch.exp(t) * p + torch.exp(-t) * q < 0, -1.0 if signed else 1.0, 1.0)
        for _ in range(5):
            t = newton_step(t, b, o, sign * p, sign * q, longest=0.5)
        c = torch.exp(t)
        gain = (c * p + q / c).abs() if signed else c * p + q / c
        best = torch.maximum(best, gain - (c.square() * b + o / c.square()) / 2)
    return best + (b + o) / 2


def newton_step(t: Tensor, b: Tensor, o: Tensor, p: Tensor, q: Tensor, *, longest: float = 0.1) -> Tensor:
    """One step towards a minimum of ``e^{2t}b + e^{-2t}o − 2(e^t p + e^{-t} q)``, no longer than ``longest``."""
    up, down = torch.exp(t), torch.exp(-t)
    slope = 2 * (up**2 * b - down**2 * o) - 2 * (up * p - down * q)
    bend = 4 * (up**2 * b + down**2 * o) - 2 * (up * p + down * q)
    step = torch.where(bend > 0, -slope / bend, -longest * torch.sign(slope))
    return t + step.clamp(-longest, longest)


def _ends(x: Tensor) -> tuple[Tensor, Tensor]:
    """Values at the left and right end of each interval, from those at the grid points."""
    k = x.shape[-1] - 1
    return x.narrow(-1, 0, k), x.narrow(-1, 1, k)


def _convex(t: Tensor, b: Tensor, o: Tensor) -> Tensor:
    return torch.exp(2 * t) * b + torch.exp(-2 * t) * o


def _grid(low: Tensor, high: Tensor, intervals: int) -> Tensor:
    """``intervals + 1`` equally spaced points from ``low`` to ``high`` [*batch, 1]."""
    return low + (high - low) * torch.linspace(0, 1, intervals + 1, dtype=low.dtype, device=low.device)


def _graded(low: Tensor, high: Tensor, centre: Tensor) -> Tensor:
    """Points ever farther apart to either side of ``centre``, up to ``low`` and ``high`` [*batch, 1]."""
    steps = torch.tensor(_STEPS, dtype=low.dtype, device=low.device)
    centre = torch.maximum(torch.minimum(centre, high), low)
    left = centre - torch.minimum(steps.flip(0), centre - low)
    return torch.cat((left, centre, centre + torch.minimum(steps, high - centre)), dim=-1)


def _refined(t: Tensor, g: Tensor, b: Tensor, o: Tensor) -> Tensor:
    """A Newton step from ``t`` [*batch, 1] to the minimum of ``f``, with ``g`` at t − h, t, t + h, and at 0."""
    below, here, above, _ = g.split(1, dim=-1)
    up, down = torch.exp(2 * t) * b, torch.exp(-2 * t) * o
    slope = 2 * (up - down) - (above - below) / _NEAR
    bend = 4 * (up + down) - 2 * (above - 2 * here + below) / _NEAR**2
    return t - torch.where(bend > 0, slope / bend, 0.0).clamp(-0.1, 0.1)


def _first_bracket(b: Tensor, o: Tensor, alpha: Tensor, beta: Tensor) -> tuple[Tensor, Tensor]:
    """Every stationary point lies inside: there ``s² b − o/s²`` is at most ``s α + β/s`` in absolute value."""
    high = torch.log(((alpha + torch.sqrt(alpha**2 + 4 * b * (o + beta))) / (2 * b)).clamp_min(1))
    low = -torch.log(((beta + torch.sqrt(beta**2 + 4 * o * (b + alpha))) / (2 * o)).clamp_min(1))
    return low, high
