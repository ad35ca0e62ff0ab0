"""What finding a residual element needs to know of the weights: sums over comparable tensors, a scope at a time.

With every tensor's stream axis first, ``X``, the squared distance of a model to its anchor under an element ``Q`` is
``Σ ‖X_A‖² + ‖X_B‖² − 2 <Q, M>`` with ``M = Σ X_A X_Bᵀ``: one matrix for any number of tensors.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from mergekit_symalign.symmetry.element import BlockElement, TensorAxes
from mergekit_symalign.symmetry.fitting import require_shape
from mergekit_symalign.symmetry.residual.kinds import GAIN, STREAM, ResidualKind, best_element
from mergekit_symalign.symmetry.residual.scope import Scope, Tensors, stream_axes
from mergekit_symalign.symmetry.rows import compute_dtype

_ROUNDING = 64 * torch.finfo(torch.float64).eps  # of the squared norms: what a distance may be off by


@dataclass(frozen=True)
class StreamSums:
    """Sums over the comparable tensors of anchor A and model B.

    Attributes:
        cross: ``M`` [hidden, hidden] of all tensors with a stream axis but gains, float64.
        gains: the same of the gains of norms.
        constant: what the stream does not change: squared norms of those tensors, and squared distances of others.
    """

    cross: Tensor
    gains: Tensor
    constant: float = 0.0

    def __add__(self, other: StreamSums) -> StreamSums:
        return StreamSums(self.cross + other.cross, self.gains + other.gains, self.constant + other.constant)

    def best(self, kind: ResidualKind) -> BlockElement:
        """The element of a kind that brings the model closest."""
        return best_element(kind, self.cross, self.gains)

    def distance(self, element: BlockElement) -> float:
        """Squared distance under an element; 0 for what rounding leaves of one."""
        found = self.constant - 2 * sum(
            _inner(element, axis, m) for axis, m in ((STREAM, self.cross), (GAIN, self.gains))
        )
        return 0.0 if abs(found) <= _ROUNDING * self.constant else found


def _inner(element: BlockElement, axis: str, cross: Tensor) -> float:
    """``<Q, M>``."""
    g = element.actions.get(axis)
    return float((cross if g is None else g.inverse()(cross, 0)).diagonal().sum())


def stream_sums(scope: Scope, anchor: Tensors, model: Tensors, hidden: int) -> StreamSums:
    """Of the tensors of one scope, in comparable form.

    Args:
        scope: of the tensors.
        anchor, model: the tensors, the model's blocks already moved.
        hidden: size of the stream.

    Raises:
        ShapeError: if anchor and model differ in shape.
    """
    sums = _nothing(hidden, anchor)
    constant = 0.0
    for name in anchor:
        axes, a, b = scope.axes[name], anchor[name], model[name]
        require_shape(f"tensor {name} of the model", b, a.shape)
        if stream_axes(axes):
            a, b = rows(a, axes), rows(b, axes)
            (sums.gains if GAIN in axes.names else sums.cross).add_((a @ b.mT).double())
            constant += squared_norm(a) + squared_norm(b)
        else:
            constant += squared_norm(a.double() - b.double())
    return StreamSums(sums.cross, sums.gains, constant)


def sums_in_units(scope: Scope, anchor: Tensors, model: Tensors, hidden: int) -> StreamSums:
    """The same of matrices alone, each in units of its norm: a large one does not drown the others."""
    sums = _nothing(hidden, anchor)
    for name in anchor:
        axes, a, b = scope.axes[name], anchor[name], model[name]
        require_shape(f"tensor {name} of the model", b, a.shape)
        unit = (squared_norm(a) * squared_norm(b)) ** 0.5
        if stream_axes(axes) and a.numel() > hidden and unit > 0:
            sums.cross.add_((rows(a, axes) @ rows(b, axes).mT).double(), alpha=1 / unit)
    return sums


def standing_distance(anchor: Tensors, model: Tensors) -> float:
    """Squared distance of tensors as they are."""
    return sum(squared_norm(x.double() - model[name].double()) for name, x in anchor.items())


def squared_norm(x: Tensor) -> float:
    return float(x.double().square().sum())


def _nothing(hidden: int, like: Tensors) -> StreamSums:
    device = next(iter(like.values())).device
    cross, gains = torch.zeros(2, hidden, hidden, dtype=torch.float64, device=device).unbind()
    return StreamSums(cross, gains)


def rows(x: Tensor, axes: TensorAxes) -> Tensor:
    """A tensor's weights with its stream axis first [hidden, columns], in the compute dtype."""
    weights = axes.read(x)
    dim = next(i for i, axis in enumerate(axes.names) if axis in (STREAM, GAIN))
    return weights.to(compute_dtype(weights.dtype)).movedim(dim, 0).reshape(weights.shape[dim], -1)
