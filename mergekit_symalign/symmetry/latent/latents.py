"""The latents of multi-head latent attention: their coordinates are free too, as far as their norms let them be.

A latent is normalised (RMSNorm) and multiplied by gains before heads read it. The norm commutes with an orthogonal
matrix and the gains do not, as on the residual stream (docs/symmetries.md). A *signed permutation* takes the gains
along. For *any rotation* the readers take up the gains, and the anchor's gains take their place.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import reduce
from operator import mul

import torch
from torch import Tensor

from mergekit_symalign.symmetry.assignment.linear import best_assignment
from mergekit_symalign.symmetry.groups import AxisAction, Chain, Permutation, Rotation, Scaling
from mergekit_symalign.symmetry.heads.moments import Moments
from mergekit_symalign.symmetry.heads.procrustes import align_heads
from mergekit_symalign.symmetry.options import LatentShape, Pair, Sides
from mergekit_symalign.symmetry.rows import compute_dtype

READERS = {"kv_latent": ("k_nope", "value"), "q_latent": ("q_nope", "q_pe")}  # axes whose columns are the latent
FLOOR = 1e-2  # of a gain's root mean square: smaller gains are no divisors

Latents = Mapping[str, AxisAction]  # by axis: what the rows that write a latent carry, and the columns that read it


def may_rotate(sides: Sides, shape: LatentShape) -> bool:
    """Whether no gain of anchor and model is next to zero: readers are divided by them."""
    gains = (x for axis in shape.latents() for x in gains_of(sides, axis))
    return all(bool((x.abs() > FLOOR * x.square().mean().sqrt()).all()) for x in gains)


def gains_of(sides: Sides, axis: str) -> tuple[Tensor, Tensor]:
    """Anchor's and model's gains of the norm on a latent, in the compute dtype at least float64."""
    anchor, model = sides[f"{axis}_gain"][0]
    return anchor.double().squeeze(1), model.double().squeeze(1)


def folded(sides: Sides, shape: LatentShape) -> Sides:
    """The same with the gains inside the readers' columns."""
    result = dict(sides)
    for axis in shape.latents():
        gains = gains_of(sides, axis)
        for reader in READERS[axis]:
            result[reader] = [_times(pair, gains) for pair in sides[reader]]
    return result


def with_latents(sides: Sides, shape: LatentShape, latents: Latents) -> Sides:
    """The same with the model's readers moved along."""
    result = dict(sides)
    for axis, action in latents.items():
        for reader in READERS[axis]:
            size = shape.latents()[axis]
            result[reader] = [(a, action(b, 1) if b.shape[1] == size else b) for a, b in sides[reader]]
    return result


def best_latents(sides: Sides, shape: LatentShape, heads: Mapping[str, AxisAction] | None, *, rotate: bool) -> Latents:
    """What brings the model's latents to the anchor's.

    Args:
        sides: rows of the axes; `folded` if latents may rotate.
        shape: of the block.
        heads: what the axes of heads carry; if not given, readers are not asked.
        rotate: any rotation, not signed permutations alone.
    """
    found: dict[str, AxisAction] = {}
    for axis, size in shape.latents().items():
        written = [(a, b) for a, b in sides[axis]]
        read = [pair for pair in _read(sides, axis, heads) if pair[1].shape[1] == size] if heads is not None else []
        parts = [_product(*pair) for pair in written] + [_product(a.mT, b.mT) for a, b in read]
        cross = torch.stack(parts).sum(0)
        if rotate:
            norms = sum(_norm(b) for _, b in written) + sum((_norm(b.mT) for _, b in read), torch.zeros(()))
            found[axis] = _rotation(cross, norms)
        else:
            found[axis] = _signed_permutation(cross, torch.outer(*gains_of(sides, axis)))
    return found


def stored_actions(sides: Sides, latents: Latents, tolerance: float, *, rotate: bool) -> dict[str, AxisAction]:
    """What the axes of the tensors carry as they are stored; nothing for latents that stay.

    Args:
        sides: as stored.
        latents: what was found.
        tolerance: of snapping to the identity.
        rotate: whether `latents` are of folded readers.
    """
    actions: dict[str, AxisAction] = {}
    for axis, found in latents.items():
        action = found.snapped(tolerance)
        if bool(action.is_identity()):
            continue
        gain: AxisAction = action.steps[0] if isinstance(action, Chain) else action
        read = action
        if rotate:
            anchor, model = gains_of(sides, axis)
            gain = Scaling(anchor / model)
            read = Chain((Scaling(model), action, Scaling(1 / anchor)))
        actions |= {axis: action, f"{axis}_gain": gain, f"{axis}_read": read}
    return actions


def gains_taken_up(actions: Mapping[str, AxisAction]) -> dict[str, Tensor]:
    """The gains that readers of rotated latents take up: those that the model must have, by the axis of the gains."""
    found: dict[str, Tensor] = {}
    for axis in READERS:
        read = actions.get(f"{axis}_read")
        steps = read.steps if isinstance(read, Chain) else (read,)
        turn = next((i for i, step in enumerate(steps) if isinstance(step, Rotation)), None)
        if turn is not None:
            size = steps[turn].size  # type: ignore[union-attr]
            factors = (step.factor.double() for step in steps[:turn] if isinstance(step, Scaling))
            found[f"{axis}_gain"] = reduce(mul, factors, torch.ones(size, dtype=torch.float64))
    return found


def are_same(one: Latents, other: Latents, tolerance: float) -> bool:
    """Whether two rounds have found the same, up to rounding."""
    if one.keys() != other.keys():
        return False
    parts = ((x, y) for axis in one for x, y in zip(_numbers(one[axis]), _numbers(other[axis]), strict=True))
    return all(bool(((x - y).abs() <= tolerance).all()) for x, y in parts)


def _numbers(action: AxisAction) -> Sequence[Tensor]:
    return [x for step in (action.steps if isinstance(action, Chain) else (action,)) for x in step.tensors()]


def _read(sides: Sides, axis: str, heads: Mapping[str, AxisAction]) -> list[Pair]:
    return [(a, heads[reader](b, 0) if reader in heads else b) for reader in READERS[axis] for a, b in sides[reader]]


def _times(pair: Pair, gains: tuple[Tensor, Tensor]) -> Pair:
    anchor, model = (
        x * gain.to(compute_dtype(x.dtype)) if x.shape[1] == len(gain) else x
        for x, gain in zip(pair, gains, strict=True)
    )
    return anchor, model


def _product(a: Tensor, b: Tensor) -> Tensor:
    return a.double() @ b.double().mT


def _norm(x: Tensor) -> Tensor:
    return x.double().square().sum(1)


def _rotation(cross: Tensor, norms: Tensor) -> Rotation:
    """The nearest orthogonal matrix; the identity where it saves no more than rounding."""
    one = Moments(cross.unsqueeze(0), norms.unsqueeze(0))
    nothing = Moments(torch.zeros_like(one.cross), torch.zeros_like(one.model))
    return Rotation(align_heads(one, nothing, rotate=True, scale=False).matrix.squeeze(0))


def _signed_permutation(cross: Tensor, gains: Tensor) -> Chain:
    index = best_assignment(cross.abs() + gains)
    chosen = cross.gather(1, index.unsqueeze(1)).squeeze(1)
    return Chain((Permutation(index), Scaling(torch.where(chosen < 0, -1.0, 1.0).to(cross.dtype))))
