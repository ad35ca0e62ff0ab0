"""Means over seeds with their standard errors, and what a difference may be called."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats

CONFIDENCE = 0.95
MOST_DIGITS = 6
ONE_SEED = "one seed only"


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
        """The estimate from one number for each seed.

        Raises:
            ValueError: if there are none.
        """
        n = len(values)
        if n == 0:
            raise ValueError("nothing was measured. Run the study before its report.")
        error = float(np.std(values, ddof=1) / n**0.5) if n > 1 else float("nan")
        return Estimate(float(np.mean(values)), error, n)

    def __neg__(self) -> Estimate:
        return Estimate(-self.mean, self.error, self.n)

    @property
    def margin(self) -> float:
        """Half the width of the confidence interval (Student's t)."""
        return float(stats.t.ppf(0.5 + CONFIDENCE / 2, self.n - 1)) * self.error if self.n > 1 else float("inf")

    def text(self, digits: int = 1, *, signed: bool = False) -> str:
        """Mean ± standard error, as in ``+1.5 ± 0.3``; more digits than asked for where the error needs them.

        Without an error where there is one seed only.
        """
        if 0 < self.error < 10**-digits:
            digits = min(MOST_DIGITS, -math.floor(math.log10(self.error)))
        mean = format(self.mean, f"{'+' if signed else ''}.{digits}f").replace("-", "−")
        return mean if self.n < 2 else f"{mean} ± {self.error:.{digits}f}"

    def verdict(self, favourable: int) -> str:
        """What this difference may be called; ``favourable`` is the sign of an improvement."""
        if self.mean == 0 and not self.error > 0:
            return "no change"
        if self.n < 2:
            return ONE_SEED
        if abs(self.mean) <= self.margin:
            return "no difference shown"
        return "better" if self.mean * favourable > 0 else "worse"
