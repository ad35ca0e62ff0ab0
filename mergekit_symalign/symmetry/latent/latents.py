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

READERS = {"kv_latent": ("k_nope", "value"), "q_latent": ("q_nope", "q_pe")}  # axes whose columns are the latent
FLOOR = 1e-2  # of a gain's root mean square: smaller gains are no divisors

_STEPS = 2  # of a rotation, for given heads

Heads = Mapping[str, AxisAction]  # what the axes of heads carry
Latents = Mapping[str, AxisAction]  # by axis: what the rows that write a latent carry, and the columns that read it


def other_readers(sides: Sides, axis: str) -> list[Pair]:
    """What else reads a latent, beside the heads: rows of the latent's axis (an indexer's, DeepSeek V3.2)."""
    wide = sum(sides[reader][0][1].shape[0] for reader in READERS[axis])
    return [(a, b) for a, b in sides[f"{axis}_read"] if b.shape[1] != wide]


def may_rotate(sides: Sides, shape: LatentShape) -> bool:
    """Whether no gain of anchor and model is next to zero: readers are divided by them."""
    gains = (x for axis in shape.latents() for x in gains_of(sides, axis))
    return all(bool((x.abs() > FLOOR * x.square().mean().sqrt()).all()) for x in gains)


def gains_of(sides: Sides, axis: str) -> tuple[Tensor, Tensor]:
    """Anchor's and model's gains of the norm on a latent, in the compute dtype at least float64."""
    anchor, model = sides[f"{axis}_gain"][0]
    return anchor.double().squeeze(1), model.double().squeeze(1)


def with_latents(sides: Sides, shape: LatentShape, latents: Latents) -> Sides:
    """The same with the model's readers moved along."""
    result = dict(sides)
    for axis, action in latents.items():
        for reader in READERS[axis]:
            size = shape.latents()[axis]
            result[reader] = [(a, action(b, 1) if b.shape[1] == size else b) for a, b in sides[reader]]
    return result


def best_signs(sides: Sides, shape: LatentShape, heads: Heads | None) -> Latents:
    """The signed permutation of each latent that brings the model's to the anchor's.

    Args:
        sides: rows of the axes, as stored.
        shape: of the block.
        heads: what the axes of heads carry; if not given, readers are not asked.
    """
    return {
        axis: _signed_permutation(_products(sides, axis, heads), torch.outer(*gains_of(sides, axis)))
        for axis in shape.latents()
    }


def best_turns(sides: Sides, shape: LatentShape, heads: Heads | None, known: Latents | None = None) -> Latents:
    """The rotation of each latent that brings the model's to the anchor's, whose gains the model gets.

    With ``K`` the rows that write the latent, ``R`` those that read it times the gains, and ``W = diag(γ_A)⁻²``,
    minimises ``‖Q K_B − K_A‖² + ‖(R_B Qᵀ − R_A) W^½‖²``. The weights leave no closed form: each step minimises a bound
    that touches the objective where the step starts (``W ≤ max W``), so the objective falls.

    Args:
        sides, shape, heads: as for `best_signs`.
        known: where to start; readers are asked only then.
    """
    found: dict[str, AxisAction] = {}
    for axis in shape.latents():
        written = _written(sides, axis)
        if heads is None or known is None:
            found[axis] = _rotation(written, _norms(sides[axis]))
            continue
        gains = gains_of(sides, axis)
        read = [_times(pair, gains) for pair in _read(sides, axis, heads) if pair[1].shape[1] == len(gains[1])]
        own, cross = (torch.stack([x.double().mT @ b.double() for x, b in of]).sum(0) for of in _with_both(read))
        weight = gains[0].square().reciprocal().unsqueeze(1)
        action, most = known[axis], weight.max()
        for _ in range(_STEPS):
            turned = action(own, 0)
            step = most * turned - weight * (turned - cross)
            action = _rotation(written + step, _norms(sides[axis]) + most * own.diagonal())
        found[axis] = action
    return found


def _with_both(read: Sequence[Pair]) -> tuple[list[Pair], list[Pair]]:
    """The model's readers with themselves, and the anchor's with the model's."""
    return [(b, b) for _, b in read], list(read)


def stored_actions(sides: Sides, latents: Latents, tolerance: float, *, rotate: bool) -> dict[str, AxisAction]:
    """What the axes of the tensors carry as they are stored; nothing for latents that stay.

    Args:
        sides: as stored.
        latents: what was found.
        tolerance: of snapping to the identity.
        rotate: whether readers take up the gains.
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


def _read(sides: Sides, axis: str, heads: Heads) -> list[Pair]:
    of_heads = [
        (a, heads[reader](b, 0) if reader in heads else b) for reader in READERS[axis] for a, b in sides[reader]
    ]
    return [*of_heads, *((a.mT, b.mT) for a, b in other_readers(sides, axis))]


def _products(sides: Sides, axis: str, heads: Heads | None) -> Tensor:
    """``A Bᵀ`` of what writes a latent, and of what reads it if heads are given."""
    read = [] if heads is None else _read(sides, axis, heads)
    written = _written(sides, axis)
    return written + sum(
        (a.double().mT @ b.double() for a, b in read if b.shape[1] == len(written)), torch.zeros_like(written)
    )


def _written(sides: Sides, axis: str) -> Tensor:
    return torch.stack([a.double() @ b.double().mT for a, b in sides[axis]]).sum(0)


def _norms(side: Sequence[Pair]) -> Tensor:
    """Squared norm of each of the model's coordinates."""
    return torch.stack([b.double().square().sum(1) for _, b in side]).sum(0)


def _times(pair: Pair, gains: tuple[Tensor, Tensor]) -> Pair:
    """Readers with the gains inside."""
    (a, b), (anchor, model) = pair, gains
    return a.double() * anchor, b.double() * model


def _rotation(cross: Tensor, norms: Tensor) -> Rotation:
    """The nearest orthogonal matrix; the identity where it saves no more than rounding."""
    one = Moments(cross.unsqueeze(0), norms.unsqueeze(0))
    nothing = Moments(torch.zeros_like(one.cross), torch.zeros_like(one.model))
    return Rotation(align_heads(one, nothing, rotate=True, scale=False).matrix.squeeze(0))


def _signed_permutation(cross: Tensor, gains: Tensor) -> Chain:
    index = best_assignment(cross.abs() + gains)
    chosen = cross.gather(1, index.unsqueeze(1)).squeeze(1)
    return Chain((Permutation(index), Scaling(torch.where(chosen < 0, -1.0, 1.0).to(cross.dtype))))
