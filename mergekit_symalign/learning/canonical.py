"""An action in its shortest form: first an order of the coordinates, then at most one step that calculates."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from mergekit_symalign.learning.orders import SoftOrder
from mergekit_symalign.symmetry.groups import (
    AxisAction,
    Chain,
    HeadMatrix,
    HeadRotation,
    PartialRotation,
    PerHead,
    Permutation,
    PlaneRotation,
    Rotation,
    Scaling,
)


@dataclass(frozen=True)
class Canonical:
    """What an action does.

    Attributes:
        order: what comes first.
        step: what comes then; None if nothing does.
    """

    order: Permutation
    step: AxisAction | None = None


def canonical(action: AxisAction | None, size: int) -> Canonical:
    """Any chain of steps of one axis as an order and one step.

    Args:
        action: of an axis; None does nothing.
        size: of the axis.
    """
    order, step = torch.arange(size), None
    for one in _steps(action):
        if isinstance(one, SoftOrder):
            one = one.hardened()
        if isinstance(one, Permutation):
            order = order[one.index]
            step = None if step is None else _reordered(step, one.index)
        else:
            step = one if step is None else _product(step, one)
    return Canonical(Permutation(order), step)


def shortest(action: AxisAction) -> AxisAction:
    """The same action as `canonical` gives it."""
    found = canonical(action, action.size)
    return found.order if found.step is None else Chain((found.order, found.step)).simplified()


def _steps(action: AxisAction | None) -> list[AxisAction]:
    if isinstance(action, Chain):
        return [step for one in action.steps for step in _steps(one)]
    return [] if action is None else [action]


def _reordered(step: AxisAction, index: Tensor) -> AxisAction:
    """What does behind an order the same as ``step`` in front of it; heads move as wholes."""
    if isinstance(step, Scaling):
        return Scaling(step.factor[index])
    if isinstance(step, Rotation):
        return Rotation(step.matrix[index][:, index])
    assert isinstance(step, PerHead)
    heads = len(step.tensors()[0])
    order = index.unflatten(0, (heads, -1)).select(1, 0) // (len(index) // heads)
    return type(step)(*(x[order] for x in step.tensors()))


def _product(first: AxisAction, second: AxisAction) -> AxisAction:
    """One step for two, the first one first."""
    if isinstance(first, Scaling) and isinstance(second, Scaling):
        return Scaling(first.factor * second.factor)
    if isinstance(first, Rotation) and isinstance(second, Rotation):
        return Rotation(second.matrix @ first.matrix)
    if isinstance(first, HeadRotation) and isinstance(second, HeadRotation):
        return HeadRotation(second.matrix @ first.matrix, first.scale * second.scale)
    if isinstance(first, (HeadRotation, HeadMatrix)) and isinstance(second, (HeadRotation, HeadMatrix)):
        return HeadMatrix(_matrix(second) @ _matrix(first))
    if isinstance(first, PlaneRotation) and type(first) is type(second):
        return type(first)(first.angle + second.angle, first.scale * second.scale)  # type: ignore[attr-defined]
    if isinstance(first, PartialRotation) and isinstance(second, PartialRotation):
        parts = zip((first.planes, first.rest), (second.planes, second.rest), strict=True)
        planes, rest = (_product(one, other) for one, other in parts)
        return type(first).joining(planes, rest)  # type: ignore[arg-type]
    raise AssertionError(f"{first.kind} and {second.kind} on one axis")


def _matrix(step: HeadRotation | HeadMatrix) -> Tensor:
    return step.matrix * step.scale.reshape(-1, 1, 1) if isinstance(step, HeadRotation) else step.matrix
