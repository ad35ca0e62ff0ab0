"""Losses of two models on the same documents: their difference, and how much of it chance explains."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from scipy.special import stdtrit

SMALLEST = 5e-5  # what four digits round to 0: merges that are nearly equal differ by less, in every document alike
_TWO_SIDED = 0.975  # of a 95 % interval


@dataclass(frozen=True)
class Difference:
    """How much higher one mean is than another.

    Attributes:
        value: the difference.
        error: standard error; None where there is just one document, which tells nothing of it.
        within: half the 95 % interval; infinite where the error is unknown.
    """

    value: float
    error: float | None
    within: float

    @property
    def is_shown(self) -> bool:
        """Whether it is larger than its error, and large enough to be seen in a table."""
        return abs(self.value) > max(self.within, SMALLEST)

    def __neg__(self) -> Difference:
        return Difference(-self.value, self.error, self.within)


def mean_loss(nats: Sequence[float], tokens: Sequence[int]) -> float:
    """Nats per token over all documents."""
    return sum(nats) / sum(tokens)


def paired(one: Sequence[float], other: Sequence[float], tokens: Sequence[int]) -> Difference:
    """How much higher the first model's loss is, per token.

    A ratio estimator: R = Σ dᵢ / Σ nᵢ, with the variance n/(n−1) · Σ (dᵢ − R nᵢ)² / (Σ nᵢ)² by the delta method.
    Documents are the unit, as tokens of one document depend on each other (Cochran, Sampling Techniques, 6.4).

    Args:
        one, other: nats of each document.
        tokens: of each document.
    """
    differences = [a - b for a, b in zip(one, other, strict=True)]
    count, whole = len(differences), sum(tokens)
    value = sum(differences) / whole
    if count < 2:
        return Difference(value, None, math.inf)
    squares = sum((d - value * n) ** 2 for d, n in zip(differences, tokens, strict=True))
    error = math.sqrt(count / (count - 1) * squares) / whole
    return Difference(value, error, float(stdtrit(count - 1, _TWO_SIDED)) * error)


def unpaired(one: tuple[float, float | None], other: tuple[float, float | None]) -> Difference:
    """Of two scores with their standard errors, taken for independent: on the same questions that is careful."""
    value = one[0] - other[0]
    if one[1] is None or other[1] is None:
        return Difference(value, None, math.inf)
    error = math.hypot(one[1], other[1])
    return Difference(value, error, float(stdtrit(math.inf, _TWO_SIDED)) * error)
