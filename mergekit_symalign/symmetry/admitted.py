"""What steps the axes of a block may have, and in which shapes: what its architecture admits, as data."""

from __future__ import annotations

from collections.abc import Mapping

from mergekit_symalign.symmetry.groups import (
    HeadMatrix,
    HeadRotation,
    InterleavedPartialRotation,
    InterleavedPlaneRotation,
    PartialRotation,
    Permutation,
    PlaneRotation,
    Rotation,
    Scaling,
)
from mergekit_symalign.symmetry.heads.gated import GATE
from mergekit_symalign.symmetry.heads.solve import GAIN_AXES, NUMBERS
from mergekit_symalign.symmetry.options import (
    VALUES,
    BlockShape,
    HeadShape,
    HeadValues,
    LatentShape,
    MlpShape,
    NeuronScale,
)

Shape = tuple[int, ...]
Admitted = Mapping[str, tuple[Shape, ...]]  # kind of step -> shapes of its numbers


def admitted(axis: str, shape: BlockShape, *, full: bool = False) -> Admitted:
    """The kinds of steps that an axis of a block may have, with the shapes of their numbers; none for other axes.

    Args:
        axis: of an attention block or an MLP.
        shape: of the block.
        full: whether queries and keys may have any orthogonal matrix (``rotation: full``: not exact).
    """
    if isinstance(shape, MlpShape):
        return _admitted_in_mlp(axis, shape)
    if isinstance(shape, LatentShape):
        return _admitted_in_latent(axis, shape)
    size = (shape.heads(axis) * shape.head_dim,)
    if axis == NUMBERS:
        return {Permutation.kind: ((shape.query_heads,),)} if shape.numbered else {}
    order: Admitted = {Permutation.kind: (size,)}
    if axis in GAIN_AXES:
        return _admitted_gains(axis, shape)
    if axis == GATE:
        return {Permutation.kind: (size,)} if shape.gated else {}
    if axis == "value" and shape.of_keys:
        return {}
    if axis in ("value", "attended"):
        return {**order, **_admitted_values(shape.heads(axis), shape)}
    if axis in ("query", "key"):
        return {**order, **_admitted_turns(shape.heads(axis), shape, full=full)}
    return {}


def _admitted_in_latent(axis: str, shape: LatentShape) -> Admitted:
    latent = axis.removesuffix("_gain").removesuffix("_read")
    if (size := shape.latents().get(latent)) is not None:
        turns: Admitted = {} if axis.endswith("_gain") else {Rotation.kind: ((size, size),)}
        return {Permutation.kind: ((size,),), Scaling.kind: ((size,),), **turns}
    heads, d = shape.parts().get(axis, (0, 0))
    order = {Permutation.kind: ((heads * d,),)}
    if axis in ("q_pe", "k_pe"):
        planes = InterleavedPlaneRotation if shape.interleaved else PlaneRotation
        turned = {planes.kind: ((heads, d // 2), (heads, d // 2))}
        return turned if axis == "k_pe" else {**order, **turned}
    general: Admitted = {HeadMatrix.kind: ((heads, d, d),)} if axis in VALUES else {}
    return {**order, HeadRotation.kind: _rotation(heads, d), **general} if heads else {}


def _admitted_values(heads: int, shape: HeadShape) -> Admitted:
    d = shape.head_dim
    if shape.gated or shape.of_keys:
        return {Scaling.kind: ((heads * d,),)}
    general: Admitted = {HeadMatrix.kind: ((heads, d, d),)} if shape.values is HeadValues.free else {}
    return {HeadRotation.kind: _rotation(heads, d), **general}


def _admitted_in_mlp(axis: str, shape: MlpShape) -> Admitted:
    size = (shape.experts * shape.neurons,)
    scaling: Admitted = {} if shape.scale is NeuronScale.none else {Scaling.kind: (size,)}
    of_axis: dict[str, Admitted] = {
        "gate": {Permutation.kind: (size,)},
        "up": {Permutation.kind: (size,), **scaling},
        "down": {Permutation.kind: (size,), **scaling},
        "expert": {Permutation.kind: ((shape.experts,),)} if shape.experts > 1 else {},
    }
    return of_axis.get(axis, {})


def _admitted_gains(axis: str, shape: HeadShape) -> Admitted:
    if not shape.qk_norm:
        return {}
    size = (gain_heads(axis, shape) * shape.head_dim,)
    permutation: Admitted = {Permutation.kind: (size,)} if shape.norm.per_head or shape.reorders else {}
    return {Scaling.kind: (size,), **permutation}


def _admitted_turns(heads: int, shape: HeadShape, *, full: bool) -> Admitted:
    """What queries and keys may carry: the largest group that positions and norms admit."""
    d, r = shape.head_dim, shape.rotary
    if shape.qk_norm:
        return {Scaling.kind: ((heads * d,),)}
    planes = ((heads, r // 2), (heads, r // 2))
    kinds: dict[str, tuple[Shape, ...]] = {}
    if r == d:
        kinds[(InterleavedPlaneRotation if shape.interleaved else PlaneRotation).kind] = planes
    elif r > 0:
        partial = InterleavedPartialRotation if shape.interleaved else PartialRotation
        kinds[partial.kind] = (*planes, *_rotation(heads, d - r))
    if r == 0 or full:
        kinds[HeadRotation.kind] = _rotation(heads, d)
    return kinds


def _rotation(heads: int, d: int) -> tuple[Shape, ...]:
    return ((heads, d, d), (heads,))


def gain_heads(axis: str, shape: HeadShape) -> int:
    """How many heads have gains of their own."""
    if not shape.norm.per_head:
        return 1
    return shape.query_heads if axis == "query_gain" else shape.kv_heads
