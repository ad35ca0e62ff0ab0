"""What all solvers need of a matrix's rows: dtypes, selections, the lowest numbers, and what rounding may hide."""

from __future__ import annotations

import torch
from torch import Tensor

SLACK = 1e-5  # of the norms' product: how far a sum of products in float32 may be from the truth
_CHUNK = 128  # columns of which the nearest is found first
_TILE = 256  # rows and columns that are transposed at once


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which weights of ``dtype`` are transformed: float32, or float64 for float64."""
    return torch.promote_types(dtype, torch.float32)


def is_finite(x: Tensor) -> bool:
    """Whether there is neither NaN nor infinity; a sum tells at the speed of the memory, unless it overflows."""
    if not x.is_floating_point() or x.numel() == 0:
        return True
    if bool(x.sum(-1).isfinite().all()):
        return True
    low, high = torch.aminmax(x)
    return bool(torch.isfinite(low) & torch.isfinite(high))


def select_last(x: Tensor, index: Tensor) -> Tensor:
    """``index_select`` along the last axis, where ``gather`` is twice as fast, the more so on whole numbers."""
    if x.element_size() == 2 and not x.requires_grad:
        return x.view(torch.int16).gather(-1, index.expand(*x.shape[:-1], -1)).view(x.dtype)
    return x.gather(-1, index.expand(*x.shape[:-1], -1))


def copy_rows(to: Tensor, x: Tensor) -> None:
    """``to.copy_(x)``; in square tiles if the rows of ``x`` are stored as columns, which is four times faster."""
    if x.stride(0) >= x.stride(1):
        to.copy_(x)
        return
    for rows, of_rows in zip(to.split(_TILE), x.split(_TILE), strict=True):
        for at, tile in zip(rows.split(_TILE, dim=1), of_rows.split(_TILE, dim=1), strict=True):
            at.copy_(tile.mT.contiguous().mT)


def two_lowest(x: Tensor) -> tuple[Tensor, Tensor]:
    """Place of the lowest number of each row [rows, n], and the second lowest number; ``x`` stays as it is.

    In two steps, first over chunks: a minimum is several times cheaper than its place.
    """
    chunks = in_chunks(x, _CHUNK)
    size = chunks.shape[2]
    lowest = chunks.amin(2)
    chunk = lowest.argmin(1)
    at = chunk.reshape(-1, 1, 1).expand(-1, 1, size)
    inside = chunks.gather(1, at).squeeze(1)
    place = inside.argmin(1, keepdim=True)
    ceiling = torch.iinfo(x.dtype).max if not x.is_floating_point() else torch.inf
    rest = inside.scatter(1, place, ceiling).amin(1)
    others = lowest.scatter(1, chunk.unsqueeze(1), ceiling).amin(1)
    return chunk * size + place.squeeze(1), torch.minimum(rest, others)


def in_chunks(x: Tensor, most: int) -> Tensor:
    """Equal chunks of at most so many columns [rows, chunks, columns of a chunk]."""
    n = x.shape[1]
    return x.unflatten(1, (-1, next(d for d in range(min(most, n), 0, -1) if n % d == 0)))
