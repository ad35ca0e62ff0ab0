"""What the solvers of a block are given: its rows, its shape, and which symmetries to use."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Any

from torch import Tensor

VALUES = ("value", "attended")  # axes

GREATEST_CONDITION = 100.0  # of a general matrix of values, unless the user says otherwise

Pair = tuple[Tensor, Tensor]
Facts = dict[str, Any]  # what is known of a solve: plain numbers and strings by name
Sides = Mapping[str, Sequence[Pair]]  # axis -> (anchor, model) rows [axis, columns] of each tensor that has it


class Rotation(str, Enum):
    """Which rotations of the heads are admitted."""

    exact = "exact"  # the largest group that keeps the function
    full = "full"  # the papers' orthogonal matrix for query and key, also under RoPE: the function changes
    none = "none"


class ValueOutput(str, Enum):
    """What values may carry while what reads them carries the inverse transpose."""

    orthogonal = "orthogonal"  # an orthogonal matrix and a scale for each KV head
    general = "general"  # any invertible matrix, its condition number bounded


@dataclass(frozen=True)
class Symmetries:
    """Which symmetries to use (the parameters of the aligned methods, docs/methods.md).

    Attributes:
        permutation: match the neurons of MLPs, and experts.
        heads: match KV heads as a whole, then query heads within their group.
        rotation: which rotations of the heads are admitted.
        scaling: the scale between query and key, value and output.
        neuron_scaling: the scale between up and down projection of each neuron.
        value_output: what values may carry.
        condition: bound of the condition number of general matrices.
    """

    permutation: bool = True
    heads: bool = True
    rotation: Rotation = Rotation.exact
    scaling: bool = True
    neuron_scaling: bool = False
    value_output: ValueOutput = ValueOutput.orthogonal
    condition: float = GREATEST_CONDITION


class GainScope(str, Enum):
    """Whether queries and keys are normalised, and over what."""

    none = "none"
    head = "head"  # each head (RMS), with one gain per coordinate that all heads share
    all = "all"  # all heads together (RMS), with a gain for each coordinate of each head
    centred = "centred"  # each head, less its mean (layer norm), with a gain for each coordinate of each head

    @property
    def per_head(self) -> bool:
        """Whether every head has gains of its own, which move with it."""
        return self in (GainScope.all, GainScope.centred)


class HeadValues(str, Enum):
    """What stands between values and the output projection, which decides what values may carry."""

    free = "free"  # nothing: a rotation and a scale, or any invertible matrix
    normed = "normed"  # values are normalised over the head (RMS, no gain): a rotation
    keys = "keys"  # values are what the key rows write, normalised like that: they carry what keys carry
    gated = "gated"  # a gate multiplies each attended coordinate: an order, and a signed factor for each coordinate


class NeuronScale(str, Enum):
    """Which factors a neuron's up row may carry while its down column carries the inverse."""

    none = "none"  # a nonlinear activation stands between the two
    positive = "positive"  # one that positive factors pass (ReLU)
    signed = "signed"  # a gated MLP: up enters as it is


@dataclass(frozen=True)
class MlpShape:
    """The shape of an MLP.

    Attributes:
        neurons: of each expert.
        experts: 1 for a dense MLP.
        scale: which factors its neurons have.
        gated: whether each neuron has a gate row.
        groups: of experts, as many in each; experts change places inside their group, and groups as wholes.
    """

    neurons: int
    experts: int = 1
    scale: NeuronScale = NeuronScale.signed
    gated: bool = True
    groups: int = 1


@dataclass(frozen=True)
class LatentShape:
    """The shape of an attention whose keys and values come from a latent that all heads share (MLA).

    Attributes:
        heads: count.
        nope: coordinates of a head's query and key without positions.
        rope: those that turn with the position; the key's are one for all heads.
        value: of a head's value.
        kv_latent: of the latent that keys and values are read from.
        q_latent: of the latent that queries are read from; 0 without one.
        interleaved: rotary planes are ``(2i, 2i + 1)`` instead of ``(i, i + rope/2)``.
    """

    heads: int
    nope: int
    rope: int
    value: int
    kv_latent: int
    q_latent: int = 0
    interleaved: bool = False

    @property
    def rotary(self) -> int:
        return self.rope

    def latents(self) -> dict[str, int]:
        """The axes of the latents, and how many coordinates they have."""
        return {"kv_latent": self.kv_latent} | ({"q_latent": self.q_latent} if self.q_latent else {})

    def parts(self) -> dict[str, tuple[int, int]]:
        """How many heads each axis of heads has, and how many coordinates a head."""
        h = self.heads
        still = dict.fromkeys(("q_nope", "k_nope"), (h, self.nope))
        return still | {"q_pe": (h, self.rope), "k_pe": (1, self.rope)} | dict.fromkeys(VALUES, (h, self.value))

    def lengths(self) -> dict[str, int]:
        """The length of every axis."""
        heads = {axis: n * d for axis, (n, d) in self.parts().items()}
        return heads | {axis + part: n for axis, n in self.latents().items() for part in ("", "_gain", "_read")}

    def planes(self) -> list[int]:
        """The coordinates that turn: first those of all planes, then their partners."""
        return HeadShape(1, 1, self.rope, self.rope, self.interleaved).planes()


@dataclass(frozen=True)
class HeadShape:
    """The shape of an attention block.

    Attributes:
        query_heads: count.
        kv_heads: count; a divisor of it.
        head_dim: coordinates of a head.
        rotary: how many of them turn with the position (RoPE); 0 without positions in query and key.
        interleaved: planes are ``(2i, 2i + 1)`` instead of ``(i, i + rotary/2)``.
        norm: normalisation of queries and keys.
        numbered: query heads have numbers of their own (attention sinks), which move with them.
        locked: heads stay where they are: each has a bias of positions of its own (ALiBi, T5).
        values: what stands between values and the output projection.
        unit: queries and keys are normalised over the head behind RoPE, without a gain: they turn, without factors.
    """

    query_heads: int
    kv_heads: int
    head_dim: int
    rotary: int
    interleaved: bool = False
    norm: GainScope = GainScope.none
    numbered: bool = False
    locked: bool = False
    values: HeadValues = HeadValues.free
    unit: bool = False

    @property
    def gated(self) -> bool:
        """Whether a gate multiplies each attended coordinate; its rows are the axis ``attended_gate``."""
        return self.values is HeadValues.gated

    @property
    def of_keys(self) -> bool:
        """Whether values have no rows of their own: those of the keys, whose QK-norm leaves them no more than signs."""
        return self.values is HeadValues.keys

    @property
    def qk_norm(self) -> bool:
        return self.norm is not GainScope.none

    def heads(self, axis: str) -> int:
        """How many heads an axis has."""
        return self.query_heads if axis in ("query", "attended", "attended_gate") else self.kv_heads

    def planes(self) -> list[int]:
        """The coordinates that turn: first those of all planes, then their partners."""
        r = self.rotary
        first, second = (range(0, r, 2), range(1, r, 2)) if self.interleaved else (range(r // 2), range(r // 2, r))
        return [*first, *second]

    def turning(self, rotation: Rotation) -> list[int]:
        """The coordinates of query and key that only turn with their plane; ``full`` may mix planes."""
        return [] if rotation is Rotation.full else self.planes()

    def only_turns(self, axis: str, rotation: Rotation) -> bool:
        """Whether the heads of an axis only turn in their planes, all of them."""
        return axis in ("query", "key") and len(self.turning(rotation)) == self.head_dim

    def rest(self) -> list[int]:
        """The coordinates that do not turn."""
        return list(range(self.rotary, self.head_dim))

    @property
    def reorders(self) -> bool:
        """Whether queries and keys may carry an order of a head's coordinates: of those that do not turn."""
        return self.qk_norm and len(self.rest()) > 1

    @property
    def one_order(self) -> bool:
        """Whether that order is one for all heads, because they share their gains."""
        return self.reorders and not self.norm.per_head

    @property
    def own_orders(self) -> bool:
        """Whether each KV head has such an order of its own."""
        return self.reorders and self.norm.per_head

    @property
    def queries_per_kv(self) -> int:
        return self.query_heads // self.kv_heads


AttentionShape = HeadShape | LatentShape
BlockShape = AttentionShape | MlpShape
