"""What finding a residual element needs to know of the weights: sums over comparable tensors, a scope at a time.

With every tensor's stream axis first, ``X``, the squared distance of a model to its anchor under an element ``Q`` is
``Σ ‖X_A‖² + ‖X_B‖² − 2 <Q, M>`` with ``M = Σ X_A X_Bᵀ``: one matrix for any number of tensors.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from mergekit_symalign.symmetry import devices
from mergekit_symalign.symmetry.distance import squared_difference, squared_norm
from mergekit_symalign.symmetry.element import BlockElement, TensorAxes
from mergekit_symalign.symmetry.fitting import require_shape
from mergekit_symalign.symmetry.residual.kinds import GAIN, STREAM, ResidualKind, best_element
from mergekit_symalign.symmetry.residual.move import Elements, moved_along
from mergekit_symalign.symmetry.residual.scope import Scope, Tensors, stream_axes
from mergekit_symalign.symmetry.rows import compute_dtype
from mergekit_symalign.symmetry.threads import in_parallel

_ROWS = 256  # of a product, for one thread
_COLUMNS = 2048  # that are multiplied at once: sums of more would lose digits in float32
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
            inner(element, axis, m) for axis, m in ((STREAM, self.cross), (GAIN, self.gains))
        )
        return 0.0 if abs(found) <= _ROUNDING * self.constant else found


def inner(element: BlockElement, axis: str, cross: Tensor) -> float:
    """``<Q, M>``, with ``Q`` the element's action on an axis."""
    g = element.actions.get(axis)
    return float((cross if g is None else g.inverse()(cross, 0)).diagonal().sum())


@dataclass(frozen=True)
class TensorSums:
    """Of one tensor of anchor A and model B, or of a range of its tokens.

    Attributes:
        cross: ``X_A X_Bᵀ`` [hidden, hidden], float64.
        anchor, model: squared norms.
    """

    cross: Tensor
    anchor: float
    model: float

    @staticmethod
    def of_rows(anchor: Tensor, model: Tensor) -> TensorSums:
        """Of `rows`."""
        cross = anchor.new_zeros(len(anchor), len(anchor), dtype=torch.float64)
        add_product(cross, anchor, model)
        return TensorSums(cross, squared_norm(anchor.mT), squared_norm(model.mT))

    def __add__(self, other: TensorSums) -> TensorSums:
        return TensorSums(self.cross + other.cross, self.anchor + other.anchor, self.model + other.model)


def stream_sums(
    scope: Scope, anchor: Tensors, model: Tensors, hidden: int, blocks: Elements | None = None
) -> StreamSums:
    """Of the tensors of one scope, in comparable form.

    Args:
        scope: of the tensors.
        anchor, model: the tensors.
        hidden: size of the stream.
        blocks: what moves the model's blocks; one tensor after the other is moved, and forgotten.

    Raises:
        ShapeError: if anchor and model differ in shape.
    """
    sums = _nothing(hidden, anchor)
    constant = 0.0
    for name, a in anchor.items():
        axes, b = scope.axes[name], _in_blocks(scope, name, model[name], blocks)
        require_shape(f"tensor {name} of the model", b, a.shape)
        if stream_axes(axes):
            a, b = rows(a, axes), rows(b, axes)
            add_product(sums.gains if GAIN in axes.names else sums.cross, a, b)
            constant += squared_norm(a.mT) + squared_norm(b.mT)
        else:
            constant += squared_difference(a, b)
    return StreamSums(sums.cross, sums.gains, constant)


def standing_distance(anchor: Tensors, model: Tensors) -> float:
    """Squared distance of tensors as they are."""
    return sum(squared_difference(x, model[name]) for name, x in anchor.items())


def add_product(total: Tensor, anchor: Tensor, model: Tensor) -> None:
    """Add ``A Bᵀ`` to ``total`` [hidden, hidden], float64.

    Products are of the compute dtype, some columns at a time, and in one thread for some rows each.

    Args:
        total: what is added to.
        anchor, model: [hidden, columns].
    """
    few = _ROWS if devices.on_cpu(total.device) else len(total)

    for a, b in zip(anchor.split(_COLUMNS, dim=1), model.split(_COLUMNS, dim=1), strict=True):
        wide = b.to(compute_dtype(b.dtype))

        def add(piece: tuple[Tensor, Tensor], wide: Tensor = wide) -> None:
            to, some = piece
            to.add_(some.to(wide.dtype) @ wide.mT)

        in_parallel(add, list(zip(total.split(few), a.split(few), strict=True)), total.device)


def _in_blocks(scope: Scope, name: str, x: Tensor, blocks: Elements | None) -> Tensor:
    return moved_along(scope, {name: x}, BlockElement({}), blocks)[name] if blocks else x


def _nothing(hidden: int, like: Tensors) -> StreamSums:
    device = next(iter(like.values())).device
    cross, gains = torch.zeros(2, hidden, hidden, dtype=torch.float64, device=device).unbind()
    return StreamSums(cross, gains)


def hidden_size(scope: Scope, tensors: Tensors) -> int:
    """Size of the stream."""
    name = next(name for name in tensors if stream_axes(scope.axes[name]) == 1)
    return len(rows(tensors[name], scope.axes[name]))


def rows(x: Tensor, axes: TensorAxes) -> Tensor:
    """A tensor's weights with its stream axis first [hidden, columns], in their own dtype."""
    weights = axes.read(x)
    dim = next(i for i, axis in enumerate(axes.names) if axis in (STREAM, GAIN))
    return weights.movedim(dim, 0).reshape(weights.shape[dim], -1)
