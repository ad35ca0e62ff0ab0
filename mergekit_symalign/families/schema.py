"""The vocabulary of a family file: sizes, axes, tensors, and the variants it was checked for.

Every axis of every tensor has one of these names; a symmetry of a block moves some of them:

===================  ==========================================  =================================
axis                 length                                      moved by
===================  ==========================================  =================================
``query``            query heads × head dimension                query/key element
``key``              KV heads × head dimension                   its dual
``value``            KV heads × head dimension                   value/output element
``attended``         query heads × head dimension (read by o)    its dual
``query_gain``       head dimension                              gain scale (QK-norm)
``key_gain``         head dimension                              its dual
``gate``             neurons                                     neuron permutation
``up``               neurons                                     permutation, then scale
``down``             neurons (read by down)                      dual of ``up``
``residual``         hidden size                                 nothing (yet)
``vocabulary``       vocabulary, whatever its size               nothing
``label``            classes of a task head                      nothing
===================  ==========================================  =================================
"""

from __future__ import annotations

from enum import Enum
from typing import Any, Literal, Optional

from pydantic import BaseModel, ConfigDict, Field, model_validator

Axis = Literal[
    "query",
    "key",
    "value",
    "attended",
    "query_gain",
    "key_gain",
    "gate",
    "up",
    "down",
    "residual",
    "vocabulary",
    "label",
]

ATTENTION_AXES: frozenset[str] = frozenset(("query", "key", "value", "attended", "query_gain", "key_gain"))
MLP_AXES: frozenset[str] = frozenset(("gate", "up", "down"))


class BlockKind(str, Enum):
    """The two kinds of blocks that have symmetries of their own."""

    attention = "attention"
    mlp = "mlp"

    @property
    def axes(self) -> frozenset[str]:
        return ATTENTION_AXES if self is BlockKind.attention else MLP_AXES


class Positions(str, Enum):
    """How positions enter the attention, which decides what query and key may do."""

    rope_half = "rope_half"  # rotary planes (i, i + d/2)


class QueryKeyNorm(str, Enum):
    """A normalisation of queries and keys, which leaves only signs and a trade between the gains."""

    none = "none"
    head = "head"  # RMSNorm over each head, one gain per coordinate shared by all heads


class _Data(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class TensorSpec(_Data):
    """One tensor: the name of each of its axes.

    Attributes:
        axes: one name for each axis of the stored tensor, in order.
        when: config key; the tensor exists only where that is true.
        optional: the tensor may be absent (tied embeddings).
        read_by: for a norm: the tensors of the same layer (or the model) that read its output.
    """

    axes: tuple[Axis, ...]
    when: Optional[str] = None
    optional: bool = False
    read_by: tuple[str, ...] = ()

    @property
    def block(self) -> BlockKind | None:
        """The block whose symmetries move this tensor, if any do."""
        return next((kind for kind in BlockKind if kind.axes.intersection(self.axes)), None)


class SizeKeys(_Data):
    """Where the transformers config keeps each size."""

    layers: str
    hidden: str
    query_heads: str
    kv_heads: str
    head_dim: str
    neurons: str


class AttentionSpec(_Data):
    positions: Positions
    norm: QueryKeyNorm = QueryKeyNorm.none


class Family(_Data):
    """One family file.

    Attributes:
        name: as the file is called.
        title: for people.
        architectures: transformers class names.
        sizes: config keys.
        attention: what decides the admissible group.
        variants: config key -> the values this family was checked for (None: the key is absent); any other is refused.
        tensors: outside the layers, by full name.
        layer_prefix: what the names inside a layer start with; ``{layer}`` is its index.
        layer: inside a layer, by the rest of the name.
        buffers: names that old checkpoints carry beside the weights, and that are never merged.
    """

    name: str
    title: str
    architectures: tuple[str, ...]
    sizes: SizeKeys
    attention: AttentionSpec
    variants: dict[str, tuple[Any, ...]] = Field(default_factory=dict)
    tensors: dict[str, TensorSpec]
    layer_prefix: str
    layer: dict[str, TensorSpec]
    buffers: tuple[str, ...] = ()

    @model_validator(mode="after")
    def _readers_exist(self) -> Family:
        known = {*self.tensors, *self.layer}
        for name, spec in {**self.tensors, **self.layer}.items():
            if missing := set(spec.read_by) - known:
                raise ValueError(f"family {self.name}: {name} is read by {sorted(missing)}, which it does not list")
        if "{layer}" not in self.layer_prefix:
            raise ValueError(f"family {self.name}: layer_prefix has no {{layer}}")
        return self
