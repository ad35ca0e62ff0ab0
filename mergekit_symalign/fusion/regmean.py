"""RegMean: the linear layer that is nearest to the outputs of all models on the inputs of each (Jin et al. 2023).

arXiv 2212.09849. The same solve on task vectors adds what the models learned instead of averaging it. With the Gram
matrix of the task vector itself no data is needed; WUDI-Merging (arXiv 2503.08099) descends on a like objective.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from mergekit_symalign.errors import ShapeError
from mergekit_symalign.fusion.outcome import Merged, Route, average

FALLBACK = 1e-4  # of each input's own size: the ridge where the matrices are singular and none was asked for


def regmean(
    weights: Sequence[Tensor],
    shares: Sequence[float],
    grams: Iterable[Tensor],
    *,
    off_diagonal: float = 1.0,
    ridge: float = 0.0,
) -> Merged:
    """Merge one linear layer of several models.

    Minimises Σ w_i tr (W − W_i) G_i (W − W_i)ᵀ + λ ‖W − M‖², where M is the weighted average of the W_i. Solved for
    the difference from M: ``W = M + (Σ w_i (W_i − M) G_i)(Σ w_i G_i + λ I)⁻¹``. With λ = 0 that is the published
    formula; a ridge pulls inputs that were hardly seen to the average, and inputs that were never seen stay there.

    Args:
        weights: W_i, each [out, in].
        shares: w_i, not negative, with a positive sum.
        grams: G_i, each [in, in], or [in] where only its diagonal is known; taken one at a time.
        off_diagonal: multiplies the numbers beside the diagonals (published: 0.9).
        ridge: λ, times the mean of the diagonal of Σ w_i G_i.

    Returns:
        W [out, in]. Where Σ w_i G_i is singular, a ridge of `FALLBACK` times each input's own size is added. If it is
        zero, W is the average.

    Raises:
        ShapeError: if a Gram matrix does not fit the weights.
    """
    centre = average(weights, shares)
    right, total = _sums([x.double() - centre for x in weights], shares, grams, off_diagonal)
    difference, route = _solved(right, total, ridge)
    return Merged(centre + difference, route)


def regmean_of_task_vectors(
    base: Tensor,
    weights: Sequence[Tensor],
    shares: Sequence[float],
    grams: Iterable[Tensor] | None,
    *,
    factor: float = 1.0,
    off_diagonal: float = 1.0,
    ridge: float = 0.0,
) -> Merged:
    """Add what several models learned to their base: ``B + λ (Σ w_i τ_i G_i)(Σ w_i G_i + r I)⁻¹``, τ_i = W_i − B.

    Args:
        base: B [out, in].
        weights: W_i, each [out, in].
        shares: w_i, not negative, with a positive sum.
        grams: G_i as for `regmean`; None for ``τ_iᵀ τ_i / ‖τ_i‖²``: gradients are sums of outer products with the
            inputs, so a model's update shows which inputs it was trained on.
        factor: λ.
        off_diagonal: as for `regmean`.
        ridge: r, times the mean of the diagonal of Σ w_i G_i; pulls to the base.

    Returns:
        The merged layer [out, in]; the base if no model differs from it. Singular matrices as for `regmean`.

    Raises:
        ShapeError: as `regmean`.
    """
    average([base, *weights], [1.0, *shares])  # the shapes agree
    tasks = [x.double() - base.double() for x in weights]
    given = map(gram_of_task_vector, tasks) if grams is None else grams
    right, total = _sums(tasks, shares, given, off_diagonal)
    difference, route = _solved(right, total, ridge)
    unchanged = grams is None and not any(bool(task.any()) for task in tasks)
    return Merged(base.double() + factor * difference, Route.exact if unchanged else route)


def gram_of_task_vector(task: Tensor) -> Tensor:
    """τᵀ τ / ‖τ‖² [in, in]; zero for a model that did not change."""
    square = task.square().sum()
    return task.mT @ task / torch.where(square > 0, square, 1.0)


def with_bias(weight: Tensor, bias: Tensor) -> Tensor:
    """[W b]: the bias as the column of one more input, which is always 1; [out, in + 1]."""
    return torch.cat([weight.double(), bias.double().unsqueeze(-1)], dim=-1)


def gram_with_bias(gram: Tensor, mean: Tensor) -> Tensor:
    """The Gram matrix of [x; 1] from the one of x [in, in] (or its diagonal [in]) and the mean of x [in]."""
    g, m = gram.double(), mean.double()
    one = torch.ones(1, dtype=g.dtype, device=g.device)
    if g.ndim == 1:
        return torch.cat([g, one])
    rows = torch.cat([g, m.unsqueeze(-1)], dim=-1)
    return torch.cat([rows, torch.cat([m, one]).unsqueeze(0)])


def _sums(
    differences: Sequence[Tensor], shares: Sequence[float], grams: Iterable[Tensor], off_diagonal: float
) -> tuple[Tensor, Tensor]:
    """Σ w_i D_i G_i [out, in] and Σ w_i G_i ([in, in], or [in] if all are diagonals)."""
    right = torch.zeros_like(differences[0])
    total: Tensor | None = None
    for d, share, gram in zip(differences, shares, grams, strict=True):
        if any(n != d.shape[-1] for n in gram.shape) or gram.ndim not in (1, 2):
            reason = f"its shape is {tuple(gram.shape)}, but the weights have {d.shape[-1]} inputs"
            raise ShapeError("a Gram matrix", reason, "Use the statistics of this layer")
        g = share * _damped(gram.double(), off_diagonal)
        right += d * g if g.ndim == 1 else d @ g
        total = g if total is None else _added(total, g)
    assert total is not None
    return right, total


def _added(total: Tensor, g: Tensor) -> Tensor:
    if total.ndim == g.ndim:
        return total.add_(g)
    diagonal, full = (total, g) if total.ndim == 1 else (g, total)
    full.diagonal().add_(diagonal)
    return full


def _damped(gram: Tensor, off_diagonal: float) -> Tensor:
    """The Gram matrix, exactly symmetric, with its numbers beside the diagonal multiplied."""
    if gram.ndim == 1:
        return gram
    g = (gram + gram.mT) * (off_diagonal / 2)
    g.diagonal().copy_(gram.diagonal())
    return g


def _solved(right: Tensor, total: Tensor, ridge: float) -> tuple[Tensor, Route]:
    """X of ``X (S + λ I) = R``, zero for inputs that were never seen.

    The matrix is scaled to a diagonal of ones first: inputs of a language model differ in size by orders of magnitude,
    and that alone shall not make it look singular.
    """
    size = total if total.ndim == 1 else total.diagonal()
    size = size + ridge * size.mean()
    seen = size > 0
    if not bool(seen.any()):
        return torch.zeros_like(right), Route.average
    if total.ndim == 1:
        return torch.where(seen, right / torch.where(seen, size, 1.0), 0.0), Route.exact
    scale = torch.where(seen, size, 1.0).rsqrt()
    scaled = total * scale * scale.unsqueeze(-1)
    scaled.diagonal().fill_(1.0)
    for route, more in ((Route.exact, 0.0), (Route.ridge, FALLBACK)):
        scaled.diagonal().add_(more)
        factor, failed = torch.linalg.cholesky_ex(scaled)
        if not bool(failed) and float(factor.diagonal().min()) ** 2 > _least_pivot(len(size)):
            return torch.cholesky_solve((right * scale).mT, factor).mT * scale, route
    return torch.zeros_like(right), Route.average


def _least_pivot(n: int) -> float:
    """Below this, a pivot of a matrix with a diagonal of ones that was stored in float32 is rounding."""
    return float(n**0.5 * torch.finfo(torch.float32).eps)
