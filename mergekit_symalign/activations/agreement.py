"""How far two models' outputs on the same inputs are from each other, summed up batch by batch."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor

_ROUNDING = 8 * torch.finfo(torch.float32).eps
_TOKENS_AT_ONCE = 128  # [tokens, vocabulary] in float64, several times


@dataclass
class Agreement:
    """Deviations of one model's outputs from another's.

    Attributes:
        distribution: whether the outputs are logits, so that divergence and top-1 agreement mean something.
        largest: largest absolute deviation.
        divergence: sum over tokens of KL(original ‖ other), in nats.
        same_first: tokens for which both have the same largest logit.
        tokens: how many were compared.
    """

    distribution: bool = True
    largest: float = 0.0
    divergence: float = 0.0
    same_first: int = 0
    tokens: int = 0
    _values: int = 0
    _first: float | None = None
    _sum: float = 0.0
    _squares: float = 0.0
    _medians: list[Tensor] = field(default_factory=list)

    def add(self, original: Tensor, other: Tensor) -> None:
        """Count some tokens in; both [tokens, outputs]."""
        for a, b in zip(original.split(_TOKENS_AT_ONCE), other.split(_TOKENS_AT_ONCE), strict=True):
            if a.numel():
                self._add(a.double(), b.double())

    def _add(self, a: Tensor, b: Tensor) -> None:
        off = torch.where(a == b, 0.0, (b - a).abs())  # infinities may be equal
        off = torch.where(off.isnan(), torch.inf, off)
        self.largest = max(self.largest, float(off.max()))
        self._medians.append(off.median(dim=-1).values)
        self._first = float(a[0, 0]) if self._first is None else self._first
        from_first = a - self._first  # so that equal outputs have a deviation of exactly 0
        self._sum, self._squares = self._sum + float(from_first.sum()), self._squares + float(from_first.square().sum())
        self._values, self.tokens = self._values + a.numel(), self.tokens + len(a)
        if self.distribution:
            p, q = a.log_softmax(-1), b.log_softmax(-1)
            terms = torch.where(p == -torch.inf, 0.0, p.exp() * (p - q))
            self.divergence += _nan_is_infinite(terms.sum())
            self.same_first += int((a.argmax(-1) == b.argmax(-1)).sum())

    @property
    def median(self) -> float:
        """Median over tokens of the median deviation of a token's outputs."""
        return float(torch.cat(self._medians).median()) if self._medians else 0.0

    @property
    def std(self) -> float:
        """Standard deviation of the original's outputs."""
        if not self._values:
            return 0.0
        mean = self._sum / self._values
        return float(max(self._squares / self._values - mean**2, 0.0)) ** 0.5

    def relative(self, deviation: float) -> float:
        """A deviation in standard deviations of the original's outputs.

        Outputs that are all equal, up to the rounding of float32, have none: there it is relative to their size. No
        deviation is 0, and one from outputs that are all 0 is infinite.
        """
        if deviation == 0:
            return 0.0
        constant = abs((self._first or 0.0) + self._sum / self._values)
        scale = self.std if self.std > _ROUNDING * constant else constant
        return deviation / scale if 0 < scale < math.inf else math.inf


def hidden_deviation(original: Tensor, other: Tensor) -> float:
    """Largest ‖b − a‖ / ‖a‖ of a token's hidden states, both [tokens, hidden size]; 0 where both are 0, or no token.

    Relative to each token's own: a norm reads every token by itself, and some tokens are a thousand times larger.
    """
    if not len(original):
        return 0.0
    off, size = (torch.linalg.vector_norm(x, dim=-1) for x in (other - original, original))
    return _nan_is_infinite(torch.where(off == 0, off, off / size).max())


def _nan_is_infinite(x: Tensor) -> float:
    return float(torch.where(torch.isnan(x), torch.inf, x))
