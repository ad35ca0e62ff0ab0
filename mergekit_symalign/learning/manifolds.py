"""Where learned numbers live, and how they move there: a step never leaves the group.

A gradient is turned into a direction in which the group allows a step (its tangent, in the anchor's coordinates). A
direction is followed by the exponential map: ``R ← exp(A) R``. So orthogonal matrices stay orthogonal at any length of
a step, and the moments of an optimiser keep their meaning from one step to the next.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

from mergekit_symalign.symmetry.heads.general import conditioned

_LARGEST = 4.0  # of a logarithm
_POLISHING = 6  # at most; each squares what is left


class Manifold(ABC):
    """A set of tensors on which steps are made."""

    @abstractmethod
    def tangent(self, x: Tensor, gradient: Tensor) -> Tensor:
        """The direction in which a loss with this gradient grows fastest at ``x``."""

    @abstractmethod
    def moved(self, x: Tensor, direction: Tensor) -> Tensor:
        """A step from ``x``; what of the direction does not lie on the manifold is left out."""

    def exact(self, x: Tensor) -> Tensor:
        """The nearest element, in float64."""
        return x.double()

    def rate(self, x: Tensor) -> float:
        """What a step of each number is multiplied by, so that steps are of one size in groups of any size."""
        return 1.0


class Flat(Manifold):
    """Numbers of any value, as angles are."""

    def tangent(self, x: Tensor, gradient: Tensor) -> Tensor:
        return gradient

    def moved(self, x: Tensor, direction: Tensor) -> Tensor:
        return x + direction


class Log(Flat):
    """Logarithms of scales. They stay within what weights in float16 can bear, or where they started."""

    def moved(self, x: Tensor, direction: Tensor) -> Tensor:
        most = x.abs().clamp_min(_LARGEST)
        return torch.clamp(x + direction, -most, most)


class Orthogonal(Manifold):
    """Orthogonal matrices [*, d, d]."""

    def tangent(self, x: Tensor, gradient: Tensor) -> Tensor:
        return _skew(gradient @ x.mT)

    def moved(self, x: Tensor, direction: Tensor) -> Tensor:
        return _polished(torch.linalg.matrix_exp(_skew(direction)) @ x, 1)

    def exact(self, x: Tensor) -> Tensor:
        return _polished(x.double(), _POLISHING)

    def rate(self, x: Tensor) -> float:
        return min(1.0, 16 / x.shape[-1] ** 0.5)


class MeanKeeping(Orthogonal):
    """Orthogonal matrices that leave the mean of the coordinates where it is: ``Q 1 = 1``."""

    def moved(self, x: Tensor, direction: Tensor) -> Tensor:
        return super().moved(x, _centred(_skew(direction)))

    def exact(self, x: Tensor) -> Tensor:
        mean = torch.full_like(x, 1 / x.shape[-1], dtype=torch.float64)
        return super().exact(_centred(x.double()) + mean)


@dataclass(frozen=True)
class Invertible(Manifold):
    """Invertible matrices [*, d, d].

    Attributes:
        condition: bound of their condition numbers.
    """

    condition: float

    def tangent(self, x: Tensor, gradient: Tensor) -> Tensor:
        return gradient @ x.mT

    def moved(self, x: Tensor, direction: Tensor) -> Tensor:
        return conditioned(torch.linalg.matrix_exp(direction) @ x, self.condition)

    def exact(self, x: Tensor) -> Tensor:
        return conditioned(x.double(), self.condition)


def _skew(x: Tensor) -> Tensor:
    return (x - x.mT) / 2


def _centred(x: Tensor) -> Tensor:
    """Without what a matrix does to the mean, and puts into it."""
    rows = x - x.mean(-1, keepdim=True)
    return rows - rows.mean(-2, keepdim=True)


def _polished(x: Tensor, most: int) -> Tensor:
    """The nearest orthogonal matrices to nearly orthogonal ones, by Newton and Schulz."""
    for _ in range(most):
        off = x.mT @ x
        off.diagonal(dim1=-2, dim2=-1).sub_(1)
        x = x - x @ off / 2
        if most > 1 and float(off.abs().max()) < 1e-12:
            break
    return x
