"""Which neuron of the model belongs to which of the anchor: a linear assignment problem, solved to its optimum.

The mathematics: docs/symmetries.md. The Hungarian algorithm runs on the CPU (scipy); this module is the only one that
moves a tensor there.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from mergekit_symalign.symmetry.certificate import certified_permutation
from mergekit_symalign.symmetry.groups import AxisAction, Chain, Permutation, Scaling, compute_dtype
from mergekit_symalign.symmetry.options import NeuronScale
from mergekit_symalign.symmetry.scale import joint_log_scale, newton_step, quartic_scale

_BLOCK = 1 << 22  # pairs of neurons whose scales are solved at once

Pair = tuple[Tensor, Tensor]  # anchor's and model's rows of one kind, [neurons, columns] each


@dataclass(frozen=True)
class NeuronPairs:
    """The rows of an MLP's neurons, anchor and model, by what a scale does to them.

    Attributes:
        fixed: rows no scale touches (gate of a gated MLP).
        scaled: rows multiplied by the neuron's factor (up).
        divided: rows divided by it (columns of down, as rows).
    """

    fixed: Sequence[Pair]
    scaled: Sequence[Pair]
    divided: Sequence[Pair]


def align_neurons(pairs: NeuronPairs, *, permute: bool, scale: NeuronScale) -> tuple[AxisAction, AxisAction]:
    """The permutation of neurons, and with ``scale`` their signed scales, that come closest to the anchor.

    Maximises ``Σ_i S[i, π(i)]``, ``S = G_A G_Bᵀ + U_A U_Bᵀ + D_Aᵀ D_B``. With a scale the score of a pair is that of
    its own best factor for ``u → c u, d → d / c``, so that permutation and factors are optimal together.

    Returns:
        The actions that gate rows and up rows carry; down columns carry the dual of the latter.
    """
    neurons, device = pairs.scaled[0][0].shape[0], pairs.scaled[0][0].device
    index = best_permutation(pairs, scale=scale) if permute else torch.arange(neurons, device=device)
    permutation = Permutation(index)
    if scale is NeuronScale.none:
        return permutation, permutation
    signed = scale is NeuronScale.signed
    factor = neuron_factors(_paired(pairs.scaled, index), _paired(pairs.divided, index), signed=signed)
    return permutation, Chain((permutation, Scaling(factor)))


def best_permutation(pairs: NeuronPairs, *, scale: NeuronScale) -> Tensor:
    """The optimal permutation: proven by nearest neighbours if they can, else from the full assignment problem."""
    if scale is NeuronScale.none:
        index = certified_permutation([*pairs.fixed, *pairs.scaled, *pairs.divided])
        if index is not None:
            return index
    return best_assignment(_scores(pairs, scale=scale))


def best_assignment(score: Tensor) -> Tensor:
    """The permutation ``π`` with the largest ``Σ_i score[i, π(i)]``, exactly; the identity if it is as good.

    Args:
        score: [n, n], any float dtype, any device.

    Returns:
        ``π`` as int64 [n], on the device of ``score``.
    """
    identity = torch.arange(score.shape[0], device=score.device)
    rows, columns = score.max(1), score.max(0)
    if bool((rows.values <= score.diagonal()).all()):
        return identity
    if bool((columns.indices[rows.indices] == identity).all()):
        return rows.indices  # every row's own best column is a different one: no assignment can do better
    _, found = linear_sum_assignment(score.cpu().numpy(), maximize=True)
    index = torch.from_numpy(found).to(score.device)
    gain = score.gather(1, index.unsqueeze(1)).double().sum() - score.diagonal().double().sum()
    noise = torch.finfo(score.dtype).eps * score.diagonal().double().abs().sum()
    return identity if bool(gain <= noise) else index


def identity_is_optimal(unmoved: Tensor, bounds: Tensor) -> bool:
    """Whether no pair off the diagonal can be cheaper than the diagonal one already is without any element.

    Args:
        unmoved: [n] costs of the diagonal pairs as they are.
        bounds: [n, n] lower bounds of every pair's cost.
    """
    off = bounds.masked_fill(torch.eye(len(bounds), dtype=torch.bool, device=bounds.device), torch.inf)
    return bool((unmoved <= off.amin(1)).all())


def lazy_assignment(bounds: Tensor, cost: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    """The assignment with the least total cost, asking for the cost of as few pairs as possible.

    Pairs whose cost was not asked for stand in with their lower bound: an optimum that uses known pairs only is an
    optimum of the true costs.

    Args:
        bounds: [n, n] lower bounds of every pair's cost.
        cost: from rows and columns [m] of some pairs to their costs [m].

    Returns:
        The column of each row, int64 [n].
    """
    costs = bounds.clone()
    known = torch.zeros_like(costs, dtype=torch.bool)
    rows = torch.arange(len(costs), device=costs.device)
    index = rows
    while True:
        missing = rows[~known[rows, index]]
        if len(missing) == 0:
            return index
        costs[missing, index[missing]] = cost(missing, index[missing]).to(costs.dtype)
        known[missing, index[missing]] = True
        index = best_assignment(-costs)


def neuron_factors(scaled: tuple[Tensor, Tensor], divided: tuple[Tensor, Tensor], *, signed: bool) -> Tensor:
    """The best factor of each pair: minimises ``c² b + o / c² − 2 (c p + q / c)`` over ``c ≠ 0``, or ``c > 0``.

    Args:
        scaled: ``p`` (inner products of anchor and model) and ``b`` (squared norms of the model) of the up rows.
        divided: the same, ``q`` and ``o``, of the down columns.
        signed: whether ``c`` may be negative.
    """
    (p, b), (q, o) = scaled, divided
    p, b, q, o = torch.broadcast_tensors(p.double(), b.double(), q.double(), o.double())
    if not signed:
        return quartic_scale(b, o, p, q)

    def g(t: Tensor) -> Tensor:
        return (torch.exp(t) * p.unsqueeze(-1) + torch.exp(-t) * q.unsqueeze(-1)).abs()

    s = torch.exp(joint_log_scale(b, o, (p.abs(), q.abs()), g).log_scale)
    sign = torch.where(s * p + q / s < 0, -1.0, 1.0)
    s = quartic_scale(b, o, sign * p, sign * q)
    factor: Tensor = sign * s
    return factor


def _scores(pairs: NeuronPairs, *, scale: NeuronScale) -> Tensor:
    """What each pair of neurons (anchor's row, model's column) contributes when matched."""
    fixed, scaled, divided = (_products(side) for side in (pairs.fixed, pairs.scaled, pairs.divided))
    if scale is NeuronScale.none:
        return fixed + scaled + divided
    b, o = (_squares(side) for side in (pairs.scaled, pairs.divided))
    rows = max(1, _BLOCK // scaled.shape[1])
    signed = scale is NeuronScale.signed
    blocks = zip(scaled.split(rows), divided.split(rows), strict=True)
    return fixed + torch.cat([_best_saving(p, b, q, o, signed=signed) for p, q in blocks])


def _best_saving(p: Tensor, b: Tensor, q: Tensor, o: Tensor, *, signed: bool) -> Tensor:
    """``max_c c p + q/c − (c² b + o/c²) / 2`` for every pair, plus ``(b + o) / 2``, which no permutation changes.

    Every stationary point lies between ``c = p/b`` and ``c = o/q``: Newton from both ends, from the point where the
    norms balance and from 1, with the sign that the mixture has there; the best of the four.

    Args:
        p, q: [rows, neurons] inner products.
        b, o: [neurons] squared norms of the model's rows.
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


def _products(side: Sequence[Pair]) -> Tensor:
    total: Tensor | None = None
    for anchor, model in side:
        a, b = (x.to(compute_dtype(x.dtype)) for x in (anchor, model))
        total = a @ b.mT if total is None else total.addmm_(a, b.mT)
    return torch.zeros(()) if total is None else total


def _squares(side: Sequence[Pair]) -> Tensor:
    """Squared norm of each of the model's rows [neurons]."""
    return torch.stack([model.double().square().sum(-1) for _, model in side]).sum(0)


def _paired(side: Sequence[Pair], index: Tensor) -> tuple[Tensor, Tensor]:
    """Inner product of each anchor row with its partner, and the partner's squared norm, [neurons] each."""
    partners = [(a.double(), b.double().index_select(0, index)) for a, b in side]
    inner = torch.stack([(a * b).sum(-1) for a, b in partners]).sum(0)
    return inner, torch.stack([b.square().sum(-1) for _, b in partners]).sum(0)
