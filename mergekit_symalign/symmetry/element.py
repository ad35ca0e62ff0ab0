"""The symmetry of one block: which group element acts on which axis, and the same as plain tensors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mergekit_symalign.symmetry.groups import (
    AxisAction,
    Chain,
    HeadRotation,
    InterleavedPartialRotation,
    InterleavedPlaneRotation,
    Packed,
    PartialRotation,
    Permutation,
    PlaneRotation,
    Scaling,
    compute_dtype,
)

Segments = tuple[tuple[str, int], ...]  # axes that lie one after another along one fused axis, with their lengths
Axes = tuple[str | Segments, ...]

_KINDS: dict[str, Any] = {
    cls.kind: cls
    for cls in (
        Permutation,
        Scaling,
        HeadRotation,
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


def names_of(axes: Axes) -> set[str]:
    """Every axis of a tensor, fused ones by their parts."""
    return {name for axis in axes for name in ([axis] if isinstance(axis, str) else [n for n, _ in axis])}


@dataclass(frozen=True, eq=False)
class BlockElement:
    """A symmetry of one attention block or MLP: an action for each axis that it moves.

    Attributes:
        actions: by the name of the axis (``query``, ``key``, ``value``, ``attended``, ``gate``, …;
            families/schema.py).
    """

    actions: Mapping[str, AxisAction]

    def __call__(self, x: Tensor, axes: Axes, offset: float = 0.0) -> Tensor:
        """Transform a tensor whose axes have these names; untouched tensors come back as they are.

        Args:
            x: the stored tensor.
            axes: the name of each axis, or for a fused axis the names and lengths of its parts.
            offset: what is added to the stored numbers to get the weights (1 for gains stored as γ − 1).
        """
        if not names_of(axes) & self.actions.keys():
            return x
        weights = x.to(compute_dtype(x.dtype)) + offset if offset else x
        for dim, axis in enumerate(axes):
            weights = self._along(weights, dim, axis)
        return weights - offset if offset else weights

    def _along(self, x: Tensor, dim: int, axis: str | Segments) -> Tensor:
        if isinstance(axis, str):
            return self.actions[axis](x, dim) if axis in self.actions else x
        if not self.actions.keys() & {name for name, _ in axis}:
            return x
        x = x.to(compute_dtype(x.dtype))
        parts = x.split([length for _, length in axis], dim=dim)
        return torch.cat([self._along(part, dim, name) for part, (name, _) in zip(parts, axis, strict=True)], dim=dim)

    def inverse(self) -> BlockElement:
        return BlockElement({axis: action.inverse() for axis, action in self.actions.items()})

    def pack(self) -> dict[str, Packed]:
        """As dicts and tuples of tensors only (what a graph task may return)."""
        return {axis: action.pack() for axis, action in self.actions.items()}

    @staticmethod
    def unpack(packed: Mapping[str, Sequence[Mapping[str, Sequence[Tensor]]]]) -> BlockElement:
        return BlockElement({axis: unpack(action) for axis, action in packed.items()})


def rows_by_axis(x: Tensor, axes: Axes, offset: float = 0.0) -> dict[str, Tensor]:
    """The weights of a tensor as rows of each of its axes [axis, columns], fused axes taken apart."""
    result = {}
    weights = x.to(compute_dtype(x.dtype)) + offset if offset else x
    for dim, axis in enumerate(axes):
        rows = weights.movedim(dim, 0).reshape(x.shape[dim], -1)
        if isinstance(axis, str):
            result[axis] = rows
        else:
            parts = rows.split([length for _, length in axis])
            result.update({name: part for part, (name, _) in zip(parts, axis, strict=True)})
    return result
