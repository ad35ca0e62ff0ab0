"""A model's tensors in other coordinates of the residual stream, and of its blocks."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from mergekit_symalign.symmetry.element import BlockElement
from mergekit_symalign.symmetry.residual.kinds import ResidualKind
from mergekit_symalign.symmetry.residual.pieces import moved_in_pieces
from mergekit_symalign.symmetry.residual.scope import NormWeights, Scope, Tensors, folded, stream_axes, unfolded

Elements = Mapping[str, BlockElement]  # of the blocks of a scope, by kind


def move_scope(
    scope: Scope,
    tensors: Tensors,
    kind: ResidualKind,
    stream: BlockElement,
    blocks: Elements | None = None,
    norms: NormWeights | None = None,
) -> dict[str, Tensor]:
    """A layer, or what lies outside the layers, in other coordinates: it computes the same there.

    Args:
        scope: of the tensors.
        tensors: as stored.
        kind: of ``stream``.
        stream: the change of coordinates of the stream.
        blocks: elements of the scope's blocks.
        norms: what the norms shall be (`norms_of` the anchor); a rotation needs them, a permutation does not ask.
    """
    if not kind.rotates:
        return moved_along(scope, tensors, stream, blocks)
    return unfolded(scope, moved_along(scope, folded(scope, tensors), stream, blocks), norms or {})


def comparable(scope: Scope, tensors: Tensors, kind: ResidualKind) -> dict[str, Tensor]:
    """The tensors by which models are compared, in the form for it: folded where the stream may turn.

    Two kinds move along and do not count: transforms of the stream onto itself, as heads of encoders have them, and
    biases of norms in units of their gains, which a gain next to zero makes as large as you please.
    """
    biases = {norm.bias for norm in scope.norms} if kind.rotates else set()
    form = folded(scope, tensors) if kind.rotates else tensors
    return {name: x for name, x in form.items() if stream_axes(scope.axes[name]) < 2 and name not in biases}


def moved_along(
    scope: Scope, tensors: Tensors, stream: BlockElement, blocks: Elements | None = None
) -> dict[str, Tensor]:
    """Tensors under the stream's element and those of blocks, their norms left alone."""
    element = {part: element for kind, element in (blocks or {}).items() for part in scope.blocks[kind].parts}
    return {
        name: moved_in_pieces(
            BlockElement({**stream.actions, **(element[name].actions if name in element else {})}), x, scope.axes[name]
        )
        for name, x in tensors.items()
    }
