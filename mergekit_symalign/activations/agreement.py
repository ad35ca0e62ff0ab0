"""How far two models' outputs on the same inputs are from each other, summed up batch by batch."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

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
    _sum: float = 0.0
    _squares: float = 0.0
    _medians: list[Tensor] = field(default_factory=list)

    def add(self, original: Tensor, other: Tensor) -> None:
        """Count some tokens in; both [tokens, outputs]."""
        for a, b in zip(original.split(_TOKENS_AT_ONCE), other.split(_TOKENS_AT_ONCE), strict=True):
            a, b = a.double(), b.double()
            off = (b - a).abs()
            self.largest = max(self.largest, _nan_is_infinite(off.max()))
            self._medians.append(off.median(dim=-1).values)
            self._sum, self._squares = self._sum + float(a.sum()), self._squares + float(a.square().sum())
            self._values, self.tokens = self._values + a.numel(), self.tokens + len(a)
            if self.distribution:
                p, q = a.log_softmax(-1), b.log_softmax(-1)
                self.divergence += float((p.exp() * (p - q)).sum())
                self.same_first += int((a.argmax(-1) == b.argmax(-1)).sum())

    @property
    def median(self) -> float:
        """Median over tokens of the median deviation of a token's outputs."""
        return float(torch.cat(self._medians).median())

    @property
    def std(self) -> float:
        """Standard deviation of the original's outputs."""
        mean = self._sum / self._values
        return float(max(self._squares / self._values - mean**2, 0.0)) ** 0.5


def hidden_deviation(original: Tensor, other: Tensor) -> float:
    """Largest ‖b − a‖ / ‖a‖ of a token's hidden states, both [tokens, hidden size].

    Relative to each token's own: a norm reads every token by itself, and some tokens are a thousand times larger.
    """
    size = torch.linalg.vector_norm(original, dim=-1).clamp_min(torch.finfo(original.dtype).tiny)
    return _nan_is_infinite((torch.linalg.vector_norm(other - original, dim=-1) / size).max())


def _nan_is_infinite(x: Tensor) -> float:
    return float(torch.where(torch.isnan(x), torch.inf, x))
