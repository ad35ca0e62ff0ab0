"""Cross-covariances of anchor and model along one axis (docs/activations.md).

Whatever the solvers ask of rows is a product over columns. `Covariance` holds those products, so rows need not be kept:
the columns may be the tokens of a calibration set that streams by.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import reduce
from operator import add

import torch
from torch import Tensor

from mergekit_symalign.errors import ShapeError
from mergekit_symalign.symmetry.fitting import require_shape
from mergekit_symalign.symmetry.groups import Permutation
from mergekit_symalign.symmetry.heads.moments import Moments
from mergekit_symalign.symmetry.options import Pair
from mergekit_symalign.symmetry.rows import compute_dtype

BY_ACTIVATIONS = {"objective": "activations"}  # what is known of such a solve
TOLERANCE = 1e-6  # below this an angle or a factor's distance from 1 is rounding of sums in float32


@dataclass(frozen=True)
class Covariance:
    """Products of one axis over all columns (tokens, or the columns of weights).

    Attributes:
        cross: [n, n], ``A Bᵀ``.
        anchor: [n], squared norm of each of the anchor's coordinates.
        model: [n], the same of the model's.

    Raises:
        ShapeError: if they do not fit together.
    """

    cross: Tensor
    anchor: Tensor
    model: Tensor

    def __post_init__(self) -> None:
        n = len(self.anchor)
        for name, shape in (("anchor", (n,)), ("model", (n,)), ("cross", (n, n))):
            require_shape(f"{name} of Covariance", getattr(self, name), shape)

    @staticmethod
    def of_rows(side: Sequence[Pair]) -> Covariance:
        """Of matrices with this axis first, anchor's and model's [n, columns] each."""

        def of_pair(anchor: Tensor, model: Tensor) -> Covariance:
            a, b = (x.to(compute_dtype(x.dtype)) for x in (anchor, model))
            return Covariance((a @ b.mT).double(), a.double().square().sum(-1), b.double().square().sum(-1))

        return reduce(add, (of_pair(*pair) for pair in side))

    def __add__(self, other: Covariance) -> Covariance:
        return Covariance(self.cross + other.cross, self.anchor + other.anchor, self.model + other.model)

    def scaled(self, anchor: Tensor, model: Tensor) -> Covariance:
        """With every coordinate in units of its own, [n] each."""
        cross = self.cross * anchor.unsqueeze(1) * model
        return Covariance(cross, self.anchor * anchor.square(), self.model * model.square())

    def reordered(self, permutation: Permutation) -> Covariance:
        """With the model's coordinates in another order."""
        return Covariance(self.cross.index_select(1, permutation.index), self.anchor, permutation.transform(self.model))

    def by_head(self, heads: int) -> Tensor:
        """Blocks of ``A Bᵀ`` of every pair of heads [heads, heads, d, d]."""
        return self.cross.unflatten(1, (heads, -1)).unflatten(0, (heads, -1)).transpose(1, 2)

    def moments(self, heads: int, kv_heads: int) -> Moments:
        """Of heads that are paired as they stand, summed over the query heads of each group."""
        paired = self.by_head(heads).diagonal(dim1=0, dim2=1).movedim(-1, 0)
        return Moments(paired, self.model.unflatten(0, (heads, -1))).per_kv_head(kv_heads)

    def per_layer(self) -> Covariance:
        """In units of the anchor's norm."""
        unit = inverse_root(self.anchor.sum()).expand_as(self.anchor)
        return self.scaled(unit, unit)

    def blended(self, other: Covariance, share: float) -> Covariance:
        """Two kinds of evidence in one, the other one with a share between 0 and 1."""
        own, its = (torch.full_like(self.anchor, weight**0.5) for weight in (1 - share, share))
        return self.scaled(own, own) + other.scaled(its, its)


Covariances = Mapping[str, Covariance]


def require_axis(axis: str, seen: Covariances, length: int) -> None:
    """
    Raises:
        ShapeError: if nothing was measured of an axis, or as if it had another length.
    """
    if axis not in seen:
        raise ShapeError(f"axis {axis}", "nothing was measured of it", "Pass a Covariance for each axis of the block")
    require_shape(f"what was measured of axis {axis}", seen[axis].anchor, (length,))


def inverse_root(x: Tensor) -> Tensor:
    """``1 / √x``; 1 where there is nothing."""
    return torch.where(x > 0, x, 1.0).rsqrt()


def size_ratio(anchor: Tensor, model: Tensor) -> Tensor:
    """``√(anchor / model)`` of squared norms; 1 where either shows nothing."""
    shown = (anchor > 0) & (model > 0)
    return torch.where(shown, anchor / torch.where(shown, model, 1.0), 1.0).sqrt()
