"""Whether an element may be the residual stream's, and what it does there, in numbers that a person can read."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from mergekit_symalign.errors import SymmetryError
from mergekit_symalign.symmetry.admitted import Admitted
from mergekit_symalign.symmetry.element import BlockElement
from mergekit_symalign.symmetry.groups import AxisAction
from mergekit_symalign.symmetry.options import Facts
from mergekit_symalign.symmetry.residual.kinds import GAIN, STREAM, ResidualKind
from mergekit_symalign.symmetry.steps import TOLERANCE, steps_of

_STEPS: Mapping[ResidualKind, tuple[str, ...]] = {
    ResidualKind.none: (),
    ResidualKind.permutation: ("permutation",),
    ResidualKind.signed_permutation: ("permutation", "scaling"),
    ResidualKind.rotation: ("rotation",),
    ResidualKind.mean_keeping_rotation: ("rotation",),
}
_REMEDY = "Solve the alignment again"
_QUANTILES = {f"stream_angle_p{percent}": percent / 100 for percent in (10, 25, 75, 90)}


def require_stream_symmetry(element: BlockElement, kind: ResidualKind, hidden: int) -> None:
    """Refuse what is no change of coordinates of a kind.

    Args:
        element: of the stream; an absent axis is not moved.
        kind: which the architecture admits.
        hidden: size of the stream.

    Raises:
        SymmetryError: naming the axis and the reason.
    """
    for axis, action in element.actions.items():
        kinds = admitted_steps(axis, kind, hidden)
        _require(bool(kinds), axis, f"a {kind.value} does not move it")
        for step in steps_of(action):
            _check_step(axis, step, kinds, hidden)
    q = dense(element.actions.get(STREAM), hidden)
    _require(_near(q.mT @ q, torch.eye(hidden, dtype=q.dtype)), STREAM, "its matrix is not orthogonal")
    if kind is ResidualKind.mean_keeping_rotation:
        ones = torch.ones(hidden, dtype=q.dtype)
        _require(_near(q @ ones, ones), STREAM, "it does not keep the mean, which the norms subtract")
    if not kind.rotates:
        _require(_near(q.abs(), dense(element.actions.get(GAIN), hidden)), GAIN, "gains do not move as the stream does")


def admitted_steps(axis: str, kind: ResidualKind, hidden: int) -> Admitted:
    """The kinds of steps that an axis may have, with the shapes of their numbers; none for other axes."""
    if axis not in (STREAM, GAIN) or (axis == GAIN and kind.rotates):
        return {}
    names = [name for name in _STEPS[kind] if axis == STREAM or name != "scaling"]
    return {name: ((hidden, hidden) if name == "rotation" else (hidden,),) for name in names}


def describe_stream(element: BlockElement, hidden: int) -> Facts:
    """What an element does to the residual stream.

    Returns:
        Of a permutation, how many coordinates moved and changed their sign; of a rotation, quantiles of the angles by
        which it turns its planes, in degrees (every coordinate counts once, so that each plane counts twice).
    """
    q = dense(element.actions.get(STREAM), hidden)
    facts: Facts = {"stream": hidden}
    if all(step.kind == "rotation" for step in steps_of(element.actions.get(STREAM))):
        turned = torch.rad2deg(torch.angle(torch.linalg.eigvals(q)).abs())
        found = {name: float(turned.quantile(share)) for name, share in _QUANTILES.items()}
        return facts | {"stream_angle_median": float(turned.median()), "stream_angle_max": float(turned.max()), **found}
    moved = q.abs().argmax(1) != torch.arange(hidden)
    return facts | {"stream_moved": int(moved.sum()), "signs_flipped": int((q.sum(1) < 0).sum())}


def dense(action: AxisAction | None, hidden: int) -> Tensor:
    """The matrix of an action [hidden, hidden], float64, on the CPU."""
    eye = torch.eye(hidden, dtype=torch.float64)
    return eye if action is None else action(eye, 0)


def _check_step(axis: str, step: AxisAction, kinds: Admitted, hidden: int) -> None:
    _require(step.kind in kinds, axis, f"it cannot have a {step.kind} (only {' or '.join(kinds)})")
    (x,), (wanted,) = step.tensors(), kinds[step.kind]
    _require(tuple(x.shape) == wanted, axis, f"its {step.kind} has shape {tuple(x.shape)}, not {wanted}")
    if step.kind == "permutation":
        whole = not x.is_floating_point() and torch.equal(x.long().sort().values, torch.arange(hidden))
        _require(whole, axis, "its index is not a permutation")
    else:
        _require(bool(x.isfinite().all()), axis, f"its {step.kind} has numbers that are not finite")
    if step.kind == "scaling":
        _require(bool((x.abs() == 1).all()), axis, "it has factors that are no signs")


def _near(x: Tensor, y: Tensor) -> bool:
    return math.isfinite(float(x.sum())) and bool(((x - y).abs() <= TOLERANCE).all())


def _require(holds: bool, axis: str, reason: str) -> None:
    if not holds:
        raise SymmetryError(f"axis {axis}", reason, _REMEDY)
