"""Statistics of a model under one of its symmetries (SYMMETRIES.md, section 12).

Along an axis on which a weight carries ``g``, the activations (or gradients) carry ``g.dual()``: an input so that
``W x`` stays, a gradient at an output so that ``gᵀ y`` stays. Sums of their outer products move on both sides.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

import torch
from torch import Tensor

from mergekit_symalign.errors import SymmetryError
from mergekit_symalign.symmetry.element import BlockElement, Fused, TensorAxes, axis_names

_FREE = "other"  # an axis that nothing moves


def moved_gram(element: BlockElement, gram: Tensor, axis: str | Fused, experts: str | None = None) -> Tensor:
    """The Gram matrix of what lies along one axis of a weight, after ``element`` was applied to the weight.

    Args:
        element: of the block.
        gram: [n, n], or [n] where only the diagonal is known; with experts [experts, n, n] or [experts, n].
        axis: the weight's axis of length n (experts × n where ``experts`` is "joined").
        experts: None for a single matrix; "apart" where the axis itself is moved by nothing, but the experts change
            places; "joined" where experts and axis move together.

    Raises:
        SymmetryError: if only the diagonal is known, and the element does more than reorder.
    """
    dual = BlockElement({name: action.dual() for name, action in element.actions.items()})
    diagonal = gram.ndim == (1 if experts is None else 2)
    if experts == "apart":
        axes = TensorAxes(("expert", *(_FREE,) * (gram.ndim - 1)))
        return dual(gram, axes).to(gram.dtype)
    if diagonal:
        _require_order(dual, axis)
    if experts is None:
        return dual(gram, TensorAxes((axis,) * gram.ndim))
    joined = TensorAxes((axis,) if diagonal else (axis, _FREE), (0, 1, gram.shape[1]))
    rows = dual(gram, joined)
    if diagonal:
        return rows
    identity = torch.eye(gram.shape[1], dtype=gram.dtype, device=gram.device).expand_as(gram)
    return rows @ dual(identity, joined).to(rows.dtype).mT


def moved_mean(element: BlockElement, mean: Tensor, axis: str | Fused) -> Tensor:
    """The mean [n] of what lies along one axis of a weight, after ``element`` was applied to the weight."""
    dual = BlockElement({name: action.dual() for name, action in element.actions.items()})
    return dual(mean, TensorAxes((axis,)))


def moved_fisher(element: BlockElement, fisher: Tensor, axes: TensorAxes) -> Tensor:
    """The diagonal Fisher information of a tensor after ``element`` was applied to the tensor.

    Raises:
        SymmetryError: if the element does more than reorder.
    """
    for axis in axes.names:
        _require_order(element, axis)
    return element(fisher, replace(axes, offset=0.0))


def only_reorders(element: BlockElement, axes: Iterable[str | Fused]) -> bool:
    """Whether nothing is calculated along these axes."""
    names = {name for axis in axes for name in axis_names(axis)}
    actions = [element.actions[name] for name in names & element.actions.keys()]
    return all(action.simplified().only_reorders or bool(action.is_identity()) for action in actions)


def _require_order(element: BlockElement, axis: str | Fused) -> None:
    if not only_reorders(element, (axis,)):
        raise SymmetryError(
            "statistics of squares",
            "they follow a model only where it is reordered, but the alignment turns or scales it",
            "Use rotation: none and scaling: false; or solve, apply, and measure the aligned model",
        )
