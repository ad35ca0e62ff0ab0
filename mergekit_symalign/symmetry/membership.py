"""Whether an element is a symmetry of its block: applied, the model computes what it computed, up to rounding.

The solvers find such elements only; a file may hold anything. Checked are the kinds of steps that each axis admits,
the shapes and numbers of every step, and then what the axes together have to obey, an absent one being the identity:

- heads move as wholes, and query heads with the KV head of their group;
- general matrices of values are invertible, their condition numbers bounded;
- attended values are read by the inverse transpose of what writes them, keys carry the inverse transpose of queries;
- values that a gate multiplies carry an order, which the gate follows, and factors; normalised ones no scale;
- under a QK-norm coordinates that turn stay, others may change places within their head; queries and keys carry signs,
  and the gains factors, that both coordinates of a plane share;
- heads that share a latent share the turns of their planes; a latent carries signs and an order that its gains follow,
  or a rotation and gains that its readers take up;
- gate, up and down move the same neurons, experts move as wholes and stay in their groups, and down divides by what up
  is multiplied by.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from mergekit_symalign.symmetry.admitted import Admitted, admitted
from mergekit_symalign.symmetry.coordinates import check_coordinates, check_gated, check_of_keys
from mergekit_symalign.symmetry.element import BlockElement
from mergekit_symalign.symmetry.groups import AxisAction, HeadMatrix, Permutation, Scaling
from mergekit_symalign.symmetry.heads.solve import GAIN_AXES, HEAD_AXES, NUMBERS
from mergekit_symalign.symmetry.latent.membership import check_latent, check_latent_heads
from mergekit_symalign.symmetry.options import BlockShape, HeadShape, HeadValues, LatentShape, MlpShape, NeuronScale
from mergekit_symalign.symmetry.steps import TOLERANCE, MovedHeads, MovedRows, is_identity, require, steps_of

LARGEST = 2.0**60  # of factors, and of their inverses: weights and their products stay within float32's range
CONDITION = 1e4  # of general matrices: beyond it, weights in bfloat16 have nothing left of what it shrinks
STEPS = 8  # of one axis; a consensus takes four

_FACTORS = ("factor", "scale", "plane_scale")


def require_symmetry(
    element: BlockElement,
    shape: BlockShape,
    *,
    full: bool = False,
    largest: Mapping[str, float] | None = None,
) -> None:
    """Refuse what is no symmetry of a block.

    Args:
        element: of the block; its tensors are on the CPU, as those of a file are.
        shape: of the block.
        full: as for `admitted`.
        largest: of the factors of an axis, and of their inverses; `LARGEST` for those that it does not name.

    Raises:
        SymmetryError: naming the axis and the reason.
    """
    for axis, action in element.actions.items():
        _check_steps(axis, action, admitted(axis, shape, full=full))
    own = tuple(shape.lengths()) if isinstance(shape, LatentShape) else (*HEAD_AXES, *GAIN_AXES, "up", "down")
    limits = dict.fromkeys(own, LARGEST) | dict(largest or {})
    if isinstance(shape, MlpShape):
        _check_mlp(element.actions, shape, limits)
    elif isinstance(shape, LatentShape):
        check_latent_heads(element.actions, shape, limits)
        for axis, size in shape.latents().items():
            check_latent(element.actions, axis, size, limits)
    else:
        _check_heads(element.actions, shape, limits)


def _check_steps(axis: str, action: AxisAction, kinds: Admitted) -> None:
    """Every step by itself."""
    steps = steps_of(action)
    require(bool(kinds), axis, "the block has no such axis")
    require(0 < len(steps) <= STEPS, axis, f"it has {len(steps)} steps, not 1 to {STEPS}")
    for step in steps:
        require(step.kind in kinds, axis, f"it cannot have a {step.kind} (only {' or '.join(kinds)})")
        found = tuple(tuple(x.shape) for x in step.tensors())
        require(found == kinds[step.kind], axis, f"its {step.kind} has shapes {found}, not {kinds[step.kind]}")
        if isinstance(step, Permutation):
            _check_index(axis, step.index)
        else:
            _check_numbers(axis, step)


def _check_index(axis: str, index: Tensor) -> None:
    require(not index.is_floating_point() and not index.is_complex(), axis, f"its index is of type {index.dtype}")
    known = torch.arange(len(index), device=index.device)
    require(bool((index.long().sort().values == known).all()), axis, "its index is not a permutation")


def _check_numbers(axis: str, step: AxisAction) -> None:
    for x in step.tensors():
        require(x.is_floating_point(), axis, f"numbers of its {step.kind} are of type {x.dtype}")
        require(bool(x.isfinite().all()), axis, f"its {step.kind} has numbers that are not finite")
    for name in _FACTORS:
        factor: Tensor | None = getattr(step, name, None)
        if factor is not None:
            require(bool((factor != 0).all()), axis, f"its {step.kind} has a factor of 0")
            positive = isinstance(step, Scaling) or bool((factor > 0).all())
            require(positive, axis, f"its {step.kind} has a negative scale")
    matrix: Tensor | None = getattr(step, "matrix", None)
    if isinstance(step, HeadMatrix):
        condition = torch.linalg.cond(step.matrix.double())
        bounded = bool((condition <= CONDITION).all())
        require(bounded, axis, f"a matrix of its {step.kind} has a condition number above {CONDITION:.0f}")
    elif matrix is not None:
        exact = matrix.double()
        require(is_identity(exact.mT @ exact), axis, f"a matrix of its {step.kind} is not orthogonal")


def _check_heads(actions: Mapping[str, AxisAction], shape: HeadShape, largest: Mapping[str, float]) -> None:
    d, group = shape.head_dim, shape.queries_per_kv
    axes = (
        *(() if shape.gated or shape.of_keys else ("value", "attended")),
        *(() if shape.qk_norm else ("query", "key")),
    )
    heads = {axis: MovedHeads.by(actions.get(axis), axis, shape.heads(axis), d, largest[axis]) for axis in axes}
    orders = {axis: found.order for axis, found in heads.items()}
    orders |= check_coordinates(actions, shape, largest) if shape.qk_norm else {}
    orders |= check_gated(actions, shape, largest) if shape.gated else {}
    orders |= check_of_keys(actions, shape, largest) if shape.of_keys else {}
    if shape.values is HeadValues.normed:
        turned = heads["value"].matrix
        require(is_identity(turned.mT @ turned), "value", "values are normalised, and a scale would be lost")
    if shape.unit:
        turned = heads["key"].matrix
        require(is_identity(turned.mT @ turned), "key", "keys are normalised, and a scale would be lost")
    require(bool((orders["key"] == orders["value"]).all()), "key", "its heads are not in the order of the value heads")
    same = bool((orders["query"] == orders["attended"]).all())
    require(same, "attended", "its heads are not in the order of the queries")
    if shape.numbered:
        numbers = MovedRows.by(actions.get(NUMBERS), NUMBERS, shape.query_heads, LARGEST).index
        require(bool((numbers == orders["query"]).all()), NUMBERS, "its numbers are not in the order of the queries")
    if shape.locked:
        still = torch.arange(shape.query_heads)
        require(
            bool((orders["query"] == still).all()), "query", "it moves heads, each of which has its own position bias"
        )
    of_group = orders["value"].repeat_interleave(group)
    require(bool((orders["query"] // group == of_group).all()), "query", "a query head leaves the group of its KV head")
    for wide, narrow in (("attended", "value"), ("query", "key")):
        if wide in heads:
            product = heads[wide].matrix.mT @ heads[narrow].matrix.repeat_interleave(group, dim=0)
            axis, other = (wide, narrow) if wide == "attended" else (narrow, wide)
            require(is_identity(product), axis, f"it is not the inverse transpose of {other}")


def _check_mlp(actions: Mapping[str, AxisAction], shape: MlpShape, largest: Mapping[str, float]) -> None:
    size = shape.experts * shape.neurons
    up, down = (MovedRows.by(actions.get(axis), axis, size, largest[axis]) for axis in ("up", "down"))
    gate = MovedRows.by(actions.get("gate"), "gate", size, LARGEST)
    expert = MovedRows.by(actions.get("expert"), "expert", shape.experts, LARGEST)
    require(bool((down.index == up.index).all()), "down", "its neurons are not in the order of the up rows")
    require(bool(((up.factor * down.factor - 1).abs() <= TOLERANCE).all()), "down", "it is not the inverse of up")
    if shape.gated or "gate" in actions:
        require(bool((gate.index == up.index).all()), "gate", "its neurons are not in the order of the up rows")
    positive = shape.scale is not NeuronScale.positive or bool((up.factor > 0).all())
    require(positive, "up", "with this activation only positive factors keep the function")
    in_group = shape.experts // shape.groups
    group = expert.index.unflatten(0, (shape.groups, in_group)) // in_group
    require(bool((group == group[:, :1]).all()), "expert", "an expert leaves its group")
    of_expert = expert.index.repeat_interleave(shape.neurons)
    require(bool((up.index // shape.neurons == of_expert).all()), "up", "a neuron leaves its expert")
