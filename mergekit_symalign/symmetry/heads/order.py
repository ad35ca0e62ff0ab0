"""An order of the heads of a block, and which axes it moves."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from mergekit_symalign.symmetry.groups import AxisAction, Permutation, behind
from mergekit_symalign.symmetry.heads.gated import GATE
from mergekit_symalign.symmetry.heads.solve import GAIN_AXES, HEAD_AXES, NUMBERS
from mergekit_symalign.symmetry.options import HeadShape, Pair, Sides


@dataclass(frozen=True)
class HeadOrder:
    """Slot ``i`` of the anchor takes the model's head ``kv[i]`` (``query[i]``).

    Attributes:
        kv: int64 [KV heads].
        query: int64 [query heads].
    """

    kv: Tensor
    query: Tensor

    def of_axis(self, axis: str) -> Tensor:
        """Of the heads that an axis has."""
        return self.kv if axis in ("key", "value", "key_gain") else self.query

    def permutation(self, axis: str, head_dim: int) -> Permutation:
        """The same as a permutation of the coordinates of an axis."""
        order = self.of_axis(axis)
        return Permutation.of_wholes(order, 1 if axis == NUMBERS else head_dim)


def moved_axes(shape: HeadShape) -> tuple[str, ...]:
    """The axes that a permutation of heads moves."""
    heads = tuple(axis for axis in HEAD_AXES if axis != "value" or not shape.of_keys)
    gate = (GATE,) if shape.gated else ()
    return heads + gate + (GAIN_AXES if shape.norm.per_head else ()) + ((NUMBERS,) if shape.numbered else ())


def reordered_gains(sides: Sides, order: HeadOrder, shape: HeadShape) -> dict[str, list[Pair]]:
    """The gains of a QK-norm and the numbers of heads; those that every head has for itself move with the heads."""

    def moved(axis: str, x: Tensor) -> Tensor:
        return order.permutation(axis, shape.head_dim).transform(x) if axis in moved_axes(shape) else x

    return {axis: [(a, moved(axis, b)) for a, b in sides[axis]] for axis in (*GAIN_AXES, NUMBERS) if axis in sides}


def after(order: HeadOrder, actions: dict[str, AxisAction], shape: HeadShape) -> dict[str, AxisAction]:
    """The actions behind the permutation of heads."""
    result = dict(actions)
    for axis in moved_axes(shape):
        result[axis] = behind(order.permutation(axis, shape.head_dim), actions.get(axis))
    return result
