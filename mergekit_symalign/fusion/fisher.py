"""Averages weighted by the diagonal of the Fisher information (Matena & Raffel 2022, arXiv 2111.09832)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from mergekit_symalign.fusion.outcome import Merged, Route, average


def fisher_mean(
    weights: Sequence[Tensor], shares: Sequence[float], fishers: Sequence[Tensor], *, floor: float = 0.0
) -> Merged:
    """Average every number by how much each model's loss depends on it.

    ``W = Σ w_i (F_i + f) W_i / Σ w_i (F_i + f)``: the mode of a product of Gaussians with precision F_i. Solved for
    the difference from the plain average, so that a number on which no loss depends stays there.

    Args:
        weights: W_i, each of one shape.
        shares: w_i, not negative, with a positive sum.
        fishers: F_i ≥ 0, each of the same shape.
        floor: f · Σ w_i, which pulls all numbers a little to the average.

    Returns:
        W, and by which route: the average if all F_i are zero.
    """
    centre = average(weights, shares)
    right, total = torch.zeros_like(centre), torch.zeros_like(centre)
    for x, share, f in zip(weights, shares, fishers, strict=True):
        total += share * f.double()
        right += share * f.double() * (x.double() - centre)
    known = total > 0
    difference = torch.where(known, right / torch.where(known, total + floor, 1.0), 0.0)
    return Merged(centre + difference, Route.exact if bool(known.any()) else Route.average)
