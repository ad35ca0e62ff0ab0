"""How much activations and weights count against each other when a model is matched by both (docs/activations.md).

Numbers of the anchor and of the aligned model are taken for pairs of normal variables with a correlation ``r``, one for
activations and one for weights. The logarithm of their likelihood is ``−½ log(1 − r²)`` a number, both together

    L(g) = Σ_e −½ log(1 − r_e(g)²),    r_e(g) = <A_e, g B_e> / (‖A_e‖ ‖B_e‖).

``L`` is convex in the correlations. So its tangent at the last ones, which weighs each kind of evidence by
``r / (1 − r²)``, lies below it, and an element that maximises the tangent is at least as likely as the last one. That
is the problem that the solvers solve, with activations and weights as one matrix: the rounds end where it is settled.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TypeVar

Found = TypeVar("Found")
Shares = Mapping[str, float]  # of the weights in all evidence, 0 to 1, by what is matched

GRAIN = 1e-5  # least share of activations and of weights: each decides where the other says nothing
_ROUNDS = 8
_SETTLED = 0.01  # change of a share after which a round would change nothing
_ROUNDING = 1e-7  # of 1 − r²: weights and activations in float32 cannot agree better


@dataclass(frozen=True)
class Agreement:
    """Correlations of the anchor with the model under some element.

    Attributes:
        activations, weights: at most 1; 0 where there is nothing to compare.
    """

    activations: float
    weights: float

    @property
    def share(self) -> float:
        """Of the weights in all evidence: ``GRAIN`` to 1 − ``GRAIN``."""
        ours, others = _tangent(self.weights), _tangent(self.activations)
        share = ours / (ours + others) if ours + others > 0 else 0.0
        return min(max(share, GRAIN), 1 - GRAIN)

    @property
    def likelihood(self) -> float:
        """Its logarithm, for one number of each kind."""
        return sum(-math.log(_left(r)) / 2 for r in (self.activations, self.weights))


def most_likely(
    solved: Callable[[Shares], Found], agreement: Callable[[Found], Mapping[str, Agreement]], of: tuple[str, ...]
) -> tuple[Found, Shares]:
    """The element under which activations and weights together agree best.

    Rounds start from activations alone, and from weights alone; the likelier end counts.

    Args:
        solved: the best element when weights have these shares in the evidence.
        agreement: of both under an element.
        of: what is matched with shares of its own.

    Returns:
        What was found, and the shares that it was found with.

    >>> def solved(shares):  # an angle: activations ask for 40 degrees, weights for 0
    ...     return 40 * (1 - shares["heads"])
    >>> def agreement(angle):  # weights would agree exactly
    ...     return {"heads": Agreement(0.9 * math.cos(math.radians(40 - angle)), math.cos(math.radians(angle)))}
    >>> round(most_likely(solved, agreement, ("heads",))[0], 2)
    0.0
    """
    ends = [_settled(solved, agreement, dict.fromkeys(of, start)) for start in (GRAIN, 1 - GRAIN)]
    found, shares, _ = max(ends, key=lambda end: end[2])
    return found, shares


def _settled(
    solved: Callable[[Shares], Found], agreement: Callable[[Found], Mapping[str, Agreement]], shares: Shares
) -> tuple[Found, Shares, float]:
    """Where rounds from some shares end, and how likely that is."""
    wanted = shares
    for _ in range(_ROUNDS):
        shares = wanted
        found = solved(shares)
        seen = agreement(found)
        wanted = {name: of.share for name, of in seen.items()}
        if all(abs(share - shares[name]) <= _SETTLED for name, share in wanted.items()):
            break
    return found, shares, sum(of.likelihood for of in seen.values())


def _tangent(r: float) -> float:
    """Slope of the likelihood; 0 where there is no agreement."""
    return max(r, 0.0) / _left(r)


def _left(r: float) -> float:
    return max(1 - max(r, 0.0) ** 2, _ROUNDING)
