"""Whether an element is a symmetry of its block: applied, the model computes what it computed, up to rounding.

The solvers find such elements only; a file may hold anything. Checked are the kinds of steps that each axis admits,
the shapes and numbers of every step, and then what the axes together have to obey, an absent one being the identity:

- heads move as wholes, and query heads with the KV head of their group;
- general matrices of values are invertible, their condition numbers bounded;
- attended values are read by the inverse transpose of what writes them, keys carry the inverse transpose of queries;
- under a QK-norm queries and keys carry signs, and the gains factors, that both coordinates of a plane share;
- heads that share a latent share the turns of their planes; a latent carries signs and an order that its gains follow,
  or a rotation and gains that its readers take up;
- gate, up and down move the same neurons, experts move as wholes and stay in their groups, and down divides by what up
  is multiplied by.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mergekit_symalign.errors import SymmetryError
from mergekit_symalign.symmetry.admitted import Admitted, admitted, gain_heads
from mergekit_symalign.symmetry.element import BlockElement
from mergekit_symalign.symmetry.groups import AxisAction, Chain, HeadMatrix, Permutation, Rotation, Scaling
from mergekit_symalign.symmetry.heads.solve import GAIN_AXES, HEAD_AXES
from mergekit_symalign.symmetry.options import BlockShape, GainScope, HeadShape, LatentShape, MlpShape, NeuronScale

TOLERANCE = 2e-6  # relative: the largest tolerance of snapping to the identity is 1e-6, on each of two dual axes
LARGEST = 2.0**60  # of factors, and of their inverses: weights and their products stay within float32's range
CONDITION = 1e4  # of general matrices: beyond it, weights in bfloat16 have nothing left of what it shrinks
STEPS = 8  # of one axis; a consensus takes four

_REMEDY = "Solve the alignment again"
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
        _check_latent_heads(element.actions, shape, limits)
        for axis, size in shape.latents().items():
            _check_latent(element.actions, axis, size, limits)
    else:
        _check_heads(element.actions, shape, limits)


def steps_of(action: AxisAction | None) -> Sequence[AxisAction]:
    """The single steps of an action, in order; none of an absent one."""
    if action is None:
        return ()
    return [s for step in action.steps for s in steps_of(step)] if isinstance(action, Chain) else [action]


def _check_steps(axis: str, action: AxisAction, kinds: Admitted) -> None:
    """Every step by itself."""
    steps = steps_of(action)
    _require(bool(kinds), axis, "the block has no such axis")
    _require(0 < len(steps) <= STEPS, axis, f"it has {len(steps)} steps, not 1 to {STEPS}")
    for step in steps:
        _require(step.kind in kinds, axis, f"it cannot have a {step.kind} (only {' or '.join(kinds)})")
        found = tuple(tuple(x.shape) for x in step.tensors())
        _require(found == kinds[step.kind], axis, f"its {step.kind} has shapes {found}, not {kinds[step.kind]}")
        if isinstance(step, Permutation):
            _check_index(axis, step.index)
        else:
            _check_numbers(axis, step)


def _check_index(axis: str, index: Tensor) -> None:
    _require(not index.is_floating_point() and not index.is_complex(), axis, f"its index is of type {index.dtype}")
    known = torch.arange(len(index), device=index.device)
    _require(bool((index.long().sort().values == known).all()), axis, "its index is not a permutation")


def _check_numbers(axis: str, step: AxisAction) -> None:
    for x in step.tensors():
        _require(x.is_floating_point(), axis, f"numbers of its {step.kind} are of type {x.dtype}")
        _require(bool(x.isfinite().all()), axis, f"its {step.kind} has numbers that are not finite")
    for name in _FACTORS:
        factor: Tensor | None = getattr(step, name, None)
        if factor is not None:
            _require(bool((factor != 0).all()), axis, f"its {step.kind} has a factor of 0")
            positive = isinstance(step, Scaling) or bool((factor > 0).all())
            _require(positive, axis, f"its {step.kind} has a negative scale")
    matrix: Tensor | None = getattr(step, "matrix", None)
    if isinstance(step, HeadMatrix):
        condition = torch.linalg.cond(step.matrix.double())
        bounded = bool((condition <= CONDITION).all())
        _require(bounded, axis, f"a matrix of its {step.kind} has a condition number above {CONDITION:.0f}")
    elif matrix is not None:
        exact = matrix.double()
        _require(_is_identity(exact.mT @ exact), axis, f"a matrix of its {step.kind} is not orthogonal")


def _is_identity(x: Tensor) -> bool:
    eye = torch.eye(x.shape[-1], dtype=x.dtype, device=x.device)
    return bool(((x - eye).abs() <= TOLERANCE).all())


@dataclass(frozen=True)
class _Heads:
    """An action on heads: slot ``i`` takes head ``order[i]`` and multiplies it by ``matrix[i]``.

    Attributes:
        order: int64 [heads].
        matrix: float64 [heads, d, d].
    """

    order: Tensor
    matrix: Tensor

    @staticmethod
    def moved_by(action: AxisAction | None, axis: str, heads: int, d: int, largest: float) -> _Heads:
        order, matrix = torch.arange(heads), torch.eye(d, dtype=torch.float64).repeat(heads, 1, 1)
        for step in steps_of(action):
            if isinstance(step, Permutation):
                moved = _order_of_wholes(step.index, heads, axis, "heads")
                order, matrix = order[moved], matrix[moved]
            else:
                matrix = step.transform(matrix.flatten(0, 1)).unflatten(0, (heads, d))
                _check_size(axis, matrix.square().sum(-1).sqrt(), largest)
        return _Heads(order, matrix)


@dataclass(frozen=True)
class _Rows:
    """An action that moves rows and multiplies them: slot ``i`` takes ``factor[i]`` times row ``index[i]``."""

    index: Tensor
    factor: Tensor

    @staticmethod
    def moved_by(action: AxisAction | None, axis: str, size: int, largest: float) -> _Rows:
        index, factor = torch.arange(size), torch.ones(size, dtype=torch.float64)
        for step in steps_of(action):
            if isinstance(step, Permutation):
                moved = step.index.long()
                index, factor = index[moved], factor[moved]
            else:
                factor = step.transform(factor.unsqueeze(1)).squeeze(1)
                _check_size(axis, factor.abs(), largest)
        return _Rows(index, factor)


def _check_size(axis: str, sizes: Tensor, largest: float) -> None:
    inside = bool(((sizes <= largest) & (sizes >= 1 / largest)).all())
    _require(inside, axis, f"it has a factor above {largest:.1e} or below {1 / largest:.1e}")


def _order_of_wholes(index: Tensor, wholes: int, axis: str, what: str) -> Tensor:
    """The order of heads, from an index of their coordinates."""
    parts = index.long().unflatten(0, (wholes, -1))
    d = parts.shape[1]
    order = parts.select(1, 0) // d
    moved = order.unsqueeze(1) * d + torch.arange(d)
    _require(bool((parts == moved).all()), axis, f"it moves parts of {what}, which move as wholes")
    return order


def _check_heads(actions: Mapping[str, AxisAction], shape: HeadShape, largest: Mapping[str, float]) -> None:
    d, group = shape.head_dim, shape.queries_per_kv
    query, key, value, attended = (
        _Heads.moved_by(actions.get(axis), axis, shape.heads(axis), d, largest[axis]) for axis in HEAD_AXES
    )
    _require(bool((key.order == value.order).all()), "key", "its heads are not in the order of the value heads")
    _require(bool((query.order == attended.order).all()), "attended", "its heads are not in the order of the queries")
    of_group = value.order.repeat_interleave(group)
    _require(bool((query.order // group == of_group).all()), "query", "a query head leaves the group of its KV head")
    for wide, narrow, axis, other in ((attended, value, "attended", "value"), (query, key, "key", "query")):
        product = wide.matrix.mT @ narrow.matrix.repeat_interleave(group, dim=0)
        _require(_is_identity(product), axis, f"it is not the inverse transpose of {other}")
    if shape.qk_norm:
        _check_signs(query, shape)
        _check_gains(actions, query.order, key.order, shape, largest)


def _check_latent_heads(actions: Mapping[str, AxisAction], shape: LatentShape, largest: Mapping[str, float]) -> None:
    found = {
        axis: _Heads.moved_by(actions.get(axis), axis, n, d, largest[axis]) for axis, (n, d) in shape.parts().items()
    }
    for axis in ("attended", "q_nope", "k_nope", "q_pe"):
        same = bool((found[axis].order == found["value"].order).all())
        _require(same, axis, "its heads are not in the order of the value heads")
    for axis, other in (("attended", "value"), ("k_nope", "q_nope"), ("k_pe", "q_pe")):
        product = found[other].matrix.mT @ found[axis].matrix
        _require(_is_identity(product), axis, f"it is not the inverse transpose of {other}")


def _check_latent(actions: Mapping[str, AxisAction], axis: str, size: int, largest: Mapping[str, float]) -> None:
    """A signed permutation that the gains follow without signs, or a rotation and gains that the readers take up."""
    written, read = steps_of(actions.get(axis)), steps_of(actions.get(f"{axis}_read"))
    gain = _Rows.moved_by(actions.get(f"{axis}_gain"), f"{axis}_gain", size, largest[f"{axis}_gain"])
    if not any(isinstance(step, Rotation) for step in (*written, *read)):
        own = _Rows.moved_by(actions.get(axis), axis, size, largest[axis])
        of_readers = _Rows.moved_by(actions.get(f"{axis}_read"), f"{axis}_read", size, largest[f"{axis}_read"])
        _require(bool((own.factor.abs() == 1).all()), axis, "behind a norm it may flip signs only")
        same = bool((own.index == of_readers.index).all() & (own.factor == of_readers.factor).all())
        _require(same, f"{axis}_read", f"it does not move as {axis} does")
        follows = bool((gain.index == own.index).all() & (gain.factor == 1).all())
        _require(follows, f"{axis}_gain", f"it is not the order of {axis}")
        return
    turns, own_turns = ([step.matrix for step in steps if isinstance(step, Rotation)] for steps in (read, written))
    single = len(written) == len(own_turns) == len(turns) == 1 and bool((turns[0] == own_turns[0]).all())
    _require(single, f"{axis}_read", f"it is not the one rotation of {axis}")
    unmoved = bool((gain.index == torch.arange(size)).all())
    _require(unmoved, f"{axis}_gain", f"it moves gains, which a rotation of {axis} does not")
    factor = gain.factor.clone()
    for step in read:
        _require(isinstance(step, (Rotation, Scaling)), f"{axis}_read", "beside a rotation it may have factors only")
        if isinstance(step, Scaling):
            _check_size(f"{axis}_read", step.factor.double().abs(), largest[f"{axis}_read"])
            factor = factor * step.factor.double()
    _require(bool(((factor - 1).abs() <= TOLERANCE).all()), f"{axis}_gain", "the readers do not take it up")


def _check_signs(query: _Heads, shape: HeadShape) -> None:
    sign = query.matrix.diagonal(dim1=1, dim2=2)
    _require(bool(((sign.abs() - 1).abs() <= TOLERANCE).all()), "query", "under the norm it may flip signs only")
    _check_planes("query", sign, shape)
    whole = shape.norm is not GainScope.centred or bool((sign.sign() == sign[:, :1].sign()).all())
    _require(whole, "query", "the norm subtracts the mean of a head, whose coordinates have one sign")


def _check_planes(axis: str, factor: Tensor, shape: HeadShape) -> None:
    """Factors [heads, d] must be the same for both coordinates of a rotary plane."""
    first, second = factor[:, shape.planes()].unflatten(1, (2, -1)).unbind(1)
    same = bool(((first - second).abs() <= TOLERANCE * first.abs()).all())
    _require(same, axis, "the two coordinates of a rotary plane have different factors")


def _check_gains(
    actions: Mapping[str, AxisAction], query: Tensor, key: Tensor, shape: HeadShape, largest: Mapping[str, float]
) -> None:
    factors = []
    for axis, order in zip(GAIN_AXES, (query, key), strict=True):
        heads = gain_heads(axis, shape)
        rows = _Rows.moved_by(actions.get(axis), axis, heads * shape.head_dim, largest[axis])
        moved = _order_of_wholes(rows.index, heads, axis, "heads")
        follows = not shape.norm.per_head or bool((moved == order).all())
        _require(follows, axis, f"its heads are not in the order of the {axis.removesuffix('_gain')} heads")
        factors.append(rows.factor.unflatten(0, (heads, -1)))
        _check_planes(axis, factors[-1], shape)
    group = len(factors[0]) // len(factors[1])
    product = factors[0] * factors[1].repeat_interleave(group, dim=0)
    _require(bool(((product - 1).abs() <= TOLERANCE).all()), "key_gain", "it is not the inverse of query_gain")


def _check_mlp(actions: Mapping[str, AxisAction], shape: MlpShape, largest: Mapping[str, float]) -> None:
    size = shape.experts * shape.neurons
    up, down = (_Rows.moved_by(actions.get(axis), axis, size, largest[axis]) for axis in ("up", "down"))
    gate = _Rows.moved_by(actions.get("gate"), "gate", size, LARGEST)
    expert = _Rows.moved_by(actions.get("expert"), "expert", shape.experts, LARGEST)
    _require(bool((down.index == up.index).all()), "down", "its neurons are not in the order of the up rows")
    _require(bool(((up.factor * down.factor - 1).abs() <= TOLERANCE).all()), "down", "it is not the inverse of up")
    if shape.gated or "gate" in actions:
        _require(bool((gate.index == up.index).all()), "gate", "its neurons are not in the order of the up rows")
    positive = shape.scale is not NeuronScale.positive or bool((up.factor > 0).all())
    _require(positive, "up", "with this activation only positive factors keep the function")
    size = shape.experts // shape.groups
    group = expert.index.unflatten(0, (shape.groups, size)) // size
    _require(bool((group == group[:, :1]).all()), "expert", "an expert leaves its group")
    of_expert = expert.index.repeat_interleave(shape.neurons)
    _require(bool((up.index // shape.neurons == of_expert).all()), "up", "a neuron leaves its expert")


def _require(holds: bool, axis: str, reason: str) -> None:
    if not holds:
        raise SymmetryError(f"axis {axis}", reason, _REMEDY)
