"""Squared distances of weights, a block at a time: no copy of a whole tensor in a wider dtype."""

from __future__ import annotations

from collections.abc import Sequence
from types import ModuleType

import torch
from torch import Tensor

from mergekit_symalign.symmetry import devices
from mergekit_symalign.symmetry.compiled import arrays, bits, loops_for
from mergekit_symalign.symmetry.groups import AxisAction, Permutation
from mergekit_symalign.symmetry.options import Pair
from mergekit_symalign.symmetry.rows import compute_dtype, select_last
from mergekit_symalign.symmetry.threads import in_parallel

_PIECE = 512  # rows, or columns, for one thread
_BLOCK = 1 << 18  # numbers that are held in the compute dtype at once: small enough to stay in the cache

Selection = Tensor | slice


def squared_distance(pair: Pair, rows: Tensor, columns: Tensor) -> Tensor:
    """Squared distance of anchor's ``rows[i]`` and model's ``columns[i]`` over all their coordinates, compute dtype.

    Works through the tensors in the order in which they are stored, a block at a time.
    """
    anchor, model = pair
    if (loops := loops_for(*pair)) is not None:
        return _rows_by_loops(loops, pair, rows, columns)
    if (loops := loops_for(anchor.mT, model.mT)) is not None:
        return _columns_by_loops(loops, (anchor.mT, model.mT), rows, columns)
    piece = _PIECE if devices.on_cpu(rows.device) else max(1, *anchor.shape, len(rows))
    if anchor.stride(0) < anchor.stride(1):  # stored with the neurons last
        at, to = _selection(rows), _selection(columns)
        pieces = list(zip(anchor.mT.split(piece), model.mT.split(piece), strict=True))
        return torch.stack(in_parallel(lambda piece: _of_columns(piece, at, to, len(rows)), pieces, rows.device)).sum(0)
    pieces = list(zip(rows.split(piece), columns.split(piece), strict=True))
    return torch.cat(in_parallel(lambda piece: _of_rows(pair, *piece), pieces, rows.device))


def _rows_by_loops(loops: ModuleType, pair: Pair, rows: Tensor, columns: Tensor) -> Tensor:
    """The same by compiled loops, for matrices that are stored by rows."""
    anchor, model = map(bits, pair)
    found = torch.empty(len(rows))

    def distances(piece: tuple[Tensor, Tensor, Tensor]) -> None:
        at, to, out = arrays(*piece)
        loops.distances_of_rows(anchor, model, at, to, out)

    pieces = zip(*(x.split(_PIECE) for x in (rows, columns, found)), strict=True)
    in_parallel(distances, list(pieces), rows.device)
    return found


def _columns_by_loops(loops: ModuleType, pair: Pair, rows: Tensor, columns: Tensor) -> Tensor:
    """The same for matrices that are stored by columns [coordinates, neurons]."""
    at, to = arrays(rows, columns)
    through = len(rows) == pair[0].shape[1] and all(isinstance(_selection(x), slice) for x in (rows, columns))

    def distances(piece: Pair) -> Tensor:
        anchor, model = map(bits, piece)
        out = torch.zeros(len(rows), dtype=torch.float64)
        if through:
            loops.distances_of_all_columns(anchor, model, *arrays(out))
        else:
            loops.distances_of_columns(anchor, model, at, to, *arrays(out))
        return out

    pieces = list(zip(*(x.split(_PIECE) for x in pair), strict=True))
    return torch.stack(in_parallel(distances, pieces, rows.device)).sum(0).float()


def _of_rows(pair: Pair, rows: Tensor, columns: Tensor) -> Tensor:
    """Squared distances of some rows."""
    anchor, model = pair
    height = min(len(rows), max(1, _block(anchor) // anchor.shape[1]))
    scratch = torch.empty(height, anchor.shape[1], dtype=compute_dtype(anchor.dtype), device=anchor.device)
    found = []
    for at, to in zip(rows.split(height), columns.split(height), strict=True):
        block = scratch.narrow(0, 0, len(at))
        block.copy_(_selected(anchor, _selection(at), 0)).sub_(_selected(model, _selection(to), 0))
        found.append(block.square_().sum(1))
    return torch.cat(found)


def _of_columns(piece: Pair, at: Selection, to: Selection, width: int) -> Tensor:
    """What some coordinates [coordinates, neurons] add to the squared distances."""
    dtype = compute_dtype(piece[0].dtype)
    height = max(1, _block(piece[0]) // max(1, width))
    scratch = torch.empty(height, width, dtype=dtype, device=piece[0].device)
    total = torch.zeros(width, dtype=dtype, device=piece[0].device)
    for a, b in zip(piece[0].split(height), piece[1].split(height), strict=True):
        block = scratch.narrow(0, 0, len(a))
        block.copy_(_selected(a, at, 1)).sub_(_selected(b, to, 1))
        total += block.square_().sum(0)
    return total


def total_distance(pair: Pair, action: AxisAction | None = None) -> float:
    """Squared distance of all of anchor and model [axis, columns], the model moved by ``action``."""
    anchor, model = pair
    rows = torch.arange(len(anchor), device=anchor.device)
    if action is None or isinstance(action, Permutation):
        columns = rows if action is None else action.index.to(anchor.device)
        return float(squared_distance(pair, rows, columns).double().sum())
    dtype, moved = compute_dtype(anchor.dtype), action

    def of_block(block: Pair) -> Tensor:
        a, b = block
        return (moved(b, 0) - a.to(dtype)).square_().sum().double()

    width = max(1, _block(anchor) // len(anchor))
    blocks = list(zip(anchor.split(width, dim=1), model.split(width, dim=1), strict=True))
    return float(torch.stack(in_parallel(of_block, blocks, anchor.device)).sum())


def squared_norm(x: Tensor) -> float:
    """Of all numbers of a tensor, summed in float64."""
    parts = in_parallel(lambda piece: piece.double().square().sum(), _pieces(x, x), x.device)
    return float(torch.stack(parts).sum())


def squared_difference(anchor: Tensor, model: Tensor) -> float:
    """Squared distance of two tensors of one shape, in float64."""
    pairs = list(zip(_pieces(anchor, anchor), _pieces(model, anchor), strict=True))
    parts = in_parallel(lambda pair: (pair[0].double() - pair[1].double()).square().sum(), pairs, anchor.device)
    return float(torch.stack(parts).sum())


def _pieces(x: Tensor, like: Tensor) -> Sequence[Tensor]:
    """Ranges along the axis that is the outermost in how ``like`` is stored."""
    if x.ndim == 0 or x.numel() == 0:
        return (x,)
    dim = max(range(x.ndim), key=lambda i: (x.shape[i] > 1, like.stride(i)))
    return x.split(max(1, _block(x) * x.shape[dim] // x.numel()), dim=dim)


def _block(x: Tensor) -> int:
    """Numbers that are held in the compute dtype at once."""
    return devices.at_once(x.device, _BLOCK)


def _selection(index: Tensor) -> Selection:
    """A slice where the index counts through; other devices are not asked whether it does."""
    if not devices.on_cpu(index.device):
        return index
    first = int(index[0])
    through = torch.arange(first, first + len(index), device=index.device)
    return slice(first, first + len(index)) if torch.equal(index, through) else index


def _selected(x: Tensor, index: Selection, dim: int) -> Tensor:
    """``index_select``, without a copy for a slice."""
    if isinstance(index, slice):
        return x.narrow(dim, index.start, index.stop - index.start)
    return x.index_select(0, index) if dim == 0 else select_last(x, index)
