"""Finding the residual element: from the vocabulary, then in turns with the blocks until the distance stays.

Given the stream's coordinates, the blocks have their optimum (symmetry/blocks.py); given the blocks, the stream has its
own, in closed form from one matrix. Each round reads each scope of both models once and holds no more than one of them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import reduce
from operator import add

from torch import Tensor

from mergekit_symalign.symmetry.element import BlockElement, rows_by_axis
from mergekit_symalign.symmetry.options import Sides
from mergekit_symalign.symmetry.residual.cross import (
    StreamSums,
    rows,
    standing_distance,
    stream_sums,
    sums_in_units,
)
from mergekit_symalign.symmetry.residual.kinds import STREAM, ResidualKind
from mergekit_symalign.symmetry.residual.move import Elements, comparable, moved_along
from mergekit_symalign.symmetry.residual.scope import Block, Scope, Tensors, stream_axes
from mergekit_symalign.symmetry.solve import align_block, without_identities
from mergekit_symalign.symmetry.threads import one_thread

Read = Callable[[int], tuple[Tensors, Tensors]]  # number of a scope -> its tensors as stored, anchor's and model's

ROUNDS = 10
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
class _Round:
    """What one reading of all scopes gave: blocks for a given stream, and sums for the next one."""

    blocks: tuple[Elements, ...]
    sums: StreamSums
    standing: float


def align_stream(scopes: Sequence[Scope], read: Read, kind: ResidualKind, rounds: int = ROUNDS) -> StreamAlignment:
    """The change of coordinates of the stream and of all blocks that brings a model close to its anchor, from weights.

    A local optimum: where models have nothing in common, another start may end closer.

    Args:
        scopes: what lies outside the layers, then every layer.
        read: their tensors; called once for each in every round, and once for the first before.
        kind: of the stream's element.
        rounds: at most; at least 1.
    """
    stream = from_vocabulary(scopes[0], *read(0), kind)
    blocks: tuple[Elements, ...] = ({},) * len(scopes)
    distances: list[float] = []
    for _ in range(rounds):
        found = _round(scopes, read, kind, (stream, blocks))
        after = found.sums.best(kind)
        distance = found.sums.distance(after)
        distances = distances or [found.standing]
        if len(distances) > 1 and distance >= distances[-1] * (1 - _STILL):
            break
        stream, blocks = after, found.blocks
        distances.append(distance)
    return StreamAlignment(kind, stream, blocks, tuple(distances), len(found.sums.cross))


def from_vocabulary(outside: Scope, anchor: Tensors, model: Tensors, kind: ResidualKind) -> BlockElement:
    """The stream's element from embeddings and head alone, each in units of its norm.

    Args:
        outside: the scope outside the layers.
        anchor, model: its tensors as stored; rows of embeddings and heads belong to the same tokens.
        kind: of the element.
    """
    a, b = (comparable(outside, x, kind) for x in (anchor, model))
    return sums_in_units(outside, a, b, hidden_size(outside, anchor)).best(kind)


def hidden_size(scope: Scope, tensors: Tensors) -> int:
    """Size of the stream."""
    name = next(name for name in tensors if stream_axes(scope.axes[name]) == 1)
    return len(rows(tensors[name], scope.axes[name]))


def block_sides(scope: Scope, block: Block, anchor: Tensors, model: Tensors) -> Sides:
    """Rows of every axis of a block, of comparable tensors."""
    sides: dict[str, list[tuple[Tensor, Tensor]]] = {}
    for part in block.parts:
        a, b = (rows_by_axis(x[part], scope.axes[part]) for x in (anchor, model))
        for axis in a.keys() - {STREAM}:
            sides.setdefault(axis, []).append((a[axis], b[axis]))
    return sides


def solve_blocks(scope: Scope, anchor: Tensors, model: Tensors, before: Elements) -> Elements:
    """The blocks' elements for tensors whose stream was moved; none is farther than the one it had before."""
    found = {}
    for kind, block in scope.blocks.items():
        with one_thread():
            solved = align_block(block_sides(scope, block, anchor, model), block.shape, block.use)
        new = without_identities(solved.element)
        parts = {part: model[part] for part in block.parts}

        def distance(element: BlockElement, kind: str = kind, parts: Tensors = parts) -> float:
            return standing_distance(_some(anchor, parts), moved_along(scope, parts, BlockElement({}), {kind: element}))

        known = before.get(kind)
        found[kind] = new if known is None or distance(new) <= distance(known) else known
    return found


def _some(tensors: Tensors, names: Tensors) -> dict[str, Tensor]:
    return {name: tensors[name] for name in names}


def _round(
    scopes: Sequence[Scope],
    read: Read,
    kind: ResidualKind,
    last: tuple[BlockElement, Sequence[Elements]],
) -> _Round:
    stream, before = last
    found: list[tuple[Elements, StreamSums, float]] = []
    for number, scope in enumerate(scopes):
        anchor, model = (comparable(scope, x, kind) for x in read(number))
        blocks = solve_blocks(scope, anchor, moved_along(scope, model, stream), before[number])
        moved = moved_along(scope, model, BlockElement({}), blocks)
        sums = stream_sums(scope, anchor, moved, hidden_size(scope, anchor))
        found.append((blocks, sums, standing_distance(anchor, model)))
    blocks_of, sums_of, standing = zip(*found, strict=True)
    return _Round(blocks_of, reduce(add, sums_of), sum(standing))
