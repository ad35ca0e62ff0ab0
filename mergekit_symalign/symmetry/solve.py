"""One kernel for every way to align a block: solve, leave out what changes nothing, say what was found."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch

from mergekit_symalign.symmetry.blocks import align_attention, align_mlp
from mergekit_symalign.symmetry.consensus import Rows, find_consensus, require_alike, rows_of_both
from mergekit_symalign.symmetry.describe import describe_block, describe_distances
from mergekit_symalign.symmetry.element import BlockElement
from mergekit_symalign.symmetry.fitting import Values, require_finite, require_fitting
from mergekit_symalign.symmetry.latent.solve import align_latent
from mergekit_symalign.symmetry.options import BlockShape, LatentShape, MlpShape, Sides, Symmetries
from mergekit_symalign.symmetry.solved import Solved

Align = Callable[[Sides], Solved]


def solve_block(
    sides: Sides, shape: BlockShape, use: Symmetries, align: Align | None = None, *, values: Values = Values.unknown
) -> Solved:
    """The symmetry that brings one attention block or MLP of a model closest to the anchor's.

    Args:
        sides: for each axis (families/schema.py) the tensors that have it, anchor's and model's rows [axis, columns].
        shape: of the heads, or of the neurons; it says which kind of block it is.
        use: which symmetries are admitted.
        align: how it is solved, if not from the weights (`align_attention`, `align_mlp`).
        values: whether NaN and infinity have to be looked for.

    Returns:
        The element, without what is the identity, and what docs/files.md says of blocks.

    Raises:
        ShapeError: if rows do not fit the shape.
        ValueInTensorError: if a row holds NaN or infinity.

    >>> import torch
    >>> from mergekit_symalign.symmetry.options import MlpShape, Symmetries
    >>> anchor = {axis: torch.eye(3) for axis in ("gate", "up", "down")}
    >>> sides = {axis: [(x, x[[2, 0, 1]])] for axis, x in anchor.items()}
    >>> solved = solve_block(sides, MlpShape(3), Symmetries())
    >>> solved.element.actions["gate"].index.tolist()
    [1, 2, 0]
    >>> solved.facts["neurons_moved"], solved.facts["distance_after"]
    (3, 0.0)
    """
    require_fitting(sides, shape)
    if values is Values.unknown:
        require_finite(sides)
    return finished((align or partial(align_block, shape=shape, use=use))(sides), sides, shape)


def solve_consensus(models: Sequence[Rows], shape: BlockShape, use: Symmetries) -> list[Solved]:
    """The same for several models at once, towards the mean that they agree on (`find_consensus`).

    Args:
        models: rows of each model, the one whose coordinates the mean has first.
        shape, use: as for `solve_block`.

    Raises:
        ShapeError: if rows do not fit the shape.
    """
    require_alike(models)
    require_fitting(rows_of_both(models[0], models[0]), shape)
    found = find_consensus(models, lambda sides: align_block(sides, shape, use).element)
    facts = {"consensus_rounds": len(found.spread) - 1}
    both = zip(found.elements, models, strict=True)
    return [finished(Solved(element, facts), rows_of_both(models[0], rows), shape) for element, rows in both]


def align_block(sides: Sides, shape: BlockShape, use: Symmetries) -> Solved:
    """From the weights."""
    if isinstance(shape, LatentShape):
        return align_latent(sides, shape, use)
    return align_mlp(sides, shape, use) if isinstance(shape, MlpShape) else align_attention(sides, shape, use)


def finished(solved: Solved, sides: Sides, shape: BlockShape) -> Solved:
    """The same without identities, and with all that is known of it."""
    element = without_identities(solved.element)
    own = describe_block(element, shape)
    known = {"distance_before", "distance_after"} <= solved.facts.keys()
    distances = {} if known else describe_distances(element, sides)
    return Solved(element, {**solved.facts, **distances, **own})


def without_identities(element: BlockElement) -> BlockElement:
    """Leave out actions, and steps of them, that change nothing: what they leave alone passes through bit for bit.

    Asks the device for values, as the assignment and the facts do.
    """
    still = [g.is_identity() for g in element.actions.values()]
    asked = torch.stack(still).tolist() if still else []  # all at once
    moving = {axis: g for (axis, g), is_still in zip(element.actions.items(), asked, strict=True) if not is_still}
    return BlockElement({axis: g.simplified() for axis, g in moving.items()})
