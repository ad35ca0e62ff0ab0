"""Large tensors of a scope a piece at a time: what is held beside a layer does not depend on the vocabulary."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from mergekit_symalign.symmetry import devices
from mergekit_symalign.symmetry.element import BlockElement, TensorAxes
from mergekit_symalign.symmetry.groups import Rotation
from mergekit_symalign.symmetry.residual.scope import VOCABULARY, Scope, Tensors
from mergekit_symalign.symmetry.rows import compute_dtype
from mergekit_symalign.symmetry.threads import in_parallel

_NUMBERS = 1 << 23  # of a tensor with a row for each token, that are held in a wider dtype at once
_PIECE = 1 << 20  # of a matrix, for one thread


def token_ranges(scope: Scope, tensors: Tensors) -> Iterator[tuple[int, int]]:
    """Ranges of tokens (start and length) that are worked on at once; all of them where no tensor has tokens."""
    with_tokens = {name: x for name, x in tensors.items() if has_tokens(scope.axes[name])}
    tokens = max((_tokens(scope, name, x) for name, x in with_tokens.items()), default=1)
    widest = max((x.numel() // max(1, _tokens(scope, name, x)) for name, x in with_tokens.items()), default=1)
    step = max(1, _NUMBERS // max(1, widest))
    return ((start, min(step, tokens - start)) for start in range(0, max(1, tokens), step))


def at_range(scope: Scope, tensors: Tensors, start: int, length: int) -> dict[str, Tensor]:
    """The same tensors, those with a row for each token with some of the rows; nothing is copied."""
    return {
        name: x.narrow(token_dim(scope.axes[name]), start, length) if has_tokens(scope.axes[name]) else x
        for name, x in tensors.items()
    }


def has_tokens(axes: TensorAxes) -> bool:
    """Whether a tensor has a row for each token."""
    return VOCABULARY in axes.names


def moved_in_pieces(element: BlockElement, x: Tensor, axes: TensorAxes) -> Tensor:
    """``element(x, axes)``, for large matrices in one thread for each piece.

    Each axis in turn, along ranges of the other one. The result does not depend on the number of threads.
    """
    moved = element.moves(axes)
    if x.ndim != 2 or not devices.on_cpu(x.device) or x.numel() <= _PIECE or axes.joined is not None:
        return element(x, axes)
    if not element.calculates(axes):
        return element(x, axes)
    for dim in moved:
        x = _along(element, x, axes, dim)
    return x


def in_dtype(element: BlockElement, dtype: torch.dtype) -> BlockElement:
    """The same with large matrices in the dtype in which they are used, so that not every piece converts them again."""
    return BlockElement(
        {
            axis: Rotation(action.matrix.to(dtype)) if isinstance(action, Rotation) else action
            for axis, action in element.actions.items()
        }
    )


def _along(element: BlockElement, x: Tensor, axes: TensorAxes, dim: int) -> Tensor:
    only = TensorAxes(tuple(name if i == dim else "" for i, name in enumerate(axes.names)), offset=axes.offset)
    size, dtype = x.shape[1 - dim], compute_dtype(x.dtype)
    step = max(1, _PIECE // x.shape[dim])
    result = torch.empty(x.shape, dtype=dtype, device=x.device)
    once = in_dtype(element, dtype)

    def write(start: int) -> None:
        length = min(step, size - start)
        result.narrow(1 - dim, start, length).copy_(once(x.narrow(1 - dim, start, length), only))

    in_parallel(write, range(0, size, step))
    return result


def token_dim(axes: TensorAxes) -> int:
    """Which axis of a tensor counts tokens."""
    return axes.names.index(VOCABULARY)


def _tokens(scope: Scope, name: str, x: Tensor) -> int:
    return x.shape[token_dim(scope.axes[name])]
