"""Which changes of coordinates the residual stream may undergo, and the best of each kind.

All of them are orthogonal, so whatever reads the stream and whatever writes it carries the same matrix ``Q``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from enum import Enum

import torch
from torch import Tensor

from mergekit_symalign.symmetry.assignment.linear import best_assignment
from mergekit_symalign.symmetry.element import BlockElement
from mergekit_symalign.symmetry.fitting import require_shape, require_square
from mergekit_symalign.symmetry.groups import Chain, Permutation, Rotation, Scaling
from mergekit_symalign.symmetry.heads.joint import towards_identity
from mergekit_symalign.symmetry.heads.polar import polar_factor
from mergekit_symalign.symmetry.threads import one_thread

STREAM, GAIN = "residual", "residual_gain"  # axes: gains of norms move as the stream does, without its signs


class Residual(str, Enum):
    """What a user asks for."""

    none = "none"
    permutation = "permutation"
    rotation = "rotation"


class ResidualKind(str, Enum):
    """What an architecture makes of it."""

    none = "none"
    permutation = "permutation"  # norms that subtract the mean
    signed_permutation = "signed permutation"  # norms that do not
    mean_keeping_rotation = "mean-keeping rotation"  # orthogonal with Q 1 = 1: norms that subtract the mean
    rotation = "rotation"  # any orthogonal matrix

    @property
    def rotates(self) -> bool:
        """Whether gains of norms cannot follow: the anchor's take their place."""
        return self in (ResidualKind.rotation, ResidualKind.mean_keeping_rotation)


def best_element(kind: ResidualKind, cross: Tensor, gains: Tensor | None = None) -> BlockElement:
    """The change of coordinates that brings the model closest to the anchor: it maximises ``<Q, cross>``.

    Args:
        kind: of the matrix.
        cross: ``Σ X_A X_Bᵀ`` [hidden, hidden] over all tensors that have the axis, with that axis first.
        gains: the same of the gains of norms, which have no signs; a permutation sees it, a rotation does not.

    Returns:
        The actions on ``residual`` and, of a permutation, on ``residual_gain``.

    Raises:
        ShapeError: if ``cross`` is not square, or ``gains`` of another shape.

    >>> swapped = torch.tensor([[0.0, -2.0], [1.0, 0.0]])
    >>> found = best_element(ResidualKind.signed_permutation, swapped)
    >>> found.actions["residual"](torch.tensor([3.0, 4.0]), 0).tolist()
    [-4.0, 3.0]
    """
    require_square("cross", cross)
    if gains is not None:
        require_shape("gains", gains, cross.shape)
    return _SOLVERS[kind](cross, torch.zeros_like(cross) if gains is None else gains)


def _nothing(cross: Tensor, gains: Tensor) -> BlockElement:
    return BlockElement({})


def _permutation(cross: Tensor, gains: Tensor) -> BlockElement:
    order = Permutation(best_assignment(cross + gains))
    return BlockElement({STREAM: order, GAIN: order})


def _signed_permutation(cross: Tensor, gains: Tensor) -> BlockElement:
    index = best_assignment(cross.abs() + gains)
    chosen = cross.gather(1, index.unsqueeze(1)).squeeze(1)
    sign = torch.where(chosen < 0, -1.0, 1.0).to(cross.dtype)
    order = Permutation(index)
    return BlockElement({STREAM: Chain((order, Scaling(sign))), GAIN: order})


def _rotation(cross: Tensor, gains: Tensor) -> BlockElement:
    return BlockElement({STREAM: Rotation(_polar(cross))})


def _mean_keeping_rotation(cross: Tensor, gains: Tensor) -> BlockElement:
    """A rotation of what is orthogonal to the mean, in an orthonormal basis of it."""
    basis = centred_basis(len(cross), cross.device).to(cross.dtype)
    inside = basis @ _polar(basis.mT @ cross @ basis) @ basis.mT
    return BlockElement({STREAM: Rotation(inside + torch.full_like(cross, 1 / len(cross)))})


_SOLVERS: Mapping[ResidualKind, Callable[[Tensor, Tensor], BlockElement]] = {
    ResidualKind.none: _nothing,
    ResidualKind.permutation: _permutation,
    ResidualKind.signed_permutation: _signed_permutation,
    ResidualKind.rotation: _rotation,
    ResidualKind.mean_keeping_rotation: _mean_keeping_rotation,
}


def centred_basis(size: int, device: torch.device | None = None) -> Tensor:
    """An orthonormal basis [size, size − 1] of the vectors whose coordinates sum to 0, float64 (Helmert's)."""
    rows = torch.arange(size, dtype=torch.float64, device=device).unsqueeze(1)
    k = torch.arange(1, size, dtype=torch.float64, device=device)
    below = torch.where(rows < k, 1.0, torch.where(rows == k, -k, 0.0))
    return below / torch.sqrt(k * (k + 1))


def _polar(cross: Tensor) -> Tensor:
    """The orthogonal matrix with the largest inner product; where ``cross`` says nothing, near the identity."""
    with one_thread():  # a second thread would wait more than it works
        return polar_factor(towards_identity(cross))
