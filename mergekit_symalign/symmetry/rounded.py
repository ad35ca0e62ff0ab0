"""Scores of all pairs of neurons from one product of 16-bit numbers, with how far each may be from the truth.

Processors that multiply bfloat16 natively take half as long for it as for float32, and checkpoints mostly are bfloat16
already: then the products are exact and only the sums are rounded. Other weights are rounded first, by lengths that are
known. The few pairs that matter are then taken exactly (symmetry/shortlist.py).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from mergekit_symalign.symmetry.groups import SLACK
from mergekit_symalign.symmetry.options import Pair
from mergekit_symalign.symmetry.shortlist import Scores
from mergekit_symalign.symmetry.threads import in_parallel

_ROWS = 1024  # of the anchor for one thread
_PIECE = 256  # rows that are rounded at once
_TILE = 256  # rows and columns that are transposed at once
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
    device, neurons = anchor.device, len(anchor)
    other, lost = _rounded([b for _, b in pairs])
    longest, most = model.max(), lost.max()
    values = torch.empty(neurons, neurons, dtype=torch.bfloat16, device=device)

    def error(work: tuple[Tensor, Tensor, Sequence[Tensor]]) -> Tensor:
        """Of some rows, whose scores are written to their block of ``values``."""
        block, length, rows = work
        own, own_lost = _rounded(rows)
        torch.mm(own, other.mT, out=block)
        return own_lost * longest + (length + own_lost) * (most + SLACK * (longest + most))

    rows = zip(*(a.split(_ROWS) for a, _ in pairs), strict=True)
    work = list(zip(values.split(_ROWS), anchor.split(_ROWS), rows, strict=True))
    return Scores(values, torch.cat(in_parallel(error, work, device)), _STORED, exact)


def usable(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether products of bfloat16 are fast here, with sums in float32, and what is lost by rounding is little."""
    if device.type != "cpu" or dtype is torch.float64 or not torch.backends.mkldnn.is_available():
        return False
    capable = torch.cpu.get_capabilities()
    return bool(capable.get("avx512_bf16") or capable.get("amx_bf16"))


def _rounded(rows: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """The rows side by side in bfloat16 [neurons, all columns], and how far rounding moved each [neurons]."""
    whole = rows[0].new_empty(len(rows[0]), sum(x.shape[1] for x in rows), dtype=torch.bfloat16)

    def moved(work: tuple[Tensor, Sequence[Tensor]]) -> Tensor:
        block, given = work
        lost = torch.zeros(len(block), dtype=torch.float64, device=block.device)
        for x, at in zip(given, block.split([x.shape[1] for x in given], dim=1), strict=True):
            _copy(at, x)
            if x.dtype is not torch.bfloat16:
                lost += (x.float() - at).square().sum(1).double()
        return lost.sqrt()

    blocks = list(zip(whole.split(_PIECE), zip(*(x.split(_PIECE) for x in rows), strict=True), strict=True))
    return whole, torch.cat(in_parallel(moved, blocks, whole.device))


def _copy(to: Tensor, x: Tensor) -> None:
    """``to.copy_(x)``; in square tiles if the rows of ``x`` are stored as columns, which is four times faster."""
    if x.stride(0) >= x.stride(1):
        to.copy_(x)
        return
    for rows, of_rows in zip(to.split(_TILE), x.split(_TILE), strict=True):
        for at, tile in zip(rows.split(_TILE, dim=1), of_rows.split(_TILE, dim=1), strict=True):
            at.copy_(tile.mT.contiguous().mT)
