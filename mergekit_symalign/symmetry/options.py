"""What the solvers of a block are given: its rows, its shape, and which symmetries to use."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import Enum

from torch import Tensor

Pair = tuple[Tensor, Tensor]
Sides = Mapping[str, Sequence[Pair]]  # axis -> (anchor, model) rows [axis, columns] of each tensor that has it


class Rotation(str, Enum):
    """Which rotations of the heads are admitted."""

    exact = "exact"  # the largest group that keeps the function
    full = "full"  # the papers' orthogonal matrix for query and key, also under RoPE: the function changes
    none = "none"


@dataclass(frozen=True)
class Symmetries:
    """Which symmetries to use (the parameters of the aligned methods)."""

    permutation: bool = True
    heads: bool = True
    rotation: Rotation = Rotation.exact
    scaling: bool = True
    neuron_scaling: bool = False


@dataclass(frozen=True)
class HeadShape:
    """The shape of an attention block: heads, and whether queries and keys are normalised."""

    query_heads: int
    kv_heads: int
    qk_norm: bool

    @property
    def queries_per_kv(self) -> int:
        return self.query_heads // self.kv_heads
