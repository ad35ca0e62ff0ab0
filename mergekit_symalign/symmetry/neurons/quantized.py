"""Scores of all pairs of neurons from one product of 8-bit numbers, with how far each may be from the truth.

Such products are exact and take a quarter of the time of float32; what is lost is lost by rounding the rows. In the
worst case all rounding errors of a pair point the same way, and add up to more than the scores differ by. So rows are
rounded with a subtractive dither (Roberts 1962): random numbers are taken off before rounding and added again after.
What rounding does to a number is then uniform over one step and independent of all others, whatever the weights are,
and errors add up to no more than Hoeffding's bound, except with a chance that is chosen: `_CHANCE`
(docs/symmetries.md). The few pairs that matter are then taken exactly (assignment/shortlist.py). The random numbers
come from a fixed seed, so that results are the same in every run.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import reduce

import torch
from torch import Tensor

from mergekit_symalign.symmetry.assignment.shortlist import Scores
from mergekit_symalign.symmetry.compiled import arrays, bits, loops_for_many
from mergekit_symalign.symmetry.options import Pair
from mergekit_symalign.symmetry.rows import SLACK, copy_rows
from mergekit_symalign.symmetry.threads import in_parallel

_CHANCE = 1e-30  # that any score is farther from the truth than its error says
_LARGEST = 127
_EXACT_PRODUCTS = ("avx512_vnni", "avx_vnni", "amx_int8")  # torch's names for what a processor can do
_SEEDS = (1, 2)  # of the dither of anchor and model
_ROWS = 512  # of the anchor that are multiplied at once
_PIECE = 256  # rows that are rounded together
_BLOCK = 1 << 17  # numbers that are held in float32 at once: small enough to stay in the cache
_STORED = 2.0**-8  # of a score: how far rounding it to bfloat16 may move it


def quantized_scores(
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
    other = _Quantized.rounded([b for _, b in pairs], theirs)
    along = other.times(ours) + ours @ theirs
    values = torch.empty(neurons, neurons, dtype=torch.bfloat16, device=device)

    def steps(work: tuple[Tensor, Sequence[Tensor]]) -> Tensor:
        """Of some rows, whose scores are written to their block of ``values``."""
        block, rows = work
        own = _Quantized.rounded(rows, ours)
        _multiply(own, other, own.times(theirs), along, block)
        return own.step

    work = list(zip(values.split(_ROWS), zip(*(a.split(_ROWS) for a, _ in pairs), strict=True), strict=True))
    step = torch.cat(in_parallel(steps, work, device))
    return Scores(values, _errors((step, anchor), (other.step, model), columns), _STORED, exact)


def tried(rows: int, neurons: int, columns: int) -> Callable[[], None]:
    """The scores of some rows with some neurons, after rounding: a share of the whole work, to be measured."""
    numbers = torch.arange(columns, dtype=torch.int8).expand(max(rows, neurons), -1).contiguous()
    own, other = (_Quantized(numbers[:n], torch.ones(n)) for n in (rows, neurons))
    block = torch.empty(rows, neurons, dtype=torch.bfloat16)
    return lambda: _multiply(own, other, own.step, other.step, block)


def _multiply(own: _Quantized, other: _Quantized, across: Tensor, along: Tensor, block: Tensor) -> None:
    """Scores of some rows with all columns, to ``block``: products, and what the dithers add to them."""
    products = torch._int_mm(own.numbers, other.numbers.mT)
    if (loops := loops_for_many(len(other.numbers) ** 2, block)) is not None:
        loops.scores(*arrays(products, across, along, own.step, other.step), bits(block))
        return
    for at in _blocks(len(block), block.shape[1]):
        score = products[at].to(torch.float32).add_(along).add_(across[at].unsqueeze(1))
        block[at] = score.mul_(other.step).mul_(own.step[at].unsqueeze(1))


def usable(device: torch.device, dtype: torch.dtype, columns: int) -> bool:
    """Whether products of 8-bit numbers are exact here.

    Processors without VNNI add pairs of products in 16 bits, which large numbers overflow.
    """
    if device.type != "cpu" or dtype is torch.float64 or not torch.backends.mkldnn.is_available():
        return False
    return columns * _LARGEST**2 < 2**31 and any(_capabilities().get(x) for x in _EXACT_PRODUCTS)


def _capabilities() -> Mapping[str, object]:
    """What torch knows of the processor; older versions of torch know nothing, and get the slower route."""
    found: Mapping[str, object] = getattr(torch.cpu, "get_capabilities", dict)()
    return found


@dataclass(frozen=True)
class _Quantized:
    """Rows as whole numbers of steps, which each row has its own of: ``x ≈ step · (numbers + dither)``.

    Attributes:
        numbers: int8 [neurons, columns].
        step: float32 [neurons].
    """

    numbers: Tensor
    step: Tensor

    @staticmethod
    def rounded(rows: Sequence[Tensor], dither: Tensor) -> _Quantized:
        """Of several matrices [neurons, …] side by side."""
        numbers = torch.empty(len(rows[0]), len(dither), dtype=torch.int8, device=dither.device)
        widths, dtype = [x.shape[1] for x in rows], reduce(torch.promote_types, (x.dtype for x in rows))

        def steps(work: tuple[Tensor, Sequence[Tensor]]) -> Tensor:
            """Of some rows, whose numbers are written to their block of ``numbers``."""
            block, given = work
            whole = torch.empty(block.shape, dtype=dtype, device=block.device)
            for x, at in zip(given, whole.split(widths, dim=1), strict=True):
                copy_rows(at, x)
            if (loops := loops_for_many(numbers.numel(), whole)) is not None:
                step = torch.empty(len(whole))
                loops.whole_numbers(bits(whole), *arrays(dither, block, step), _LARGEST)
                return step
            found = []
            for at in _blocks(*block.shape):
                x = whole[at].to(torch.float32, copy=True)
                largest = torch.maximum(x.amax(1), -x.amin(1))  # aminmax takes ten times as long
                step = (largest / _LARGEST).clamp_min(torch.finfo(x.dtype).tiny)
                block[at] = x.div_(step.unsqueeze(1)).sub_(dither).round_().clamp_(-_LARGEST, _LARGEST)
                found.append(step)
            return torch.cat(found)

        work = list(zip(numbers.split(_PIECE), zip(*(x.split(_PIECE) for x in rows), strict=True), strict=True))
        return _Quantized(numbers, torch.cat(in_parallel(steps, work, numbers.device)))

    def times(self, vector: Tensor) -> Tensor:
        """The numbers of each row with a vector [columns]: float32 [neurons]."""
        return torch.cat([self.numbers[at].to(vector.dtype) @ vector for at in _blocks(*self.numbers.shape)])


def _dither(columns: int, seed: int, device: torch.device) -> Tensor:
    """What is taken off before rounding and added again after, uniform over ``± 1/2`` [columns]."""
    generator = torch.Generator(device).manual_seed(seed)
    return torch.rand(columns, generator=generator, device=device) - 0.5


def _errors(anchor: Pair, model: Pair, columns: int) -> tuple[Tensor, Tensor]:
    """How far the scores may be off, as factors of rows and of columns [neurons, 2] (docs/symmetries.md).

    Args:
        anchor, model: step and length of each neuron.
        columns: of the neurons, as rows.
    """
    (a, long_a), (b, long_b) = ((step.double(), length) for step, length in (anchor, model))
    most = _deviations(len(a))
    rows = torch.stack((a, long_a + a * columns**0.5 / 2), dim=1)
    return rows, torch.stack((most * long_b, most * b + SLACK * long_b), dim=1)


def _deviations(neurons: int) -> float:
    """How many times the length of its terms the sum of a pair's rounding errors reaches at most, for all pairs."""
    return math.sqrt(math.log(4 * neurons**2 / _CHANCE) / 6)


def _blocks(rows: int, columns: int) -> list[slice]:
    """Some rows at a time."""
    height = max(1, _BLOCK // columns)
    return [slice(start, start + height) for start in range(0, rows, height)]
