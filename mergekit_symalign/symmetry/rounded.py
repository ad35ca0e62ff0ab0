"""Scores of all pairs of neurons from one product of 8-bit numbers, with how far each may be from the truth.

Such products are exact and take a quarter of the time of float32; what is lost is lost by rounding the rows. In the
worst case all rounding errors of a pair point the same way, and add up to more than the scores differ by. So rows are
rounded with a subtractive dither (Roberts 1962): random numbers are added before rounding and taken off again after.
What rounding does to a number is then uniform over one unit and independent of all others, whatever the weights are,
and errors add up to what Hoeffding's bound allows, except with a chance that is chosen: `_CHANCE`
(docs/symmetries.md). The few pairs that matter are then taken exactly (symmetry/shortlist.py). The random numbers come
from a fixed seed, so that results are the same in every run.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import reduce

import torch
from torch import Tensor

from mergekit_symalign.symmetry.groups import SLACK
from mergekit_symalign.symmetry.options import Pair
from mergekit_symalign.symmetry.shortlist import Scores
from mergekit_symalign.symmetry.threads import in_parallel

_CHANCE = 1e-30  # that any score is farther from the truth than its error says
_LARGEST = 127
_SEEDS = (1, 2)  # of the dither of anchor and model
_ROWS = 512  # of the anchor that are multiplied at once
_PIECE = 256  # rows that are rounded together
_TILE = 256  # rows and columns that are transposed at once
_BLOCK = 1 << 17  # numbers that are held in float32 at once: small enough to stay in the cache
_STORED = 2.0**-8  # of a score: how far rounding it to bfloat16 may move it


def rounded_scores(
    pairs: Sequence[Pair], anchor: Tensor, model: Tensor, exact: Callable[[Tensor, Tensor], Tensor]
) -> Scores:
    """``Σ a_i · b_j`` over all rows of a neuron, for all pairs of neurons.

    Args:
        pairs: the rows, in any dtype of at most 32 bits.
        anchor, model: length of each neuron [neurons], float64.
        exact: the same for some pairs, from their numbers.
    """
    device, neurons, columns = anchor.device, len(anchor), sum(a.shape[1] for a, _ in pairs)
    ours, theirs = (_dither(columns, seed, device) for seed in _SEEDS)
    other = _Whole.of([b for _, b in pairs], theirs)
    along = other.times(ours) + ours @ theirs
    coarsest, longest = other.unit.max().double(), model.max()
    values = torch.empty(neurons, neurons, dtype=torch.bfloat16, device=device)

    def error(work: tuple[Tensor, Tensor, Sequence[Tensor]]) -> Tensor:
        """Of some rows, whose scores are written to their block of ``values``."""
        block, length, rows = work
        own = _Whole.of(rows, ours)
        sums = torch._int_mm(own.numbers, other.numbers.mT)
        across = own.times(theirs).unsqueeze(1)
        for at in _blocks(len(block), neurons):
            score = sums[at].to(torch.float32).add_(along).add_(across[at]).mul_(other.unit)
            block[at] = score.mul_(own.unit[at].unsqueeze(1))
        unit = own.unit.double()
        spread = torch.hypot(unit * longest, coarsest * length) + unit * coarsest * columns**0.5 / 2
        return _deviations(neurons) * spread + SLACK * length * longest

    rows = zip(*(a.split(_ROWS) for a, _ in pairs), strict=True)
    work = list(zip(values.split(_ROWS), anchor.split(_ROWS), rows, strict=True))
    return Scores(values, torch.cat(in_parallel(error, work, device)), _STORED, exact)


def usable(device: torch.device, dtype: torch.dtype, columns: int) -> bool:
    """Whether products of 8-bit numbers are fast and exact here.

    Processors without VNNI add pairs of products in 16 bits, which large numbers overflow.
    """
    if device.type != "cpu" or dtype is torch.float64 or not torch.backends.mkldnn.is_available():
        return False
    capable = torch.cpu.get_capabilities()
    return columns * _LARGEST**2 < 2**31 and any(capable.get(x) for x in ("avx512_vnni", "avx_vnni", "amx_int8"))


@dataclass(frozen=True)
class _Whole:
    """Rows as whole numbers, each row in units of its own: ``x ≈ unit · (numbers + dither)``.

    Attributes:
        numbers: int8 [neurons, columns].
        unit: float32 [neurons].
    """

    numbers: Tensor
    unit: Tensor

    @staticmethod
    def of(rows: Sequence[Tensor], dither: Tensor) -> _Whole:
        """Of several matrices [neurons, …] side by side."""
        numbers = torch.empty(len(rows[0]), len(dither), dtype=torch.int8, device=dither.device)
        widths, dtype = [x.shape[1] for x in rows], reduce(torch.promote_types, (x.dtype for x in rows))

        def unit(work: tuple[Tensor, Sequence[Tensor]]) -> Tensor:
            """Of some rows, whose numbers are written to their block of ``numbers``."""
            block, given = work
            whole = torch.empty(block.shape, dtype=dtype, device=block.device)
            for x, at in zip(given, whole.split(widths, dim=1), strict=True):
                _copy(at, x)
            units = []
            for at in _blocks(*block.shape):
                x = whole[at].to(torch.float32, copy=True)
                largest = torch.maximum(x.amax(1), -x.amin(1))  # aminmax takes ten times as long
                units.append((largest / _LARGEST).clamp_min(torch.finfo(x.dtype).tiny))
                block[at] = x.div_(units[-1].unsqueeze(1)).sub_(dither).round_().clamp_(-_LARGEST, _LARGEST)
            return torch.cat(units)

        work = list(zip(numbers.split(_PIECE), zip(*(x.split(_PIECE) for x in rows), strict=True), strict=True))
        return _Whole(numbers, torch.cat(in_parallel(unit, work, numbers.device)))

    def times(self, vector: Tensor) -> Tensor:
        """The numbers of each row with a vector [columns]: float32 [neurons]."""
        return torch.cat([self.numbers[at].to(vector.dtype) @ vector for at in _blocks(*self.numbers.shape)])


def _dither(columns: int, seed: int, device: torch.device) -> Tensor:
    """What is taken off before rounding and added again after, uniform over ``± 1/2`` [columns]."""
    generator = torch.Generator(device).manual_seed(seed)
    return torch.rand(columns, generator=generator, device=device) - 0.5


def _deviations(neurons: int) -> float:
    """How many times the length of its terms the sum of a pair's rounding errors is at most, for all pairs."""
    return math.sqrt(math.log(4 * neurons**2 / _CHANCE) / 6)


def _copy(to: Tensor, x: Tensor) -> None:
    """``to.copy_(x)``; in square tiles if the rows of ``x`` are stored as columns, which is four times faster."""
    if x.stride(0) >= x.stride(1):
        to.copy_(x)
        return
    for rows, of_rows in zip(to.split(_TILE), x.split(_TILE), strict=True):
        for at, tile in zip(rows.split(_TILE, dim=1), of_rows.split(_TILE, dim=1), strict=True):
            at.copy_(tile.mT.contiguous().mT)


def _blocks(rows: int, columns: int) -> list[slice]:
    """Some rows at a time."""
    height = max(1, _BLOCK // columns)
    return [slice(start, start + height) for start in range(0, rows, height)]
