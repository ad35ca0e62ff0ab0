"""What it costs to match two neurons: exactly for given pairs of them, and for whole rows of the assignment problem."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mergekit_symalign.symmetry.groups import compute_dtype
from mergekit_symalign.symmetry.options import NeuronScale
from mergekit_symalign.symmetry.scale import joint_log_scale, newton_step, quartic_scale

_BLOCK = 1 << 20  # numbers that are held in the compute dtype at once: small enough to stay in the cache
_PAIRS = 1 << 22  # pairs of neurons whose scales are solved at once

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

    @property
    def neurons(self) -> int:
        return self.scaled[0][0].shape[0]

    @property
    def device(self) -> torch.device:
        return self.scaled[0][0].device

    @property
    def all(self) -> tuple[Pair, ...]:
        return (*self.fixed, *self.scaled, *self.divided)


@dataclass(frozen=True)
class NeuronCosts:
    """The cost of a pair: its squared distance, with a scale after the best factor of up and down.

    Attributes:
        pairs: the rows.
        scale: which factors are admitted.
    """

    pairs: NeuronPairs
    scale: NeuronScale

    @property
    def bounding(self) -> Sequence[Pair]:
        """The rows whose distance over any columns is a lower bound of the cost."""
        return self.pairs.all if self.scale is NeuronScale.none else self.pairs.fixed

    def of(self, rows: Tensor, columns: Tensor) -> Tensor:
        """Cost of anchor's ``rows[i]`` with model's ``columns[i]``."""
        total = sum(squared_distance(pair, rows, columns) for pair in self.bounding)
        if self.scale is not NeuronScale.none:
            total = total + self._scaled(rows, columns).to(torch.float32)
        assert isinstance(total, Tensor)
        return total

    def scores(self, rows: Tensor | None = None) -> Tensor:
        """What each pair contributes when matched, [rows or neurons, neurons]: cost = its neurons' norms − 2 score."""
        fixed, scaled, divided = (_products(x, rows) for x in (self.pairs.fixed, self.pairs.scaled, self.pairs.divided))
        if self.scale is NeuronScale.none:
            return fixed + scaled + divided
        b, o = (_squares(side) for side in (self.pairs.scaled, self.pairs.divided))
        height = max(1, _PAIRS // scaled.shape[1])
        signed = self.scale is NeuronScale.signed
        blocks = zip(scaled.split(height), divided.split(height), strict=True)
        return fixed + torch.cat([_best_saving(p, b, q, o, signed=signed) for p, q in blocks])

    def norms(self) -> Tensor:
        """Squared norm of each of the model's neurons [neurons], float64."""
        return _squares(self.pairs.all)

    def _scaled(self, rows: Tensor, columns: Tensor) -> Tensor:
        """The least ``‖u − c u'‖² + ‖d − d'/c‖²`` of each pair."""
        sides = (_paired(side, rows, columns) for side in (self.pairs.scaled, self.pairs.divided))
        (a_u, p, b), (a_d, q, o) = sides
        c = neuron_factors((p, b), (q, o), signed=self.scale is NeuronScale.signed)
        return a_u + a_d + c.square() * b + o / c.square() - 2 * (c * p + q / c)


def factors(pairs: NeuronPairs, index: Tensor, *, signed: bool) -> Tensor:
    """The best factor of each neuron under a permutation [neurons]."""
    rows = torch.arange(len(index), device=index.device)
    (_, p, b), (_, q, o) = (_paired(side, rows, index) for side in (pairs.scaled, pairs.divided))
    return neuron_factors((p, b), (q, o), signed=signed)


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


def squared_distance(pair: Pair, rows: Tensor, columns: Tensor) -> Tensor:
    """Squared distance of anchor's ``rows[i]`` and model's ``columns[i]`` over all their coordinates.

    Works through the tensors in the order in which they are stored, a block at a time, without a copy of either.
    """
    anchor, model = pair
    dtype = compute_dtype(anchor.dtype)
    if anchor.stride(0) < anchor.stride(1):  # stored with the neurons last
        blocks = _blocks(anchor.mT, model.mT, len(rows))
        total = torch.zeros(len(rows), dtype=dtype, device=anchor.device)
        for a, b in blocks:
            a, b = _selected(a, rows, 1), _selected(b, columns, 1)
            total += (a.to(dtype) - b).square_().sum(0)
        return total
    height = max(1, _BLOCK // anchor.shape[1])
    parts = []
    for at, to in zip(rows.split(height), columns.split(height), strict=True):
        a, b = _selected(anchor, at, 0), _selected(model, to, 0)
        parts.append((a.to(dtype) - b).square_().sum(1))
    return torch.cat(parts)


def _blocks(anchor: Tensor, model: Tensor, width: int) -> list[Pair]:
    height = max(1, _BLOCK // max(1, width))
    return list(zip(anchor.split(height), model.split(height), strict=True))


def _selected(x: Tensor, index: Tensor, dim: int) -> Tensor:
    """``index_select``, without a copy where the index counts through."""
    first = int(index[0])
    if first + len(index) <= x.shape[dim]:
        through = torch.arange(first, first + len(index), device=index.device)
        if torch.equal(index, through):
            return x.narrow(dim, first, len(index))
    return x.index_select(dim, index)


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


def _products(side: Sequence[Pair], rows: Tensor | None) -> Tensor:
    total: Tensor | None = None
    for anchor, model in side:
        a = anchor if rows is None else anchor.index_select(0, rows)
        a, b = (x.to(compute_dtype(x.dtype)) for x in (a, model))
        total = a @ b.mT if total is None else total.addmm_(a, b.mT)
    return torch.zeros(()) if total is None else total


def _squares(side: Sequence[Pair]) -> Tensor:
    """Squared norm of each of the model's rows [neurons]."""
    return torch.stack([model.double().square().sum(-1) for _, model in side]).sum(0)


def _paired(side: Sequence[Pair], rows: Tensor, columns: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Anchor's squared norm, inner product and model's squared norm of each pair, in float64."""
    sums = []
    for anchor, model in side:
        a, b = anchor.index_select(0, rows).double(), model.index_select(0, columns).double()
        sums.append(torch.stack([a.square().sum(-1), (a * b).sum(-1), b.square().sum(-1)]))
    own, inner, other = torch.stack(sums).sum(0).unbind(0)
    return own, inner, other
