"""Whether what a kernel is given fits together: shapes always, values where nobody has looked at them yet."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from enum import Enum

from torch import Tensor

from mergekit_symalign.errors import ShapeError, ValueInTensorError
from mergekit_symalign.symmetry.options import BlockShape, HeadShape, LatentShape, MlpShape, Pair, Sides
from mergekit_symalign.symmetry.rows import is_finite

ROWS = "Pass anchor's and model's rows [axis, columns] of one block of two models of one architecture"


class Values(str, Enum):
    """What is known of the numbers that a kernel is given."""

    unknown = "unknown"  # the kernel looks for NaN and infinity
    finite = "finite"  # they were checked where they were read


def require_shape(where: str, x: Tensor, expected: Sequence[int]) -> None:
    """Asks the device for nothing.

    Raises:
        ShapeError: if a tensor has another shape.
    """
    if tuple(x.shape) != tuple(expected):
        raise ShapeError(where, f"the shape is {list(x.shape)}, not {list(expected)}", "Pass tensors that fit together")


def require_square(where: str, x: Tensor) -> None:
    """
    Raises:
        ShapeError: if a tensor is no square matrix.
    """
    require_shape(where, x, (len(x),) * 2 if x.ndim else (1, 1))


def require_pair(where: str, pair: Pair) -> None:
    """
    Raises:
        ShapeError: if anchor and model are not matrices of one shape.
    """
    anchor, model = pair
    if anchor.ndim != 2 or anchor.shape != model.shape:
        reason = f"the anchor's rows are {list(anchor.shape)}, the model's {list(model.shape)}"
        raise ShapeError(where, reason, ROWS)


def require_fitting(sides: Sides, shape: BlockShape) -> None:
    """
    Raises:
        ShapeError: if the shape contradicts itself, or an axis is missing, unknown or of another length.
    """
    lengths = _lengths(shape)
    for axis in lengths:
        if not sides.get(axis):
            raise ShapeError(f"axis {axis}", f"it has no rows, but {shape} needs them", ROWS)
    for axis, pairs in sides.items():
        if axis not in lengths:
            raise ShapeError(f"axis {axis}", f"a block of {shape} has none; it has {', '.join(lengths)}", ROWS)
        for pair in pairs:
            _require_axis(axis, pair, lengths[axis])


def require_finite(sides: Sides) -> None:
    """
    Raises:
        ValueInTensorError: if a row holds NaN or infinity.
    """
    for axis, pairs in sides.items():
        for pair in pairs:
            for name, x in zip(("anchor", "model"), pair, strict=True):
                if not is_finite(x):
                    remedy = "Load this checkpoint again, or leave the block out"
                    raise ValueInTensorError(f"axis {axis} of the {name}", "it holds NaN or infinity", remedy)


def _require_axis(axis: str, pair: Pair, length: int) -> None:
    require_pair(f"axis {axis}", pair)
    if len(pair[0]) != length:
        raise ShapeError(f"axis {axis}", f"it has {len(pair[0])} rows, but the shape says {length}", ROWS)


def _lengths(shape: BlockShape) -> Mapping[str, int]:
    """How many rows each axis of a block has."""
    if isinstance(shape, LatentShape):
        return _latent_lengths(shape)
    return _mlp_lengths(shape) if isinstance(shape, MlpShape) else _head_lengths(shape)


def _latent_lengths(shape: LatentShape) -> Mapping[str, int]:
    counts = {"heads": shape.heads, "nope": shape.nope, "value": shape.value, "kv_latent": shape.kv_latent}
    _require_counts("LatentShape", **counts)
    if shape.rope % 2:
        raise ShapeError("LatentShape", f"{shape.rope} coordinates cannot turn in pairs", "rope is even")
    return shape.lengths()


def _mlp_lengths(shape: MlpShape) -> Mapping[str, int]:
    """How many rows each axis of an MLP has."""
    _require_counts("MlpShape", neurons=shape.neurons, experts=shape.experts, groups=shape.groups)
    if shape.experts % shape.groups:
        reason = f"{shape.experts} experts cannot be in {shape.groups} groups of one size"
        raise ShapeError("MlpShape", reason, "Take the counts from the model's config")
    axes = ("gate", "up", "down") if shape.gated else ("up", "down")
    router = {"expert": shape.experts} if shape.experts > 1 else {}
    return dict.fromkeys(axes, shape.neurons * shape.experts) | router


def _head_lengths(shape: HeadShape) -> Mapping[str, int]:
    """How many rows each axis of an attention block has."""
    _require_counts("HeadShape", query_heads=shape.query_heads, kv_heads=shape.kv_heads, head_dim=shape.head_dim)
    if shape.query_heads % shape.kv_heads:
        reason = f"{shape.query_heads} query heads cannot share {shape.kv_heads} KV heads evenly"
        raise ShapeError("HeadShape", reason, "Take the counts from the model's config")
    if shape.rotary % 2 or not 0 <= shape.rotary <= shape.head_dim:
        reason = f"{shape.rotary} of {shape.head_dim} coordinates cannot turn in pairs"
        raise ShapeError("HeadShape", reason, "rotary is even and at most head_dim")
    lengths = {axis: shape.heads(axis) * shape.head_dim for axis in ("query", "key", "value", "attended")}
    if shape.of_keys:
        del lengths["value"]
    lengths |= {"attended_gate": shape.query_heads * shape.head_dim} if shape.gated else {}
    lengths |= {"query_head": shape.query_heads} if shape.numbered else {}
    return lengths | (_gain_lengths(shape) if shape.qk_norm else {})


def _gain_lengths(shape: HeadShape) -> dict[str, int]:
    heads = (shape.query_heads, shape.kv_heads) if shape.norm.per_head else (1, 1)
    return {axis: n * shape.head_dim for axis, n in zip(("query_gain", "key_gain"), heads, strict=True)}


def _require_counts(where: str, **counts: int) -> None:
    for name, count in counts.items():
        if count < 1:
            raise ShapeError(where, f"{name} is {count}", "Counts are at least 1")
