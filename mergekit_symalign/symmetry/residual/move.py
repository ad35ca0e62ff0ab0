"""A model's tensors in other coordinates of the residual stream, and of its blocks."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from mergekit_symalign.symmetry.element import BlockElement
from mergekit_symalign.symmetry.residual.kinds import ResidualKind
from mergekit_symalign.symmetry.residual.scope import NormWeights, Scope, Tensors, folded, unfolded

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
    moved = moved_along(scope, comparable(scope, tensors, kind), stream, blocks)
    return unfolded(scope, moved, norms or {}) if kind.rotates else moved


def comparable(scope: Scope, tensors: Tensors, kind: ResidualKind) -> dict[str, Tensor]:
    """Tensors in the form in which models are compared: folded where the stream may turn."""
    return folded(scope, tensors) if kind.rotates else dict(tensors)


def moved_along(
    scope: Scope, tensors: Tensors, stream: BlockElement, blocks: Elements | None = None
) -> dict[str, Tensor]:
    """Comparable tensors under the stream's element and those of blocks."""
    element = {part: element for kind, element in (blocks or {}).items() for part in scope.blocks[kind].parts}
    return {
        name: BlockElement({**stream.actions, **(element[name].actions if name in element else {})})(
            x, scope.axes[name]
        )
        for name, x in tensors.items()
    }
