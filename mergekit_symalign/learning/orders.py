"""Orders that are learned: a score for every pair of places, the best assignment on the way forward, and on the way
back the gradient of its relaxation, a matrix whose rows and columns sum to 1 (a straight-through estimator; Bengio et
al. 2013, Mena et al. 2018).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from mergekit_symalign.learning.manifolds import Flat
from mergekit_symalign.symmetry.assignment.linear import best_assignment
from mergekit_symalign.symmetry.groups import AxisAction, Permutation

_ITERATIONS = 5  # of Sinkhorn's algorithm
_CERTAINTY = 2.0  # of the order that scores start with, in logits: a share of 0.88
_RATE = 10.0


class Scores(Flat):
    """Scores, whose differences have to change by a few units before an order does."""

    def rate(self, x: Tensor) -> float:
        return _RATE


@dataclass(frozen=True, eq=False)
class SoftOrder(AxisAction):
    """An order as matrices, through which gradients go: of places in each of some groups.

    Attributes:
        matrix: [groups, n, n], permutations.
        width: coordinates of a place; they move together.
    """

    kind: ClassVar[str] = "soft_order"
    matrix: Tensor
    width: int = 1

    @property
    def size(self) -> int:
        return self.matrix.shape[0] * self.matrix.shape[1] * self.width

    def transform(self, x: Tensor) -> Tensor:
        groups, n, _ = self.matrix.shape
        places = x.reshape(groups, n, -1)
        return (self.matrix.to(x) @ places).reshape(x.shape)

    def inverse(self) -> SoftOrder:
        return SoftOrder(self.matrix.mT, self.width)

    def dual(self) -> SoftOrder:
        return self

    def is_identity(self) -> Tensor:
        eye = torch.eye(self.matrix.shape[-1], dtype=self.matrix.dtype, device=self.matrix.device)
        return (self.matrix == eye).all()

    def snapped(self, tolerance: float) -> SoftOrder:
        return self

    def hardened(self) -> Permutation:
        """The same as an order of coordinates."""
        groups, n, _ = self.matrix.shape
        places = self.matrix.argmax(-1) + torch.arange(groups, device=self.matrix.device).unsqueeze(1) * n
        return Permutation.of_wholes(places.flatten(), self.width)


def first_scores(groups: int, n: int) -> Tensor:
    """Scores [groups, n, n] of the order as it is."""
    return (torch.eye(n, dtype=torch.float64) * (math.log(max(2, n)) + _CERTAINTY)).repeat(groups, 1, 1)


def straight_through(scores: Tensor) -> Tensor:
    """The best order for each group of scores [groups, n, n] as a matrix, with the relaxation's gradient."""
    hard = torch.stack([_matrix(best_assignment(one.detach()), one) for one in scores])
    soft = _relaxed(scores)
    return hard + (soft - soft.detach())


def _matrix(index: Tensor, like: Tensor) -> Tensor:
    return torch.zeros_like(like).scatter(1, index.unsqueeze(1), 1.0)


def _relaxed(scores: Tensor) -> Tensor:
    """Sinkhorn's algorithm."""
    for _ in range(_ITERATIONS):
        scores = scores - scores.logsumexp(-1, keepdim=True)
        scores = scores - scores.logsumexp(-2, keepdim=True)
    return scores.exp()
