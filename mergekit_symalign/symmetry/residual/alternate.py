"""Finding the residual element: from the vocabulary, then in turns with the blocks until the distance stays.

Given the stream's coordinates, the blocks have their optimum (symmetry/blocks.py); given the blocks, the stream has its
own, in closed form from one matrix. Each round reads each layer of both models once and holds no more than one of them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import Tensor

from mergekit_symalign.symmetry.distance import squared_difference
from mergekit_symalign.symmetry.element import BlockElement, rows_by_axis
from mergekit_symalign.symmetry.options import Sides
from mergekit_symalign.symmetry.residual.cross import StreamSums, hidden_size, standing_distance, stream_sums
from mergekit_symalign.symmetry.residual.kinds import STREAM, ResidualKind
from mergekit_symalign.symmetry.residual.move import Elements, comparable, moved_along
from mergekit_symalign.symmetry.residual.outside import outside_sums
from mergekit_symalign.symmetry.residual.scope import Block, Scope, Tensors
from mergekit_symalign.symmetry.solve import align_block, without_identities
from mergekit_symalign.symmetry.threads import one_thread

Read = Callable[[int], tuple[Tensors, Tensors]]  # number of a scope -> its tensors as stored, anchor's and model's

ROUNDS = 10
_UNMOVED = "other"  # an axis that no symmetry moves
_STILL = 1e-9  # relative change of the distance after which rounds end


@dataclass(frozen=True)
class StreamAlignment:
    """What brings a model to its anchor.

    Attributes:
        kind: of ``stream``.
        stream: the change of coordinates of the residual stream.
        blocks: elements of the blocks of each scope.
        distances: squared, of the comparable tensors: as they stand, and after every round. Never rises.
        hidden: size of the stream.
    """

    kind: ResidualKind
    stream: BlockElement
    blocks: tuple[Elements, ...]
    distances: tuple[float, ...]
    hidden: int


@dataclass(frozen=True)
class _Aligned:
    """What one reading of a layer gave: its blocks for a given stream, and sums for the next stream.

    Attributes:
        blocks: their elements.
        sums: under these elements.
        standing: squared distance without any, if that was asked for.
    """

    blocks: Elements
    sums: StreamSums
    standing: float


def align_stream(scopes: Sequence[Scope], read: Read, kind: ResidualKind, rounds: int = ROUNDS) -> StreamAlignment:
    """The change of coordinates of the stream and of all blocks that brings a model close to its anchor, from weights.

    A local optimum: where models have nothing in common, another start may end closer.

    Args:
        scopes: what lies outside the layers, then every layer.
        read: their tensors; called once for the first, and once for each of the others in every round.
        kind: of the stream's element.
        rounds: at most; at least 1.
    """
    outside = outside_sums(scopes[0], *read(0), kind)
    stream = outside.start(kind)
    blocks: tuple[Elements, ...] = ({},) * len(scopes)
    distances: list[float] = []
    for _ in range(rounds):
        sums, found, standing = outside.sums, [blocks[0]], outside.standing
        for i in range(1, len(scopes)):
            layer = _aligned(scopes[i], read(i), kind, (stream, blocks[i]), first=not distances)
            sums, standing = sums + layer.sums, standing + layer.standing
            found.append(layer.blocks)
        after = sums.best(kind)
        distance = sums.distance(after)
        distances = distances or [standing]
        if len(distances) > 1 and distance >= distances[-1] * (1 - _STILL):
            break
        stream, blocks = after, tuple(found)
        distances.append(distance)
    return StreamAlignment(kind, stream, blocks, tuple(distances), len(outside.sums.cross))


def from_vocabulary(outside: Scope, anchor: Tensors, model: Tensors, kind: ResidualKind) -> BlockElement:
    """The stream's element from embeddings and head alone, each in units of its norm.

    Args:
        outside: the scope outside the layers.
        anchor, model: its tensors as stored; rows of embeddings and heads belong to the same tokens.
        kind: of the element.
    """
    return outside_sums(outside, anchor, model, kind).start(kind)


def block_sides(scope: Scope, block: Block, anchor: Tensors, model: Tensors) -> Sides:
    """Rows of every axis of a block, of comparable tensors."""
    sides: dict[str, list[tuple[Tensor, Tensor]]] = {}
    for part in block.parts:
        a, b = (rows_by_axis(x[part], scope.axes[part]) for x in (anchor, model))
        for axis in a.keys() - {STREAM, _UNMOVED}:
            sides.setdefault(axis, []).append((a[axis], b[axis]))
    return sides


def solve_blocks(scope: Scope, anchor: Tensors, model: Tensors, before: Elements) -> Elements:
    """The blocks' elements for tensors whose stream was moved; none is farther than the one it had before."""
    found = {}
    for kind, block in scope.blocks.items():
        with one_thread():
            solved = align_block(block_sides(scope, block, anchor, model), block.shape, block.use)
            new, known = without_identities(solved.element), before.get(kind)
            if known is not None and _left(scope, kind, anchor, model, known) < _left(scope, kind, anchor, model, new):
                new = known
        found[kind] = new
    return found


def _left(scope: Scope, kind: str, anchor: Tensors, model: Tensors, element: BlockElement) -> float:
    """Squared distance of a block under an element, one tensor after the other."""
    return sum(
        squared_difference(
            anchor[part], moved_along(scope, {part: model[part]}, BlockElement({}), {kind: element})[part]
        )
        for part in scope.blocks[kind].parts
    )


def _aligned(
    scope: Scope, both: tuple[Tensors, Tensors], kind: ResidualKind, last: tuple[BlockElement, Elements], *, first: bool
) -> _Aligned:
    """One layer, from its tensors as stored; the model's are brought into comparable form twice, and never kept."""
    stream, before = last
    anchor = comparable(scope, both[0], kind)
    blocks = solve_blocks(scope, anchor, _moved(scope, both[1], kind, stream), before)
    model = comparable(scope, both[1], kind)
    sums = stream_sums(scope, anchor, model, hidden_size(scope, anchor), blocks)
    return _Aligned(blocks, sums, standing_distance(anchor, model) if first else 0.0)


def _moved(scope: Scope, model: Tensors, kind: ResidualKind, stream: BlockElement) -> dict[str, Tensor]:
    """The tensors of the blocks under the stream's element; each is forgotten once it is moved."""
    form = comparable(scope, model, kind)
    parts = [part for block in scope.blocks.values() for part in block.parts]
    return {part: moved_along(scope, {part: form.pop(part)}, stream)[part] for part in parts}
