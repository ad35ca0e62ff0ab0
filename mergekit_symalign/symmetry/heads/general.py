"""Value and output beyond rotations: one invertible matrix for each KV head (``value_output: general``).

Minimises ``f(G) = ‖G V_B − V_A‖² + ‖G⁻ᵀ X_B − X_A‖²`` over invertible ``G``, downhill from the optimum over rotations
and scales. ``X`` are the rows that read the head, the columns of the output projection. Not convex: no proof, but never
farther than where it starts (docs/symmetries.md).

Each step is Levenberg and Marquardt's. With ``K = G⁻ᵀ``, a step ``D`` of ``G`` changes ``K`` by ``−K Dᵀ K``. With ``S``
and ``T`` the model's Gram matrices, the normal equations are ``D S + (K T Kᵀ) D (KᵀK) + μ D KᵀK = −∇f / 2``. Multiplied
by ``(KᵀK)^{-1/2}`` from the right they are a Sylvester equation with symmetric coefficients, which two
eigendecompositions solve exactly.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import reduce
from operator import add

import torch
from torch import Tensor

from mergekit_symalign.symmetry import devices
from mergekit_symalign.symmetry.fitting import require_shape
from mergekit_symalign.symmetry.groups import HeadMatrix
from mergekit_symalign.symmetry.options import GREATEST_CONDITION, HeadShape, Pair, Sides

_STEPS = 200  # at most
_STILL = 1e-4  # relative fall of the objective after which a head rests
_NOTHING = 1e-14  # of the squared norms: a distance that is rounding
_FAINT, _STRONG = 1e-12, 1e4  # of the damping


@dataclass(frozen=True)
class SideGrams:
    """What is to be known of one side (value, or attended) of anchor A and model B, for each KV head.

    Attributes:
        cross: ``A Bᵀ`` [heads, d, d], summed over the query heads of a group.
        model: ``B Bᵀ`` [heads, d, d].
        anchor: ``‖A‖²`` [heads].

    Raises:
        ShapeError: if one does not fit the other.
    """

    cross: Tensor
    model: Tensor
    anchor: Tensor

    def __post_init__(self) -> None:
        require_shape("model's Gram matrices", self.model, self.cross.shape)
        require_shape("anchor's squared norms", self.anchor, self.cross.shape[:1])

    def __add__(self, other: SideGrams) -> SideGrams:
        return SideGrams(self.cross + other.cross, self.model + other.model, self.anchor + other.anchor)

    def distance(self, matrix: Tensor) -> Tensor:
        """``‖G B − A‖²`` of each head [heads]."""
        return self.anchor + ((matrix @ self.model - 2 * self.cross) * matrix).sum((-2, -1))


@dataclass(frozen=True)
class GeneralOptimum:
    """Where the descent ended.

    Attributes:
        action: what value rows carry; attended rows carry its dual.
        distance: squared, of each head [heads].
        condition: number of each matrix [heads].
    """

    action: HeadMatrix
    distance: Tensor
    condition: Tensor

    @property
    def whole_distance(self) -> float:
        """Over all heads; nothing below zero, where rounding may lead."""
        return float(self.distance.clamp_min(0).sum())


def value_grams(
    sides: Sides, shape: HeadShape, order: Mapping[str, Tensor] | None = None
) -> tuple[SideGrams, SideGrams]:
    """Of the values and of what reads them.

    Args:
        sides: rows of the axes ``value`` and ``attended``.
        shape: heads of the block.
        order: for each axis the model's heads that stand beside the anchor's, if not those of the same number.
    """

    def of_axis(axis: str) -> SideGrams:
        n = shape.heads(axis)
        beside = None if order is None else order[axis]
        return reduce(add, (_grams(pair, n, beside, shape.kv_heads) for pair in sides[axis]))

    return of_axis("value"), of_axis("attended")


def _grams(pair: Pair, heads: int, beside: Tensor | None, kv_heads: int) -> SideGrams:
    """Of two matrices [heads · d, columns]."""
    a, b = (x.double().unflatten(0, (heads, -1)) for x in pair)
    b = b if beside is None else b.index_select(0, beside)
    found = (a @ b.mT, b @ b.mT, a.square().sum((-2, -1)))
    return SideGrams(*(x.unflatten(0, (kv_heads, -1)).sum(1) for x in found))


def align_general(
    value: SideGrams, attended: SideGrams, start: Tensor, *, condition: float = GREATEST_CONDITION
) -> GeneralOptimum:
    """One invertible matrix for each KV head, from a start downhill.

    Args:
        value: of the rows that write the head.
        attended: of the rows that read it.
        start: [heads, d, d], invertible, its condition within the bound.
        condition: bound of the condition number of the matrix.

    Returns:
        The matrices; no head is farther than at its start.

    Raises:
        ShapeError: if the sides or the start do not fit together.
    """
    require_shape("the attended side", attended.cross, value.cross.shape)
    require_shape("start", start, value.cross.shape)
    g, damping = start.double(), torch.full_like(value.anchor, 1e-3)
    standing = best = _objective(value, attended, g)
    whole = value.anchor + attended.anchor
    for _ in range(_STEPS):
        trial = conditioned(g + _step(value, attended, g, damping), condition)
        reached = _objective(value, attended, trial)
        better = reached < best
        fall = torch.where(better, best - reached, 0.0)
        g = torch.where(better.reshape(-1, 1, 1), trial, g)
        best = torch.where(better, reached, best)
        still = (fall <= _STILL * best) & (better | (damping >= _STRONG))
        resting = still | (best <= _NOTHING * whole)
        damping = torch.where(better, damping / 10, damping * 10).clamp(_FAINT, _STRONG)
        if devices.are_all(resting):
            break
    nothing = standing - best <= torch.finfo(torch.float32).eps ** 2 * whole
    g = torch.where(nothing.reshape(-1, 1, 1), start.double(), g)
    return GeneralOptimum(HeadMatrix(g), torch.where(nothing, standing, best), torch.linalg.cond(g))


def conditioned(g: Tensor, condition: float) -> Tensor:
    """The same matrices [heads, d, d] with their singular values within a factor of ``condition`` of each other."""
    u, s, vh = torch.linalg.svd(g)
    middle = torch.sqrt(s[:, :1] * s[:, -1:].clamp_min(torch.finfo(s.dtype).tiny))
    reach = condition**0.5 * (1 - 1e-12)
    inside = s.clamp(middle / reach, middle * reach)
    return torch.where((s[:, 0] <= condition * s[:, -1]).reshape(-1, 1, 1), g, (u * inside.unsqueeze(1)) @ vh)


def _objective(value: SideGrams, attended: SideGrams, g: Tensor) -> Tensor:
    found = value.distance(g) + attended.distance(torch.linalg.inv_ex(g).inverse.mT)
    return torch.where(found.isfinite(), found, torch.inf)


def _step(value: SideGrams, attended: SideGrams, g: Tensor, damping: Tensor) -> Tensor:
    """The damped Gauss-Newton step of each head."""
    k = torch.linalg.inv(g).mT
    slope = g @ value.model - value.cross - k @ (k @ attended.model - attended.cross).mT @ k
    r, w = torch.linalg.eigh(k.mT @ k)
    root = (w * r.clamp_min(torch.finfo(r.dtype).tiny).rsqrt().unsqueeze(1)) @ w.mT  # (KᵀK)^{-1/2}
    p, u = torch.linalg.eigh(k @ attended.model @ k.mT)
    q, v = torch.linalg.eigh(root @ value.model @ root)
    scale = (p.abs().amax(-1) + q.abs().amax(-1)).clamp_min(torch.finfo(p.dtype).tiny)
    sums = p.clamp_min(0).unsqueeze(-1) + q.clamp_min(0).unsqueeze(-2) + (damping * scale).reshape(-1, 1, 1)
    return -u @ ((u.mT @ slope @ root @ v) / sums) @ v.mT @ root
