"""Coordinates that all models of a merge agree on, instead of those of one of them.

Every model is aligned to the mean of all, the mean is taken again, and so on: both steps can only lower the sum of
squared distances to the mean. The papers align to one model and leave this open. The base model is never moved: a
consensus is only defined up to one common element, and this choice makes it fit whatever is not aligned.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mergekit_symalign.errors import ShapeError
from mergekit_symalign.symmetry.element import BlockElement
from mergekit_symalign.symmetry.fitting import ROWS
from mergekit_symalign.symmetry.groups import Chain
from mergekit_symalign.symmetry.options import Sides
from mergekit_symalign.symmetry.rows import compute_dtype

ROUNDS = 20
_SETTLED = 1e-7  # relative fall of the sum of squared distances that is not worth another round

Rows = Mapping[str, Sequence[Tensor]]  # axis -> rows [axis, columns] of each tensor that has it


@dataclass(frozen=True)
class Consensus:
    """What a search has come to.

    Attributes:
        elements: one for each model; the identity for the first.
        spread: sum of squared distances to the mean, at the start and after every round; it never rises.
    """

    elements: tuple[BlockElement, ...]
    spread: tuple[float, ...]


def find_consensus(models: Sequence[Rows], align: Callable[[Sides], BlockElement], rounds: int = ROUNDS) -> Consensus:
    """Bring all models to their common mean, in the coordinates of the first.

    Starts from the best of all alignments to a single model, so that the result is never worse than any of those.

    Args:
        models: the rows of one block of every model, the base model first. The order of the others does not matter,
            up to rounding.
        align: the best element for (anchor, model) rows, such as `align_attention` and `align_mlp`.
        rounds: at most so many.

    Raises:
        ShapeError: if there is no model, or models differ in axes or shapes.

    >>> from mergekit_symalign.symmetry.blocks import align_mlp
    >>> from mergekit_symalign.symmetry.options import MlpShape, Symmetries
    >>> models = [{axis: [torch.eye(3)[order]] for axis in ("gate", "up", "down")} for order in ([0, 1, 2], [1, 2, 0])]
    >>> found = find_consensus(models, lambda sides: align_mlp(sides, MlpShape(3), Symmetries()).element)
    >>> found.elements[1].actions["up"].index.tolist(), found.spread[-1]
    ([2, 0, 1], 0.0)
    """
    require_alike(models)
    starts = [_State.at_anchor(models, k, align) for k in range(len(models))]
    state = min(starts, key=lambda start: start.spread)
    spread = [state.spread]
    for _ in range(rounds):
        following = state.improved(models, align)
        if following.spread >= spread[-1] * (1 - _SETTLED):
            break
        state = following
        spread.append(state.spread)
    return Consensus(state.elements, tuple(spread))


@dataclass(frozen=True)
class _State:
    """Elements of all models, the models moved by them, and the mean of these."""

    elements: tuple[BlockElement, ...]
    moved: tuple[Rows, ...]
    mean: Rows
    spread: float

    @staticmethod
    def moved_by(models: Sequence[Rows], elements: Sequence[BlockElement]) -> _State:
        moved = tuple(_moved(rows, element) for rows, element in zip(models, elements, strict=True))
        mean = {axis: [_mean(same) for same in zip(*(m[axis] for m in moved), strict=True)] for axis in moved[0]}
        return _State(tuple(elements), moved, mean, sum(_spread_around(m, mean) for m in moved))

    @staticmethod
    def at_anchor(models: Sequence[Rows], anchor: int, align: Callable[[Sides], BlockElement]) -> _State:
        """All aligned to one of them, then turned so that the first stays where it is."""
        found = [
            BlockElement({}) if i == anchor else align(rows_of_both(models[anchor], m)) for i, m in enumerate(models)
        ]
        back = found[0].inverse()
        return _State.moved_by(models, [BlockElement({}), *(_composed(element, back) for element in found[1:])])

    def improved(self, models: Sequence[Rows], align: Callable[[Sides], BlockElement]) -> _State:
        """Every model but the first aligned to the mean again, where that brings it closer."""
        elements = [self.elements[0]]
        for rows, old, moved in zip(models[1:], self.elements[1:], self.moved[1:], strict=True):
            new = align(rows_of_both(self.mean, rows))
            closer = _spread_around(_moved(rows, new), self.mean) <= _spread_around(moved, self.mean)
            elements.append(new if closer else old)
        return _State.moved_by(models, elements)


def require_alike(models: Sequence[Rows]) -> None:
    """
    Raises:
        ShapeError: if there is no model, or models differ in axes or shapes.
    """
    if not models:
        raise ShapeError("models", "there are none", "Pass the rows of at least one model")
    shapes = [{axis: [x.shape for x in rows] for axis, rows in model.items()} for model in models]
    for number, other in enumerate(shapes):
        if other != shapes[0]:
            raise ShapeError(f"model {number}", f"its rows are {other}, those of the first {shapes[0]}", ROWS)


def rows_of_both(anchor: Rows, model: Rows) -> Sides:
    """The rows of two models, pair by pair."""
    return {axis: list(zip(rows, model[axis], strict=True)) for axis, rows in anchor.items()}


def _moved(rows: Rows, element: BlockElement) -> Rows:
    actions = element.actions
    return {axis: [actions[axis](x, 0) if axis in actions else x for x in same] for axis, same in rows.items()}


def _composed(first: BlockElement, second: BlockElement) -> BlockElement:
    """First the one, then the other."""
    actions = {}
    for axis in first.actions.keys() | second.actions.keys():
        steps = tuple(g.actions[axis] for g in (first, second) if axis in g.actions)
        actions[axis] = steps[0] if len(steps) == 1 else Chain(steps)
    return BlockElement(actions)


def _mean(tensors: Sequence[Tensor]) -> Tensor:
    return torch.stack([x.to(compute_dtype(x.dtype)) for x in tensors]).mean(0)


def _spread_around(a: Rows, b: Rows) -> float:
    """Sum of squares of the difference, in float64."""
    pairs = (pair for axis, rows in a.items() for pair in zip(rows, b[axis], strict=True))
    return sum(float((x.double() - y.double()).square().sum()) for x, y in pairs)
