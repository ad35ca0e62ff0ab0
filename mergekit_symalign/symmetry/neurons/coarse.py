"""Nearest rows from 8-bit numbers: a bound that is cheaper than the product in float32, and settles most rows.

Every number is cut off at a few standard deviations and rounded to a whole multiple of a unit. Cutting off brings no
two numbers farther apart, and rounding moves a row by a length that is known. So the distance of the rounded rows, less
both lengths, bounds the distance of the rows from below, and products of whole numbers are exact.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from mergekit_symalign.symmetry.neurons.tiles import two_nearest
from mergekit_symalign.symmetry.threads import in_parallel

_LARGEST = 63  # processors without VNNI add pairs of products in 16 bits, which larger numbers would overflow
_RANGE = 4.5  # standard deviations that the whole numbers span to either side
_FEWEST = 17  # rows that the product of 8-bit numbers wants


@dataclass(frozen=True)
class TwoNearest:
    """For each row the nearest column, and a lower bound of the squared distance of every other [rows]."""

    columns: Tensor
    bound: Tensor


@dataclass(frozen=True)
class CoarseRows:
    """Rows of anchor and model as whole numbers.

    Attributes:
        anchor: int8 [neurons, k].
        model: int8 [neurons, k].
        norms: int32 [neurons], squared norms of the model's.
        unit: what a whole number stands for.
        error: [neurons], how far rounding moved each of the anchor's rows, and at most each of the model's.
    """

    anchor: Tensor
    model: Tensor
    norms: Tensor
    unit: Tensor
    error: Tensor

    @staticmethod
    def rounded(anchor: Tensor, model: Tensor) -> CoarseRows:
        """From float32 [neurons, k] each."""
        tiny = torch.finfo(anchor.dtype).tiny
        rms = torch.stack([x.square().mean() for x in (anchor, model)]).mean().sqrt().clamp_min(tiny)
        unit = rms * _RANGE / _LARGEST
        sides = in_parallel(lambda x: _rounded(x / unit), (anchor, model), anchor.device)
        (a, own), (b, other) = sides
        norms = b.to(torch.int32).square().sum(1, dtype=torch.int32)
        return CoarseRows(a, b, norms, unit, unit * (own + other.max()))

    def nearest(self, rows: Tensor) -> TwoNearest:
        """For some of the anchor's rows (their numbers)."""
        columns, second = two_nearest(self._tiles, rows, len(self.norms))
        own = self.anchor.index_select(0, rows).to(torch.int32).square().sum(1)
        apart = (second + own).clamp_min(0).to(self.unit.dtype).sqrt() * self.unit
        return TwoNearest(columns, (apart - self.error.index_select(0, rows)).clamp_min(0).square())

    def _tiles(self, rows: Tensor) -> Callable[[slice], Tensor]:
        """Squared distances, less the anchor's own norm, which is the same for a whole row."""
        anchor = self.anchor.index_select(0, rows)

        def tile(at: slice) -> Tensor:
            norms, model = self.norms[at], self.model[at].mT
            if len(anchor) < _FEWEST:
                product = (anchor.double() @ model.double()).to(torch.int32)
            else:
                product = torch._int_mm(anchor, model)
            return torch.sub(norms, product, alpha=2, out=product)

        return tile


def usable(device: torch.device, columns: int) -> bool:
    """Whether products of 8-bit numbers are exact here: they are not where they may overflow."""
    capable = device.type == "cpu" and torch.backends.cpu.get_cpu_capability().startswith("AVX")
    return capable and torch.backends.mkldnn.is_available() and 4 * columns * _LARGEST**2 < 2**31


def _rounded(x: Tensor) -> tuple[Tensor, Tensor]:
    """Whole numbers [rows, k], and how far rounding moved each row (after cutting off) [rows]."""
    cut = x.clamp(-_LARGEST, _LARGEST)
    whole = cut.round()
    return whole.to(torch.int8), torch.linalg.vector_norm(cut - whole, dim=1)
