"""Prices that tell where the optimum of a large assignment problem has to be looked for."""

from __future__ import annotations

import torch
from torch import Tensor

from mergekit_symalign.symmetry import devices
from mergekit_symalign.symmetry.rows import two_lowest
from mergekit_symalign.symmetry.threads import in_parallel

_BID = 0.1  # standard deviations of the scores that a bid goes beyond what decides it
_ROUNDS = 200  # of bidding, at most
_LEFT = 0.02  # of the rows, with which bidding ends
_SAMPLE = 64  # rows whose scores say what is much
_BLOCK = 1 << 19  # scores that are looked through at once: small enough to stay in the cache


def auction_prices(score: Tensor) -> Tensor:
    """Prices of the columns at which nearly every row can have the one that it wants most [n], float64.

    Bertsekas' auction: every row without a column bids for its best one what that is worth to it more than the second,
    and a little more. It is stopped when few rows are left; the prices only say where to look.

    Args:
        score: [n, n].
    """
    n, device = len(score), score.device
    dtype = torch.promote_types(score.dtype, torch.float32)
    free = torch.arange(n, device=device)
    price = torch.zeros(n, dtype=dtype, device=device)
    owner = torch.full((n,), -1, device=device)
    more = _BID * score.narrow(0, 0, min(n, _SAMPLE)).to(dtype).std()
    for _ in range(_ROUNDS if more > 0 else 0):
        if len(free) <= n * _LEFT:
            break
        column, bid = _bids(score, price, free)
        bid = bid + more
        highest = price.scatter_reduce(0, column, bid, "amax")
        wins = bid == highest[column]
        winner = torch.full_like(owner, -1).scatter_reduce(0, column[wins], free[wins], "amax")  # of several the last
        sold = winner >= 0
        lost = free[winner[column] != free]
        free = torch.cat((lost, owner[sold & (owner >= 0)]))
        owner, price = torch.where(sold, winner, owner), torch.where(sold, highest, price)
    return price.double()


def _bids(score: Tensor, price: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
    """The best column of some rows, and the price at which it would only be as good as the second."""

    def bid(some: Tensor) -> tuple[Tensor, Tensor]:
        cost = score.index_select(0, some).to(price.dtype).neg_().add_(price)
        column, second = two_lowest(cost)
        return column, second - cost.gather(1, column.unsqueeze(1)).squeeze(1)

    height = max(1, devices.at_once(rows.device, _BLOCK) // len(score))
    parts = in_parallel(bid, rows.split(height), rows.device)
    column, surplus = (torch.cat(x) for x in zip(*parts, strict=True))
    return column, price[column] + surplus
