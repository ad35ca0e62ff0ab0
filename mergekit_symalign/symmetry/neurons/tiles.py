"""The nearest column of every row, from products that are taken a tile at a time and never held as a whole."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from mergekit_symalign.symmetry.rows import two_lowest
from mergekit_symalign.symmetry.threads import in_parallel

_HEIGHT, _WIDTH = 512, 1024  # of a tile: small enough to stay in the cache
_CHUNK = 256  # columns of which only the lowest number is kept at first; a divisor of the width

Tiles = Callable[[Tensor], Callable[[slice], Tensor]]
"""From the numbers of some rows to a function from some columns to their tile: numbers that can be compared. It may be
overwritten by the next."""


def two_nearest(tiles: Tiles, rows: Tensor, columns: int) -> tuple[Tensor, Tensor]:
    """The column of the lowest number of each row, and its second lowest number.

    First the lowest number of every chunk of columns, which is cheap to find while a tile is in the cache. Then the
    best chunk of each row is multiplied once more, and looked through.

    Args:
        tiles: of all pairs.
        rows: their numbers [m].
        columns: how many there are.

    Returns:
        Column and number of each row [m]; the number is the largest of its dtype if there is a single column.
    """
    pieces = rows.split(_HEIGHT)
    minima = torch.cat(in_parallel(lambda some: _minima(tiles(some), columns), pieces, rows.device))
    best = minima.argmin(1)
    others = minima.scatter(1, best.unsqueeze(1), torch.iinfo(minima.dtype).max).amin(1)
    order = best.argsort()
    counts = torch.bincount(best, minlength=minima.shape[1]).tolist()
    chunks = [(i, at) for i, at in enumerate(order.split(counts)) if len(at)]

    def inside(chunk: tuple[int, Tensor]) -> tuple[Tensor, Tensor]:
        number, at = chunk
        start = number * _CHUNK
        tile = tiles(rows[at])(slice(start, min(start + _CHUNK, columns)))
        place, second = two_lowest(tile)
        return place + start, second

    found = in_parallel(inside, chunks, rows.device)
    place, second = (torch.cat(x) for x in zip(*found, strict=True))
    back = order.argsort()
    return place[back], torch.minimum(second[back], others)


def _minima(tile: Callable[[slice], Tensor], columns: int) -> Tensor:
    """The lowest number of each chunk [rows, chunks]."""
    found = []
    for start in range(0, columns, _WIDTH):
        x = tile(slice(start, min(start + _WIDTH, columns)))
        whole = x.shape[1] // _CHUNK * _CHUNK
        if whole:
            found.append(x.narrow(1, 0, whole).unflatten(1, (-1, _CHUNK)).amin(2))
        if whole < x.shape[1]:
            found.append(x.narrow(1, whole, x.shape[1] - whole).amin(1, keepdim=True))
    return torch.cat(found, dim=1)
