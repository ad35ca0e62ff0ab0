"""What the checks of elements share: the steps of an action, the rows that it moves, and how they refuse."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mergekit_symalign.errors import SymmetryError
from mergekit_symalign.symmetry.groups import AxisAction, Chain, Permutation

TOLERANCE = 2e-6  # relative: the largest tolerance of snapping to the identity is 1e-6, on each of two dual axes

_REMEDY = "Solve the alignment again"


@dataclass(frozen=True)
class MovedRows:
    """An action that moves rows and multiplies them: slot ``i`` takes ``factor[i]`` times row ``index[i]``."""

    index: Tensor
    factor: Tensor

    @staticmethod
    def by(action: AxisAction | None, axis: str, size: int, largest: float) -> MovedRows:
        """
        Raises:
            SymmetryError: if a factor, or its inverse, is above ``largest``.
        """
        index, factor = torch.arange(size), torch.ones(size, dtype=torch.float64)
        for step in steps_of(action):
            if isinstance(step, Permutation):
                moved = step.index.long()
                index, factor = index[moved], factor[moved]
            else:
                factor = step.transform(factor.unsqueeze(1)).squeeze(1)
                require_size(axis, factor.abs(), largest)
        return MovedRows(index, factor)


def is_identity(x: Tensor) -> bool:
    eye = torch.eye(x.shape[-1], dtype=x.dtype, device=x.device)
    return bool(((x - eye).abs() <= TOLERANCE).all())


@dataclass(frozen=True)
class MovedHeads:
    """An action on heads: slot ``i`` takes head ``order[i]`` and multiplies it by ``matrix[i]``.

    Attributes:
        order: int64 [heads].
        matrix: float64 [heads, d, d].
    """

    order: Tensor
    matrix: Tensor

    @staticmethod
    def by(action: AxisAction | None, axis: str, heads: int, d: int, largest: float) -> MovedHeads:
        order, matrix = torch.arange(heads), torch.eye(d, dtype=torch.float64).repeat(heads, 1, 1)
        for step in steps_of(action):
            if isinstance(step, Permutation):
                moved = _order_of_wholes(step.index, heads, axis, "heads")
                order, matrix = order[moved], matrix[moved]
            else:
                matrix = step.transform(matrix.flatten(0, 1)).unflatten(0, (heads, d))
                require_size(axis, matrix.square().sum(-1).sqrt(), largest)
        return MovedHeads(order, matrix)


def _order_of_wholes(index: Tensor, wholes: int, axis: str, what: str) -> Tensor:
    """The order of heads, from an index of their coordinates."""
    parts = index.long().unflatten(0, (wholes, -1))
    d = parts.shape[1]
    order = parts.select(1, 0) // d
    moved = order.unsqueeze(1) * d + torch.arange(d)
    require(bool((parts == moved).all()), axis, f"it moves parts of {what}, which move as wholes")
    return order


def steps_of(action: AxisAction | None) -> Sequence[AxisAction]:
    """The single steps of an action, in order; none of an absent one."""
    if action is None:
        return ()
    return [s for step in action.steps for s in steps_of(step)] if isinstance(action, Chain) else [action]


def require(holds: bool, axis: str, reason: str) -> None:
    """
    Raises:
        SymmetryError: naming the axis and the reason, if something does not hold.
    """
    if not holds:
        raise SymmetryError(f"axis {axis}", reason, _REMEDY)


def require_size(axis: str, sizes: Tensor, largest: float) -> None:
    """
    Raises:
        SymmetryError: if a factor, or its inverse, is above ``largest``.
    """
    inside = bool(((sizes <= largest) & (sizes >= 1 / largest)).all())
    require(inside, axis, f"it has a factor above {largest:.1e} or below {1 / largest:.1e}")
