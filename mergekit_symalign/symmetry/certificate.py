"""The optimal permutation of neurons at a fraction of the cost, where nearest neighbours prove it.

Stack each neuron as one vector. If the nearest neighbour of every anchor neuron among the model's is a different one,
that map is the optimal permutation: each row takes its own minimum. A distance over some of the coordinates bounds the
whole distance from below, so the best candidate on a short prefix is proven to be the nearest as soon as its whole
distance is below the prefix distance of every other. For siblings a prefix of two per cent settles every row.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

Pair = tuple[Tensor, Tensor]

_PREFIXES = (0.02, 0.16)  # shares of the coordinates; rows that the first leaves open get the second
_ROWS = 1024  # rows of the prefix distances that are held at once
_SLACK = 1e-5  # of the squared norms: the prefix distances are products in float32


def certified_permutation(pairs: Sequence[Pair]) -> Tensor | None:
    """The permutation with the least squared distance, or None where nearest neighbours do not prove one.

    Args:
        pairs: anchor's and model's rows of each kind (gate, up, down; weights and biases), [neurons, columns] each.

    Returns:
        int64 [neurons]: slot ``i`` takes the model's neuron ``index[i]``.
    """
    n = pairs[0][0].shape[0]
    index = torch.full((n,), -1, device=pairs[0][0].device)
    open_rows = torch.arange(n, device=index.device)
    for share in _PREFIXES:
        settled, candidate = _settle(pairs, open_rows, share)
        index[open_rows[settled]] = candidate[settled]
        open_rows = open_rows[~settled]
        if len(open_rows) == 0:
            distinct = len(torch.unique(index)) == n
            return index if distinct else None
    return None


def _settle(pairs: Sequence[Pair], rows: Tensor, share: float) -> tuple[Tensor, Tensor]:
    """Which rows of the anchor have a proven nearest neighbour, and the best candidate of every row."""
    anchor, model = (torch.cat([spread_columns(pair[i], share) for pair in pairs], dim=1) for i in range(2))
    norms = model.square().sum(1)
    settled, candidates = [], []
    for block in rows.split(_ROWS):
        a = anchor.index_select(0, block)
        own = a.square().sum(1, keepdim=True)
        distance = torch.addmm(norms.unsqueeze(0), a, model.mT, alpha=-2) + own
        nearest = distance.topk(2, dim=1, largest=False)
        candidate = nearest.indices.select(1, 0)
        exact = sum(_distance(x, y, block, candidate) for x, y in pairs)
        slack = _SLACK * (own.squeeze(1) + norms.max())
        settled.append(exact + slack < nearest.values.select(1, 1))
        candidates.append(candidate)
    return torch.cat(settled), torch.cat(candidates)


def spread_columns(rows: Tensor, share: float) -> Tensor:
    """Evenly spaced columns of a matrix, at least one, in float32."""
    count = max(1, round(share * rows.shape[1]))
    at = torch.linspace(0, rows.shape[1] - 1, count, device=rows.device).long()
    return rows.index_select(1, at).float()


def _distance(anchor: Tensor, model: Tensor, rows: Tensor, candidate: Tensor) -> Tensor:
    """Squared distance of each row to its candidate."""
    difference = anchor.index_select(0, rows).float() - model.index_select(0, candidate).float()
    return difference.square().sum(1)
