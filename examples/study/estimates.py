"""Means over seeds with their standard errors, and what a difference may be called."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats

CONFIDENCE = 0.95


@dataclass(frozen=True)
class Estimate:
    """The mean of one number per seed.

    Attributes:
        error: standard error of the mean, nan for a single seed.
    """

    mean: float
    error: float
    n: int

    @staticmethod
    def of(values: Sequence[float]) -> Estimate:
        n = len(values)
        error = float(np.std(values, ddof=1) / n**0.5) if n > 1 else float("nan")
        return Estimate(float(np.mean(values)), error, n)

    @property
    def margin(self) -> float:
        """Half the width of the confidence interval (Student's t)."""
        return float(stats.t.ppf(0.5 + CONFIDENCE / 2, self.n - 1)) * self.error if self.n > 1 else float("inf")

    def text(self, digits: int = 1, *, signed: bool = False) -> str:
        """Mean ± standard error, as in ``+1.5 ± 0.3``."""
        form = f"{'+' if signed else ''}.{digits}f"
        error = "n/a" if self.n < 2 else f"{self.error:.{digits}f}"
        mean = format(self.mean, form)
        return f"{mean.replace('-', '−')} ± {error}"

    def verdict(self, favourable: int) -> str:
        """What this difference may be called; ``favourable`` is the sign of an improvement."""
        if self.mean == 0 and not self.error > 0:
            return "no change"
        if abs(self.mean) <= self.margin:
            return "no difference shown"
        return "better" if self.mean * favourable > 0 else "worse"
