"""The symmetry of one block: which group element acts on which axis, and the same as plain tensors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from mergekit_symalign.symmetry.groups import (
    AxisAction,
    Chain,
    HeadRotation,
    Packed,
    Permutation,
    PlaneRotation,
    Scaling,
)

_KINDS = {cls.kind: cls for cls in (Permutation, Scaling, HeadRotation, PlaneRotation)}


def unpack(packed: Mapping[str, Sequence[Tensor]]) -> AxisAction:
    """The element that ``pack`` wrote."""
    steps = tuple(_KINDS[kind](*numbers) for kind, numbers in packed.items())
    return steps[0] if len(steps) == 1 else Chain(steps)


@dataclass(frozen=True, eq=False)
class BlockElement:
    """A symmetry of one attention block or MLP: an action for each axis that it moves.

    Attributes:
        actions: by the name of the axis (``query``, ``key``, ``value``, ``attended``, ``gate``, …; families/schema.py).
    """

    actions: Mapping[str, AxisAction]

    def touches(self, axes: Sequence[str]) -> bool:
        """Whether a tensor with these axes changes at all."""
        return any(axis in self.actions for axis in axes)

    def __call__(self, x: Tensor, axes: Sequence[str]) -> Tensor:
        """Transform a tensor whose axes have these names; untouched tensors come back as they are."""
        for dim, axis in enumerate(axes):
            if axis in self.actions:
                x = self.actions[axis](x, dim)
        return x

    def inverse(self) -> BlockElement:
        return BlockElement({axis: action.inverse() for axis, action in self.actions.items()})

    def pack(self) -> dict[str, Packed]:
        """As dicts and tuples of tensors only (what a graph task may return)."""
        return {axis: action.pack() for axis, action in self.actions.items()}

    @staticmethod
    def unpack(packed: Mapping[str, Mapping[str, Sequence[Tensor]]]) -> BlockElement:
        return BlockElement({axis: unpack(action) for axis, action in packed.items()})
