"""Transport maps: what each of the anchor's units takes of the model's, along one axis of a tensor."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from mergekit_symalign.symmetry.groups import Permutation
from mergekit_symalign.symmetry.rows import compute_dtype


@dataclass(frozen=True, eq=False)
class Mixing:
    """``Tᵀ x``: unit ``j`` takes ``matrix[i, j]`` of what stood at ``i``.

    Attributes:
        matrix: ``T`` [model, anchor]; columns sum to one, and rows too unless a policy says otherwise.
    """

    matrix: Tensor

    def __call__(self, x: Tensor, dim: int) -> Tensor:
        """Apply to axis ``dim`` of ``x``; returns the compute dtype (float32 at least)."""
        x = x.to(compute_dtype(x.dtype))
        return (x.movedim(dim, -1) @ self.matrix.to(x)).movedim(-1, dim)


Map = Permutation | Mixing


def identity(size: int, device: torch.device) -> Permutation:
    return Permutation(torch.arange(size, device=device))


def matrix_of(of: Map) -> Tensor:
    """``T`` [model, anchor], float64.

    >>> matrix_of(Permutation(torch.tensor([1, 2, 0]))).tolist()
    [[0.0, 0.0, 1.0], [1.0, 0.0, 0.0], [0.0, 1.0, 0.0]]
    """
    if isinstance(of, Mixing):
        return of.matrix.double()
    return torch.eye(of.size, dtype=torch.float64, device=of.index.device)[:, of.index]


def mean(maps: Sequence[Map], weights: Sequence[float]) -> Map:
    """The weighted mean; equal permutations stay what they are.

    Args:
        maps: at least one.
        weights: of each, with sum 1.
    """
    first = maps[0]
    if all(
        isinstance(of, Permutation) and isinstance(first, Permutation) and torch.equal(of.index, first.index)
        for of in maps
    ):
        return first
    return Mixing(sum(weight * matrix_of(of) for of, weight in zip(maps, weights, strict=True)))  # type: ignore[arg-type]


def over_heads(of: Map, head_dim: int) -> Map:
    """The mean over all pairs of heads: what a gain that all heads share takes [head_dim, head_dim].

    Rows and columns sum to one if those of the map do.
    """
    heads = matrix_of(of).unflatten(1, (-1, head_dim)).unflatten(0, (-1, head_dim))
    return simplified(heads.sum((0, 2)) / heads.shape[0])


def simplified(matrix: Tensor) -> Map:
    """A permutation where a matrix is one, bit for bit."""
    index = matrix.argmax(0)
    ones = torch.zeros_like(matrix).scatter(0, index.unsqueeze(0), 1.0)
    return Permutation(index) if torch.equal(matrix, ones) and len(index.unique()) == len(index) else Mixing(matrix)


def attended_map(value: Map, query: Map, kv_heads: int, head_dim: int) -> Map:
    """What the output projection's columns take: the map of the values, for each query head.

    Without grouped queries this is the values' map. With them, the coordinates of a KV head are read once for each
    query head of its group. Where the values' map takes a KV head to another one, the query heads of the two groups are
    paired so that most of the queries' own map is kept (as whole heads, so that rows and columns sum to one).

    Args:
        value: between the KV heads' coordinates.
        query: between the query heads' coordinates.
        kv_heads, head_dim: shape of the attention.

    >>> value, query = Permutation(torch.tensor([1, 0])), Permutation(torch.tensor([3, 2, 0, 1]))
    >>> attended_map(value, query, kv_heads=2, head_dim=1).index.tolist()
    [3, 2, 0, 1]
    """
    values = matrix_of(value).unflatten(1, (kv_heads, head_dim)).unflatten(0, (kv_heads, head_dim))
    kept = matrix_of(query).unflatten(1, (kv_heads, -1, head_dim)).unflatten(0, (kv_heads, -1, head_dim)).sum((2, 5))
    group = kept.shape[1]
    if group == 1:
        return value
    pairs = torch.zeros_like(kept).movedim(2, 1)  # [model's KV head, anchor's, model's query head of it, anchor's]
    for i, j in torch.nonzero(values.sum((1, 3)) > 0).tolist():
        rows, columns = linear_sum_assignment(kept[i, :, j].cpu().numpy(), maximize=True)
        pairs[i, j, torch.from_numpy(rows), torch.from_numpy(columns)] = 1.0
    whole = torch.einsum("idje,ijab->iadjbe", values, pairs)
    size = kv_heads * group * head_dim
    return simplified(whole.reshape(size, size))


def packed_map(of: Map) -> dict[str, Tensor]:
    """As a dict of tensors (what a graph task may return)."""
    return {"index": of.index} if isinstance(of, Permutation) else {"matrix": of.matrix}


def unpacked_map(packed: Mapping[str, Tensor]) -> Map:
    """The inverse of `packed_map`."""
    return Permutation(packed["index"]) if "index" in packed else Mixing(packed["matrix"])


def weighted_mean(tensors: Sequence[tuple[Tensor, float]]) -> Tensor:
    """The mean of tensors of one shape by their weights, in the compute dtype; equal tensors come back as they are.

    Args:
        tensors: with the weight of each; weights need not sum to 1, and not all may be 0.

    >>> weighted_mean([(torch.tensor([1.0, 0.0]), 1.0), (torch.tensor([4.0, 0.0]), 2.0)]).tolist()
    [3.0, 0.0]
    """
    weighty = [(x, weight) for x, weight in tensors if weight != 0] or list(tensors)
    total = sum(weight for _, weight in weighty) or 1.0
    first = weighty[0][0]
    result = first.to(compute_dtype(first.dtype))
    for x, weight in weighty[1:]:
        result = result + (x.to(result) - first.to(result)) * (weight / total)
    return result
