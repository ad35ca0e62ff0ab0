"""Averages weighted by Kronecker factors of the Fisher information (Tam et al. 2023, arXiv 2312.04339).

A linear layer's Fisher matrix is taken for A ⊗ B: A is the Gram matrix of its inputs, B the one of the gradients at its
outputs. The merged layer solves ``Σ w_i B_i W A_i = Σ w_i B_i W_i A_i``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mergekit_symalign.fusion.outcome import Merged, Route, average

_TINY = 1e-12  # what a sum of squares in float64 cannot tell from zero, beside 1
_ITERATIONS = 500


@dataclass(frozen=True)
class Factors:
    """The Fisher information of one model's layer.

    Attributes:
        inputs: A [in, in], symmetric and not negative.
        gradients: B [out, out], symmetric and not negative.
    """

    inputs: Tensor
    gradients: Tensor


def kronecker_mean(
    weights: Sequence[Tensor],
    shares: Sequence[float],
    factors: Sequence[Factors],
    *,
    epsilon: float = 0.0,
    tolerance: float = 1e-12,
) -> Merged:
    """Merge one linear layer of several models.

    Minimises Σ w_i ‖B_i^½ (W − W_i) A_i^½‖² + ε ‖B^½ (W − M) A^½‖², where M is the weighted average, B = Σ B_i and
    A = Σ w_i A_i. Solved for W − M: of two models in closed form in the coordinates in which both A_i and both B_i are
    diagonal, of more by conjugate gradients with (B ⊗ A)⁻¹ as the preconditioner.

    Args:
        weights: W_i, each [out, in].
        shares: w_i, not negative, with a positive sum.
        factors: of each model.
        epsilon: ε.
        tolerance: of the residual's norm, relative to the right side's.

    Returns:
        W [out, in]; the average if the factors are zero. The route is `Route.ridge` if the iteration ended before the
        tolerance was reached.
    """
    centre = average(weights, shares)
    differences = [x.double() - centre for x in weights]
    a = [share * _symmetric(f.inputs) for f, share in zip(factors, shares, strict=True)]
    b = [_symmetric(f.gradients) for f in factors]
    down, up = _whitening(sum(a[1:], a[0])), _whitening(sum(b[1:], b[0]))
    if down is None or up is None:
        return Merged(centre, Route.average)
    right = sum((y @ d @ x for d, x, y in zip(differences, a, b, strict=True)), torch.zeros_like(centre))
    # Coordinates in which Σ A_i and Σ B_i are the identity.
    a, b, right = [down.mT @ x @ down for x in a], [up.mT @ x @ up for x in b], up.mT @ right @ down
    found, route = _of_two(a, b, right, epsilon) if len(a) == 2 else _iterated(a, b, right, epsilon, tolerance)
    return Merged(centre + up @ found @ down.mT, route)


def _symmetric(x: Tensor) -> Tensor:
    return (x.double() + x.double().mT) / 2


def _whitening(total: Tensor) -> Tensor | None:
    """V [n, rank] with Vᵀ S V = 1, of the directions that were seen; None if there is none."""
    size = total.diagonal()
    scale = torch.where(size > 0, size, 1.0).rsqrt()
    values, vectors = torch.linalg.eigh(total * scale * scale.unsqueeze(-1))
    seen = values > len(size) ** 0.5 * torch.finfo(torch.float32).eps  # below, rounding of what was stored
    if not bool(seen.any()) or not bool((size > 0).any()):
        return None
    return scale.unsqueeze(-1) * vectors[:, seen] * values[seen].rsqrt()


def _of_two(a: Sequence[Tensor], b: Sequence[Tensor], right: Tensor, epsilon: float) -> tuple[Tensor, Route]:
    """A_2 = 1 − A_1 and B_2 = 1 − B_1 have the eigenvectors of A_1 and B_1."""
    alpha, q = torch.linalg.eigh(a[0])
    beta, p = torch.linalg.eigh(b[0])
    alpha, beta = alpha.clamp(0, 1), beta.clamp(0, 1)
    weight = beta.unsqueeze(-1) * alpha + (1 - beta).unsqueeze(-1) * (1 - alpha) + epsilon
    known = weight > _TINY
    y = torch.where(known, p.mT @ right @ q / torch.where(known, weight, 1.0), 0.0)
    return p @ y @ q.mT, Route.exact


def _iterated(
    a: Sequence[Tensor], b: Sequence[Tensor], right: Tensor, epsilon: float, tolerance: float
) -> tuple[Tensor, Route]:
    """Conjugate gradients; in these coordinates the preconditioner is the identity."""

    def applied(x: Tensor) -> Tensor:
        return sum((y @ x @ z for y, z in zip(b, a, strict=True)), epsilon * x)

    x = torch.zeros_like(right)
    residual = right.clone()
    direction = residual
    square = residual.square().sum()
    enough = tolerance**2 * float(square)
    for _ in range(_ITERATIONS):
        if float(square) <= enough:
            return x, Route.exact
        turned = applied(direction)
        step = square / (direction * turned).sum()
        x, residual = x + step * direction, residual - step * turned
        previous, square = square, residual.square().sum()
        direction = residual + square / previous * direction
    return x, Route.ridge
