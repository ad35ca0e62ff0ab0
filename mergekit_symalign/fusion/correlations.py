"""Distances between units by what they compute (OT-ACTS), from sums over tokens that stream by."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from functools import reduce
from operator import add

import torch
from torch import Tensor

from mergekit_symalign.fusion.transport import as_costs
from mergekit_symalign.symmetry.by_activations.covariance import Covariance

_ROUNDINGS = 64  # of a correlation: distances below this are rounding
_CONSTANT = 1e-6  # a standard deviation below this share of the mean is rounding


@dataclass(frozen=True)
class TokenSums:
    """Sums over tokens of one output of a layer, of anchor and model, less what the first tokens were on average.

    Without that shift the variance of a unit with a large mean would be lost in rounding.

    Attributes:
        tokens: how many, float64 [].
        anchor_shift, model_shift: what was subtracted from every token [units].
        anchor, model: sums of the rest [units].
        anchor_squares, model_squares: of its squares [units].
        cross: of its products [anchor, model].
    """

    tokens: Tensor
    anchor_shift: Tensor
    model_shift: Tensor
    anchor: Tensor
    model: Tensor
    anchor_squares: Tensor
    model_squares: Tensor
    cross: Tensor

    @staticmethod
    def of(anchor: Tensor, model: Tensor, since: TokenSums | None = None) -> TokenSums:
        """Of some tokens [tokens, units] each; with the shift of ``since``, to which this is added.

        Products are taken in the tokens' dtype, sums in float64.
        """
        a_shift = anchor.mean(0).double() if since is None else since.anchor_shift
        b_shift = model.mean(0).double() if since is None else since.model_shift
        a, b = anchor - a_shift.to(anchor), model - b_shift.to(model)
        own = TokenSums(
            tokens=torch.tensor(float(len(a)), dtype=torch.float64, device=a.device),
            anchor_shift=a_shift.to(anchor).double(),
            model_shift=b_shift.to(model).double(),
            anchor=a.double().sum(0),
            model=b.double().sum(0),
            anchor_squares=a.double().square().sum(0),
            model_squares=b.double().square().sum(0),
            cross=(a.mT @ b).double(),
        )
        return own if since is None else since + own

    def __add__(self, other: TokenSums) -> TokenSums:
        """Of both; the shifts must be equal."""
        summed = (x + y for x, y in zip(self.sums(), other.sums(), strict=True))
        tokens, *rest = summed
        return TokenSums(tokens, self.anchor_shift, self.model_shift, *rest)

    def sums(self) -> tuple[Tensor, ...]:
        return tuple(getattr(self, f.name) for f in fields(self) if not f.name.endswith("shift"))

    def tensors(self) -> tuple[Tensor, ...]:
        """In the order of the fields (what a graph task may return)."""
        return tuple(getattr(self, f.name) for f in fields(self))

    def covariance(self) -> Covariance:
        """The products without any shift, as the exact alignment by activations wants them."""
        a0, b0, a, b, n = self.anchor_shift, self.model_shift, self.anchor, self.model, self.tokens
        return Covariance(
            self.cross + torch.outer(a0, b) + torch.outer(a, b0) + n * torch.outer(a0, b0),
            self.anchor_squares + 2 * a0 * a + n * a0.square(),
            self.model_squares + 2 * b0 * b + n * b0.square(),
        )


def activation_costs(outputs: Sequence[TokenSums], dtype: torch.dtype) -> Tensor:
    """Distances between units by their z-scored outputs on the same tokens.

    Euclidean, not squared, over all outputs, divided by their maximum. A unit that is constant has a z-score of 0.

    Args:
        outputs: of each tensor that has the units.
        dtype: in which the products were taken.

    Returns:
        Costs [model, anchor], float64, from 0 to 1.

    >>> tokens = torch.tensor([[1.0, 5.0], [2.0, 0.0], [3.0, 1.0]])
    >>> activation_costs([TokenSums.of(tokens, 3 * tokens.flip(1) + 1)], tokens.dtype).tolist()
    [[1.0, 0.0], [0.0, 1.0]]
    """
    rounding = _ROUNDINGS * torch.finfo(dtype).eps * len(outputs)
    return as_costs(reduce(add, map(_squared_distances, outputs)), rounding)


def _squared_distances(x: TokenSums) -> Tensor:
    """Mean squares of the differences of z-scores [model, anchor]."""
    n = x.tokens
    a, b = (
        _spread(*of, n)
        for of in ((x.anchor, x.anchor_squares, x.anchor_shift), (x.model, x.model_squares, x.model_shift))
    )
    covariance = x.cross - torch.outer(x.anchor, x.model) / n
    correlation = covariance / torch.outer(a.masked_fill(a == 0, 1.0), b.masked_fill(b == 0, 1.0))
    correlation = torch.where(torch.outer(a, b) > 0, correlation, 0.0)
    return ((a > 0).double().unsqueeze(1) + (b > 0).double() - 2 * correlation).mT


def _spread(total: Tensor, squares: Tensor, shift: Tensor, n: Tensor) -> Tensor:
    """Root of the sum of squared deviations from the mean; 0 for a unit that is constant up to rounding."""
    spread = (squares - total.square() / n).clamp(min=0.0).sqrt()
    return spread.masked_fill(spread <= _CONSTANT * (shift + total / n).abs() * n.sqrt(), 0.0)
