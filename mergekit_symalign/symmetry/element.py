"""The symmetry of one block: which group element acts on which axis, and the same as plain tensors."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from mergekit_symalign.symmetry.groups import (
    AxisAction,
    Chain,
    HeadMatrix,
    HeadRotation,
    InterleavedPartialRotation,
    InterleavedPlaneRotation,
    Packed,
    PartialRotation,
    Permutation,
    PlaneRotation,
    Rotation,
    Scaling,
)
from mergekit_symalign.symmetry.rows import compute_dtype


@dataclass(frozen=True)
class Fused:
    """Several axes that lie one after another along one stored axis.

    Attributes:
        parts: name and whole length of each.
        groups: how often the sequence is repeated, each time with the next share of every part: 1 for ``[q, k, v]``,
            the number of heads for ``[q₁, k₁, v₁, q₂, …]`` (GPT-NeoX) and of experts for packed expert weights.
    """

    parts: tuple[tuple[str, int], ...]
    groups: int = 1


@dataclass(frozen=True)
class TensorAxes:
    """What the axes of a stored tensor are.

    Attributes:
        names: of each axis, after joining.
        joined: two stored axes ``(i, j)``, ``i < j``, that are one axis of the block (experts and their neurons, heads
            and their coordinates), with the size of the second; None if each stands for itself.
        offset: what is added to the stored numbers to get the weights (1 for gains stored as γ − 1).
    """

    names: tuple[str | Fused, ...]
    joined: tuple[int, int, int] | None = None
    offset: float = 0.0

    def all_names(self) -> set[str]:
        """Every axis, fused ones by their parts."""
        return {name for axis in self.names for name in axis_names(axis)}

    def read(self, stored: Tensor) -> Tensor:
        """The weights, with joined axes joined; in the compute dtype if there is an offset."""
        x = stored.to(compute_dtype(stored.dtype)) + self.offset if self.offset else stored
        if self.joined is None:
            return x
        i, j, _ = self.joined
        return x.movedim(j, i + 1).flatten(i, i + 1)

    def write(self, weights: Tensor) -> Tensor:
        """The inverse of `read`."""
        x = weights - self.offset if self.offset else weights
        if self.joined is None:
            return x
        i, j, size = self.joined
        return x.unflatten(i, (-1, size)).movedim(i + 1, j)


def axis_names(axis: str | Fused) -> set[str]:
    """An axis, or the parts of a fused one."""
    return {axis} if isinstance(axis, str) else {name for name, _ in axis.parts}


_KINDS: dict[str, Any] = {
    cls.kind: cls
    for cls in (
        Permutation,
        Scaling,
        Rotation,
        HeadRotation,
        HeadMatrix,
        PlaneRotation,
        InterleavedPlaneRotation,
        PartialRotation,
        InterleavedPartialRotation,
    )
}


def unpack(packed: Sequence[Mapping[str, Sequence[Tensor]]]) -> AxisAction:
    """The element that ``pack`` wrote."""
    steps = tuple(_KINDS[kind](*numbers) for step in packed for kind, numbers in step.items())
    return steps[0] if len(steps) == 1 else Chain(steps)


@dataclass(frozen=True, eq=False)
class BlockElement:
    """A symmetry of one attention block or MLP: an action for each axis that it moves.

    Attributes:
        actions: by the name of the axis (``query``, ``key``, ``value``, ``attended``, ``gate``, …;
            families/schema.py).
    """

    actions: Mapping[str, AxisAction]

    def __call__(self, x: Tensor, axes: TensorAxes) -> Tensor:
        """Transform a stored tensor.

        Numbers that only change places keep their dtype and their bits. A tensor of which any part is calculated
        comes in the compute dtype, and one that this does not touch comes back as it is.
        """
        if not self.moves(axes):
            return x
        if not self.calculates(axes):
            axes = replace(axes, offset=0.0)
        return acted(x, axes, self.actions)

    def moves(self, axes: TensorAxes) -> list[int]:
        """The dimensions of a tensor, after joining, along which this acts."""
        return [dim for dim, axis in enumerate(axes.names) if self.actions.keys() & axis_names(axis)]

    def calculates(self, axes: TensorAxes) -> bool:
        """Whether a tensor's numbers do more than change places."""
        moved = self.actions.keys() & axes.all_names()
        return not all(self.actions[name].only_reorders for name in moved)

    def inverse(self) -> BlockElement:
        return BlockElement({axis: action.inverse() for axis, action in self.actions.items()})

    def pack(self) -> dict[str, Packed]:
        """As dicts and tuples of tensors only (what a graph task may return)."""
        return {axis: action.pack() for axis, action in self.actions.items()}

    @staticmethod
    def unpack(packed: Mapping[str, Sequence[Mapping[str, Sequence[Tensor]]]]) -> BlockElement:
        return BlockElement({axis: unpack(action) for axis, action in packed.items()})


def acted(x: Tensor, axes: TensorAxes, actions: Mapping[str, Callable[[Tensor, int], Tensor]]) -> Tensor:
    """A stored tensor with what acts on each of its axes applied.

    Args:
        x: the tensor.
        axes: what its axes are.
        actions: by axis, from a tensor and one of its dimensions to the tensor acted upon; other axes stay.
    """
    weights = axes.read(x)
    for dim, axis in enumerate(axes.names):
        weights = _along(weights, dim, axis, actions)
    return axes.write(weights)


def _along(x: Tensor, dim: int, axis: str | Fused, actions: Mapping[str, Callable[[Tensor, int], Tensor]]) -> Tensor:
    if isinstance(axis, str):
        return actions[axis](x, dim) if axis in actions else x
    if not actions.keys() & axis_names(axis):
        return x
    parts = [_along(part, dim, name, actions) for name, part in fused_parts(x, dim, axis).items()]
    return torch.cat([x.unflatten(dim, (axis.groups, -1)) for x in parts], dim=dim + 1).flatten(dim, dim + 1)


def rows_by_axis(x: Tensor, axes: TensorAxes) -> dict[str, Tensor]:
    """The weights of a stored tensor as rows of each of its axes [axis, columns], fused axes taken apart."""
    result = {}
    weights = axes.read(x)
    for dim, axis in enumerate(axes.names):
        rows = weights.movedim(dim, 0).flatten(1) if weights.ndim > 1 else weights.unsqueeze(1)
        result.update({axis: rows} if isinstance(axis, str) else fused_parts(rows, 0, axis))
    return result


def fused_parts(x: Tensor, dim: int, fused: Fused) -> dict[str, Tensor]:
    """A fused axis taken apart: each part of its whole length."""
    grouped = x.unflatten(dim, (fused.groups, -1))
    parts = grouped.split([length // fused.groups for _, length in fused.parts], dim=dim + 1)
    return {name: part.flatten(dim, dim + 1) for part, (name, _) in zip(parts, fused.parts, strict=True)}
