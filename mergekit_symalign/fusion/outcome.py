"""What a kernel of a merge with data found, and how it came about."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum

import torch
from torch import Tensor

from mergekit_symalign.errors import ShapeError


class Route(str, Enum):
    """How a merged tensor was found."""

    exact = "exact"  # as the formula says
    ridge = "ridge"  # the matrices were singular: with a ridge that nobody asked for
    average = "average"  # the data says nothing of this tensor


@dataclass(frozen=True)
class Merged:
    """A merged tensor.

    Attributes:
        weight: float64, of the shape of the inputs.
        route: how it was found.
    """

    weight: Tensor
    route: Route


def average(weights: Sequence[Tensor], shares: Sequence[float]) -> Tensor:
    """Σ w_i W_i / Σ w_i in float64.

    Args:
        weights: of one shape each.
        shares: w_i, with a positive sum.

    Raises:
        ShapeError: if the shapes differ.
    """
    if len({tuple(x.shape) for x in weights}) != 1:
        shapes = ", ".join(str(tuple(x.shape)) for x in weights)
        raise ShapeError("weights to merge", f"their shapes differ: {shapes}", "Merge tensors of one shape")
    total = torch.zeros_like(weights[0], dtype=torch.float64)
    for x, share in zip(weights, shares, strict=True):
        total += share * x.double()
    return total / sum(shares)
