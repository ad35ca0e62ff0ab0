"""Adam (Kingma & Ba 2015) on manifolds: moments of tangents, steps along them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from mergekit_symalign.learning.manifolds import Manifold

_DECAYS = (0.9, 0.99)
_TINY = 1e-12  # gradients of a mean loss are small


@dataclass(frozen=True)
class Leaf:
    """A tensor that is learned.

    Attributes:
        start: where it starts.
        manifold: where it stays.
    """

    start: Tensor
    manifold: Manifold


@dataclass(frozen=True)
class Moments:
    """Running means of the tangents and of their squares, by name."""

    first: Mapping[str, Tensor]
    second: Mapping[str, Tensor]

    @staticmethod
    def zero(numbers: Mapping[str, Tensor]) -> Moments:
        return Moments(*({name: torch.zeros_like(x) for name, x in numbers.items()} for _ in range(2)))


def adam_step(
    leaves: Mapping[str, Leaf],
    numbers: Mapping[str, Tensor],
    gradients: Mapping[str, Tensor],
    moments: Moments,
    *,
    rate: float,
    step: int,
) -> tuple[dict[str, Tensor], Moments]:
    """One step.

    Args:
        leaves: what is learned.
        numbers: where it is.
        gradients: of the loss.
        moments: after the last step.
        rate: of learning.
        step: how many steps were made.

    Returns:
        Where it is now, and the moments.
    """
    moved, first, second = {}, {}, {}
    keep, keep_squares = _DECAYS
    for name, x in numbers.items():
        manifold = leaves[name].manifold
        tangent = manifold.tangent(x, gradients[name])
        first[name] = torch.lerp(tangent, moments.first[name], keep)
        second[name] = torch.lerp(tangent.square(), moments.second[name], keep_squares)
        mean = first[name] / (1 - keep ** (step + 1))
        size = (second[name] / (1 - keep_squares ** (step + 1))).sqrt() + _TINY
        moved[name] = manifold.moved(x, -rate * manifold.rate(x) * mean / size)
    return moved, Moments(first, second)
