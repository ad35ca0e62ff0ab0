"""Whether what heads with a shared latent carry is exact."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from mergekit_symalign.symmetry.groups import AxisAction, Rotation, Scaling
from mergekit_symalign.symmetry.options import LatentShape
from mergekit_symalign.symmetry.steps import (
    TOLERANCE,
    MovedHeads,
    MovedRows,
    is_identity,
    require,
    require_size,
    steps_of,
)


def check_latent_heads(actions: Mapping[str, AxisAction], shape: LatentShape, largest: Mapping[str, float]) -> None:
    found = {
        axis: MovedHeads.by(actions.get(axis), axis, n, d, largest[axis]) for axis, (n, d) in shape.parts().items()
    }
    for axis in ("attended", "q_nope", "k_nope", "q_pe"):
        same = bool((found[axis].order == found["value"].order).all())
        require(same, axis, "its heads are not in the order of the value heads")
    for axis, other in (("attended", "value"), ("k_nope", "q_nope"), ("k_pe", "q_pe")):
        product = found[other].matrix.mT @ found[axis].matrix
        require(is_identity(product), axis, f"it is not the inverse transpose of {other}")


def check_latent(actions: Mapping[str, AxisAction], axis: str, size: int, largest: Mapping[str, float]) -> None:
    """A signed permutation that the gains follow without signs, or a rotation and gains that the readers take up."""
    written, read = steps_of(actions.get(axis)), steps_of(actions.get(f"{axis}_read"))
    gain = MovedRows.by(actions.get(f"{axis}_gain"), f"{axis}_gain", size, largest[f"{axis}_gain"])
    if not any(isinstance(step, Rotation) for step in (*written, *read)):
        own = MovedRows.by(actions.get(axis), axis, size, largest[axis])
        of_readers = MovedRows.by(actions.get(f"{axis}_read"), f"{axis}_read", size, largest[f"{axis}_read"])
        require(bool((own.factor.abs() == 1).all()), axis, "behind a norm it may flip signs only")
        same = bool((own.index == of_readers.index).all() & (own.factor == of_readers.factor).all())
        require(same, f"{axis}_read", f"it does not move as {axis} does")
        follows = bool((gain.index == own.index).all() & (gain.factor == 1).all())
        require(follows, f"{axis}_gain", f"it is not the order of {axis}")
        return
    turns, own_turns = ([step.matrix for step in steps if isinstance(step, Rotation)] for steps in (read, written))
    single = len(written) == len(own_turns) == len(turns) == 1 and bool((turns[0] == own_turns[0]).all())
    require(single, f"{axis}_read", f"it is not the one rotation of {axis}")
    unmoved = bool((gain.index == torch.arange(size)).all())
    require(unmoved, f"{axis}_gain", f"it moves gains, which a rotation of {axis} does not")
    factor = gain.factor.clone()
    for step in read:
        require(isinstance(step, (Rotation, Scaling)), f"{axis}_read", "beside a rotation it may have factors only")
        if isinstance(step, Scaling):
            require_size(f"{axis}_read", step.factor.double().abs(), largest[f"{axis}_read"])
            factor = factor * step.factor.double()
    require(bool(((factor - 1).abs() <= TOLERANCE).all()), f"{axis}_gain", "the readers do not take it up")
