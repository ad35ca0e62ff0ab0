"""Embeddings and heads in other coordinates of the residual stream, some tokens at a time."""

from __future__ import annotations

from torch import Tensor

from mergekit_symalign.graph.pieces import PIECE, in_pieces, is_large
from mergekit_symalign.symmetry.element import BlockElement
from mergekit_symalign.symmetry.residual.kinds import ResidualKind
from mergekit_symalign.symmetry.residual.move import Elements, move_scope
from mergekit_symalign.symmetry.residual.pieces import at_range, has_tokens, in_dtype, token_dim
from mergekit_symalign.symmetry.residual.scope import NormWeights, Scope, Tensors
from mergekit_symalign.symmetry.rows import compute_dtype


def moved_tensor(
    name: str,
    scope: Scope,
    tensors: Tensors,
    kind: ResidualKind,
    stream: BlockElement,
    blocks: Elements,
    norms: NormWeights | None,
) -> Tensor:
    """``move_scope(…)[name]``; of large tensors with a row for each token, a range of tokens at a time.

    No number depends on another token's row. Products of some rows may round otherwise than those of all rows.

    Args:
        name: of the tensor that is wanted.
        scope: the tensor, and all that its moved form depends on.
        tensors, kind, stream, blocks, norms: as for `move_scope`.
    """
    x, axes = tensors[name], scope.axes[name]
    largest = max((y for part, y in tensors.items() if has_tokens(scope.axes[part])), key=Tensor.numel, default=None)
    if largest is None or not is_large(largest):
        return move_scope(scope, tensors, kind, stream, blocks, norms)[name]
    if not has_tokens(axes):  # a norm, which does not depend on what reads it
        return move_scope(scope, at_range(scope, tensors, 0, 1), kind, stream, blocks, norms)[name]
    if not (kind.rotates or stream.calculates(axes)):
        return move_scope(scope, tensors, kind, stream, blocks, norms)[name]
    narrow = in_dtype(stream, compute_dtype(x.dtype))

    def moved(start: int, length: int) -> Tensor:
        return move_scope(scope, at_range(scope, tensors, start, length), kind, narrow, blocks, norms)[name]

    most = max(1, PIECE * x.numel() // largest.numel())
    return in_pieces(moved, x.shape, token_dim(axes), most)
