"""Whether actions that order the coordinates of heads are exact: under a QK-norm, and of values behind a gate."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from mergekit_symalign.symmetry.admitted import gain_heads
from mergekit_symalign.symmetry.groups import AxisAction
from mergekit_symalign.symmetry.heads.gated import GATE
from mergekit_symalign.symmetry.heads.solve import GAIN_AXES
from mergekit_symalign.symmetry.options import GainScope, HeadShape
from mergekit_symalign.symmetry.steps import TOLERANCE, MovedRows, require


@dataclass(frozen=True)
class _Coordinates:
    """Slot ``h`` takes head ``head[h]``, and its coordinate ``i`` is ``factor[h, i]`` times coordinate ``order[h, i]``.

    Attributes:
        head: int64 [heads].
        order: int64 [heads, d].
        factor: [heads, d].
    """

    head: Tensor
    order: Tensor
    factor: Tensor

    @staticmethod
    def moved_by(action: AxisAction | None, axis: str, heads: int, d: int, largest: float) -> _Coordinates:
        rows = MovedRows.by(action, axis, heads * d, largest)
        of_head, order = (x.unflatten(0, (heads, d)) for x in (rows.index // d, rows.index % d))
        require(bool((of_head == of_head[:, :1]).all()), axis, "it moves parts of heads, which move as wholes")
        return _Coordinates(of_head[:, 0], order, rows.factor.unflatten(0, (heads, d)))


def check_coordinates(
    actions: Mapping[str, AxisAction], shape: HeadShape, largest: Mapping[str, float]
) -> dict[str, Tensor]:
    """The orders of the query heads and of the key heads.

    Args:
        actions: of the block.
        shape: of its heads.
        largest: of the factors of each axis, and of their inverses.

    Raises:
        SymmetryError: if queries, keys and gains do not fit each other or the norm.
    """
    heads = {"query": shape.query_heads, "key": shape.kv_heads} | {axis: gain_heads(axis, shape) for axis in GAIN_AXES}
    found = _moved(actions, heads, shape, largest)
    for axis, moved in found.items():
        _check_planes(axis, moved, shape)
    for axis in ("query", "key"):
        _check_signs(axis, found[axis], shape)
        _check_gains(axis, found[axis], found[f"{axis}_gain"], shape)
    _check_pairs("query", "key", found, "it is not the inverse transpose of query")
    _check_pairs(*GAIN_AXES, found, "it is not the inverse of query_gain")
    return {axis: found[axis].head for axis in ("query", "key")}


def check_gated(actions: Mapping[str, AxisAction], shape: HeadShape, largest: Mapping[str, float]) -> dict[str, Tensor]:
    """The orders of the heads of values and of attended values. Takes and raises what `check_coordinates` does."""
    heads = {axis: shape.heads(axis) for axis in ("value", "attended", GATE)}
    found = _moved(actions, heads, shape, {**largest, GATE: 1.0})
    gate, attended = found[GATE], found["attended"]
    same = bool((gate.head == attended.head).all() and (gate.order == attended.order).all())
    require(same, GATE, "its coordinates are not in the order of the attended ones")
    _check_pairs("attended", "value", found, "it is not the inverse transpose of attended")
    return {axis: found[axis].head for axis in ("value", "attended")}


def check_of_keys(
    actions: Mapping[str, AxisAction], shape: HeadShape, largest: Mapping[str, float]
) -> dict[str, Tensor]:
    """The same where values are what the key rows write. Takes and raises what `check_coordinates` does."""
    own = {**actions, "value": actions["key"]} if "key" in actions else actions
    found = _moved(own, {axis: shape.heads(axis) for axis in ("value", "attended")}, shape, largest)
    _check_pairs("attended", "value", found, "it is not the inverse transpose of attended")
    return {axis: found[axis].head for axis in ("value", "attended")}


def _moved(
    actions: Mapping[str, AxisAction], heads: Mapping[str, int], shape: HeadShape, largest: Mapping[str, float]
) -> dict[str, _Coordinates]:
    d = shape.head_dim
    return {axis: _Coordinates.moved_by(actions.get(axis), axis, n, d, largest[axis]) for axis, n in heads.items()}


def _check_planes(axis: str, found: _Coordinates, shape: HeadShape) -> None:
    """Coordinates that turn stay, and both of a plane have one factor."""
    turning = found.order.new_tensor(shape.planes())
    stays = bool((found.order[:, turning] == turning).all())
    require(stays, axis, "it moves coordinates that turn with the position")
    first, second = found.factor[:, turning].unflatten(1, (2, -1)).unbind(1)
    same = bool(((first - second).abs() <= TOLERANCE * first.abs()).all())
    require(same, axis, "the two coordinates of a rotary plane have different factors")


def _check_signs(axis: str, found: _Coordinates, shape: HeadShape) -> None:
    sign = found.factor
    require(bool(((sign.abs() - 1).abs() <= TOLERANCE).all()), axis, "under the norm it may flip signs only")
    whole = shape.norm is not GainScope.centred or bool((sign.sign() == sign[:, :1].sign()).all())
    require(whole, axis, "the norm subtracts the mean of a head, whose coordinates have one sign")


def _check_gains(axis: str, rows: _Coordinates, gains: _Coordinates, shape: HeadShape) -> None:
    """Each gain stays with the rows that it multiplies; gains that heads share, with the same rows of every head."""
    follows = not shape.norm.per_head or bool((gains.head == rows.head).all())
    require(follows, f"{axis}_gain", f"its heads are not in the order of the {axis} heads")
    same = bool((gains.order == rows.order).all())
    require(same, f"{axis}_gain", f"its coordinates are not in the order of every {axis} head's")


def _check_pairs(wide: str, narrow: str, found: Mapping[str, _Coordinates], reason: str) -> None:
    """The coordinates of a query head stand beside those of its KV head, and carry the inverse factors."""
    one, other = found[wide], found[narrow]
    group = len(one.head) // len(other.head)
    order, factor = (x.repeat_interleave(group, dim=0) for x in (other.order, other.factor))
    same = bool((one.order == order).all())
    require(same, narrow, f"its coordinates are not in the order of the {wide} coordinates")
    require(bool(((one.factor * factor - 1).abs() <= TOLERANCE).all()), narrow, reason)
