"""The order that activations and weights ask for together: of the neurons of an MLP, or of the experts of a layer."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from mergekit_symalign.symmetry.by_activations.covariance import Covariance, inverse_root
from mergekit_symalign.symmetry.by_activations.evidence import Agreement, Shares, most_likely

_ORDER = "order"


@dataclass(frozen=True)
class Scores:
    """What each pair adds to the correlation of both models when matched.

    Attributes:
        matrix: [n, n], to be multiplied by ``unit``.
    """

    matrix: Tensor
    unit: Tensor

    @staticmethod
    def of(seen: Covariance) -> Scores:
        """Of what is compared as it is."""
        return Scores(seen.cross, inverse_root(seen.anchor.sum() * seen.model.sum()))

    def correlation(self, index: Tensor) -> float:
        """Under a permutation."""
        return float(self.matrix.gather(1, index.unsqueeze(1)).double().sum() * self.unit)

    def blended(self, other: Scores, share: float) -> Tensor:
        """Both, the other one with this share; one new matrix is made."""
        return (self.matrix * ((1 - share) * self.unit)).addcmul_(other.matrix, other.unit, value=share)


def likeliest_order(activations: Scores, weights: Scores, assign: Callable[[Tensor], Tensor]) -> tuple[Tensor, float]:
    """The permutation under which both agree best.

    Args:
        activations, weights: of the same pairs.
        assign: the best permutation for a matrix of scores.

    Returns:
        The permutation, and the share of the weights that it was found with.
    """

    def solved(shares: Shares) -> Tensor:
        return assign(activations.blended(weights, shares[_ORDER]))

    def agreement(index: Tensor) -> dict[str, Agreement]:
        return {_ORDER: Agreement(activations.correlation(index), weights.correlation(index))}

    index, shares = most_likely(solved, agreement, (_ORDER,))
    return index, shares[_ORDER]
