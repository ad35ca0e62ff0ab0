"""What it costs to match two neurons: exactly for given pairs of them, and for whole rows of the assignment problem."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from mergekit_symalign.errors import ShapeError
from mergekit_symalign.symmetry import devices
from mergekit_symalign.symmetry.assignment.shortlist import Scores
from mergekit_symalign.symmetry.distance import squared_distance
from mergekit_symalign.symmetry.fitting import ROWS
from mergekit_symalign.symmetry.neurons import bfloat, quantized
from mergekit_symalign.symmetry.neurons.bfloat import bfloat_scores
from mergekit_symalign.symmetry.neurons.products import Numbers, fastest
from mergekit_symalign.symmetry.neurons.quantized import quantized_scores
from mergekit_symalign.symmetry.options import NeuronScale, Pair
from mergekit_symalign.symmetry.quartic import neuron_factors
from mergekit_symalign.symmetry.rows import compute_dtype
from mergekit_symalign.symmetry.scale import best_saving
from mergekit_symalign.symmetry.threads import in_parallel

_ROWS = 256  # of a product or a sum of squares that are taken at once
_TRIED = (512, 1024)  # rows and columns of a product that is measured in each kind of numbers
_PAIRS = 1 << 22  # pairs of neurons whose scales are solved at once


@dataclass(frozen=True)
class NeuronPairs:
    """The rows of an MLP's neurons, anchor and model, by what a scale does to them.

    Attributes:
        fixed: rows no scale touches (gate of a gated MLP).
        scaled: rows multiplied by the neuron's factor (up).
        divided: rows divided by it (columns of down, as rows).

    Raises:
        ShapeError: if there are no rows of up, or not one row of each tensor for each neuron.
    """

    fixed: Sequence[Pair]
    scaled: Sequence[Pair]
    divided: Sequence[Pair]

    def __post_init__(self) -> None:
        if not self.scaled:
            raise ShapeError("neurons", "there are no rows of up", ROWS)
        anchor, model = self.scaled[0]
        for a, b in self.all:
            if (a.ndim, b.ndim) != (2, 2) or a.shape[1] != b.shape[1] or (len(a), len(b)) != (len(anchor), len(model)):
                reason = f"rows of {list(a.shape)} (anchor) and {list(b.shape)} (model) do not fit the others"
                raise ShapeError("neurons", f"{reason}, of {len(anchor)} and {len(model)} neurons", ROWS)

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

    def of_pairs(self, rows: Tensor, columns: Tensor) -> Tensor:
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
        return fixed + torch.cat([best_saving(p, b, q, o, signed=signed) for p, q in blocks])

    def rounded_scores(self) -> Scores | None:
        """The same for all pairs from numbers that are multiplied faster than float32 here, exactly for some pairs;
        None where there are none."""
        pairs, numbers = self.pairs.all, self._numbers()
        if self.scale is not NeuronScale.none or numbers is Numbers.float32:
            return None
        own, norms = _squares([(b, a) for a, b in pairs]), self.norms()

        def exact(rows: Tensor, columns: Tensor) -> Tensor:
            return (own[rows] + norms[columns] - self.of_pairs(rows, columns)) / 2

        scores = quantized_scores if numbers is Numbers.whole else bfloat_scores
        return scores(pairs, own.sqrt(), norms.sqrt(), exact)

    def _numbers(self) -> Numbers:
        """The fastest that lose no more of the scores than their bounds say."""
        pairs, device = self.pairs.all, self.pairs.device
        if not devices.on_cpu(device):
            return Numbers.float32
        columns, dtypes = sum(x.shape[1] for x, _ in pairs), {x.dtype for pair in pairs for x in pair}
        size = (*_TRIED, columns)
        ways: dict[Numbers, Callable[[], Callable[[], object]]] = {Numbers.float32: partial(_tried, *size)}
        if dtypes == {torch.bfloat16}:
            ways[Numbers.bfloat16] = partial(bfloat.tried, *size)
        if all(quantized.usable(device, dtype, columns) for dtype in dtypes):
            ways[Numbers.whole] = partial(quantized.tried, *size)
        return fastest("all pairs of neurons", columns, ways)

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


def _tried(rows: int, neurons: int, columns: int) -> Callable[[], Tensor]:
    """The scores of some rows with some neurons in float32, to be measured."""
    own, other = (torch.ones(n, columns) for n in (rows, neurons))
    return lambda: own @ other.mT


def _products(side: Sequence[Pair], rows: Tensor | None) -> Tensor:
    if not side:
        return torch.zeros(())
    first, other = side[0]
    if rows is None:
        rows = torch.arange(len(first), device=first.device)
    dtype = compute_dtype(first.dtype)
    total = torch.zeros(len(rows), len(other), dtype=dtype, device=first.device)
    for anchor, model in side:
        b = model.to(dtype).mT

        def add(block: Pair, anchor: Tensor = anchor, b: Tensor = b) -> None:
            sums, at = block
            sums.addmm_(anchor.index_select(0, at).to(dtype), b)

        in_parallel(add, list(zip(total.split(_ROWS), rows.split(_ROWS), strict=True)), first.device)
    return total


def _squares(side: Sequence[Pair]) -> Tensor:
    """Squared norm of each of the model's rows [neurons]."""

    def of_model(model: Tensor) -> Tensor:
        dtype = compute_dtype(model.dtype)
        return torch.cat(in_parallel(lambda x: x.to(dtype).square().sum(-1), model.split(_ROWS), model.device)).double()

    return torch.stack([of_model(model) for _, model in side]).sum(0)


def _paired(side: Sequence[Pair], rows: Tensor, columns: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Anchor's squared norm, inner product and model's squared norm of each pair, in float64."""
    sums = []
    for anchor, model in side:
        a, b = anchor.index_select(0, rows).double(), model.index_select(0, columns).double()
        sums.append(torch.stack([a.square().sum(-1), (a * b).sum(-1), b.square().sum(-1)]))
    own, inner, other = torch.stack(sums).sum(0).unbind(0)
    return own, inner, other
