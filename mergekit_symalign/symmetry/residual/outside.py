"""What lies outside the layers: no block moves it, so one reading gives all that the search needs of it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import reduce
from operator import add

import torch
from torch import Tensor

from mergekit_symalign.symmetry.distance import squared_difference
from mergekit_symalign.symmetry.element import BlockElement
from mergekit_symalign.symmetry.fitting import require_shape
from mergekit_symalign.symmetry.residual.cross import StreamSums, TensorSums, hidden_size, rows
from mergekit_symalign.symmetry.residual.kinds import GAIN, ResidualKind, best_element
from mergekit_symalign.symmetry.residual.move import comparable
from mergekit_symalign.symmetry.residual.pieces import at_range, has_tokens, token_ranges
from mergekit_symalign.symmetry.residual.scope import Scope, Tensors, stream_axes


@dataclass(frozen=True)
class OutsideSums:
    """Embeddings, head and norms of anchor and model.

    Attributes:
        sums: of all tensors.
        standing: squared distance as they stand.
        in_units: ``M`` [hidden, hidden] of matrices alone, each in units of its norm: a large one does not drown the
            others.
    """

    sums: StreamSums
    standing: float
    in_units: Tensor

    def start(self, kind: ResidualKind) -> BlockElement:
        """The stream's element from embeddings and head alone."""
        return best_element(kind, self.in_units)


def outside_sums(scope: Scope, anchor: Tensors, model: Tensors, kind: ResidualKind) -> OutsideSums:
    """Of the tensors outside the layers, a range of tokens at a time.

    Args:
        scope: of the tensors.
        anchor, model: the tensors as stored; rows of embeddings and heads belong to the same tokens.
        kind: of the stream's element.

    Raises:
        ShapeError: if anchor and model differ in shape.
    """
    for name, x in anchor.items():
        require_shape(f"tensor {name} of the model", model[name], x.shape)
    found: dict[str, TensorSums] = {}
    standing = constant = 0.0
    for start, length in token_ranges(scope, anchor):
        a, b = (comparable(scope, at_range(scope, x, start, length), kind) for x in (anchor, model))
        for name in (name for name in a if start == 0 or has_tokens(scope.axes[name])):
            axes, apart = scope.axes[name], squared_difference(a[name], b[name])
            standing += apart
            if not stream_axes(axes):
                constant += apart
                continue
            sums = TensorSums.of_rows(rows(a[name], axes), rows(b[name], axes))
            found[name] = found[name] + sums if name in found else sums
    hidden = hidden_size(scope, anchor)
    matrices = {name: x for name, x in found.items() if anchor[name].numel() > hidden}
    return OutsideSums(_whole(scope, found, constant), standing, _in_units(matrices, hidden))


def _whole(scope: Scope, found: Mapping[str, TensorSums], constant: float) -> StreamSums:
    nothing = torch.zeros_like(next(iter(found.values())).cross)
    gains = [x.cross for name, x in found.items() if GAIN in scope.axes[name].names]
    others = [x.cross for name, x in found.items() if GAIN not in scope.axes[name].names]
    norms = sum(x.anchor + x.model for x in found.values())
    return StreamSums(reduce(add, others, nothing), reduce(add, gains, nothing), constant + norms)


def _in_units(found: Mapping[str, TensorSums], hidden: int) -> Tensor:
    total = torch.zeros(hidden, hidden, dtype=torch.float64)
    for x in found.values():
        if (unit := (x.anchor * x.model) ** 0.5) > 0:
            total = total.to(x.cross.device).add_(x.cross, alpha=1 / unit)
    return total
