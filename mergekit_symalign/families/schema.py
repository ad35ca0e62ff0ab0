"""The vocabulary of a family file: sizes, axes, tensors, and the variants it was checked for.

Every axis of every tensor has one of these names; a symmetry of a block moves some of them:

===================  ==========================================  =================================
axis                 length                                      moved by
===================  ==========================================  =================================
``query``            query heads × head dimension                query/key element
``key``              KV heads × head dimension                   its dual
``value``            KV heads × head dimension                   value/output element
``attended``         query heads × head dimension (read by o)    its dual
``attended_gate``    query heads × head dimension (multiplies)   order of ``value``
``query_gain``       head dimension (× query heads)              gain scale (QK-norm)
``key_gain``         head dimension (× KV heads)                 its dual
``gate``             neurons (of every expert)                   neuron permutation
``up``               neurons (of every expert)                   permutation, then scale
``down``             neurons (read by down)                      dual of ``up``
``expert``           experts                                     expert permutation
``head``             query or KV heads (beside a gain)           with the gain
``query_head``       query heads (numbers of each: sinks)        order of the heads
``q_nope``           heads × coordinates without positions       query/key element
``k_nope``           the same                                    its dual
``q_pe``             heads × coordinates that turn               query/key planes, one for all heads
``k_pe``             coordinates that turn                       its dual
``kv_latent``        latent of keys and values                   latent element
``kv_latent_gain``   the same, of its norm                       latent element, without signs
``kv_latent_read``   the same, of what reads it                  latent element
``q_latent``, …      latent of queries                           the same
``residual``         hidden size                                 residual element of the whole model
``vocabulary``       vocabulary, whatever its size               nothing
``position``         learned positions                           nothing
``other``            anything else (labels, pixels, …)           nothing
===================  ==========================================  =================================

A transform in front of a decoder that may be tied (BERT's masked-language head) writes ``residual`` as well, because
the decoder is then the embedding. One that a classifier reads moves along, which is exact too.

``expert`` beside a neuron axis and ``head`` beside a gain are stored apart and belong together: the symmetry acts on
experts × neurons, heads × coordinates.

A decoder's layer may attend to what an encoder writes: ``cross.query``, ``cross.key``, ``cross.value`` and
``cross.attended`` are the axes of that attention, which has no positions and as many KV heads as query heads.

The axes from ``q_nope`` on are of multi-head latent attention, beside ``value`` and ``attended``.

A layer may have further MLPs: an expert that every token passes (``shared.gate``, ``shared.up``, ``shared.down``), and
the MLP of those layers that have no experts (``dense.gate``, …).
"""

from __future__ import annotations

from enum import Enum
from typing import Any, Literal, Optional, Union

from pydantic import BaseModel, ConfigDict, Field, model_validator

from mergekit_symalign.symmetry.options import GainScope, LatentShape

Axis = Literal[
    "query",
    "key",
    "value",
    "attended",
    "attended_gate",
    "query_gain",
    "key_gain",
    "query_head",
    "gate",
    "up",
    "down",
    "expert",
    "shared.gate",
    "shared.up",
    "shared.down",
    "dense.gate",
    "dense.up",
    "dense.down",
    "cross.query",
    "cross.key",
    "cross.value",
    "cross.attended",
    "head",
    "q_nope",
    "k_nope",
    "q_pe",
    "k_pe",
    "kv_latent",
    "kv_latent_gain",
    "kv_latent_read",
    "q_latent",
    "q_latent_gain",
    "q_latent_read",
    "residual",
    "vocabulary",
    "position",
    "other",
]

LATENT_AXES: frozenset[str] = frozenset(LatentShape(1, 1, 2, 1, 1, 1).lengths())
HEAD_AXES: frozenset[str] = frozenset(
    ("query", "key", "value", "attended", "attended_gate", "query_gain", "key_gain", "query_head")
)
ATTENTION_AXES: frozenset[str] = HEAD_AXES | LATENT_AXES
MLP_AXES: frozenset[str] = frozenset(("gate", "up", "down", "expert"))


class BlockKind(str, Enum):
    """The blocks of a layer that have symmetries of their own."""

    attention = "attention"
    cross = "cross"  # the attention to what an encoder writes
    mlp = "mlp"
    shared = "shared"  # an expert that every token passes, beside those that a router chooses
    dense = "dense"  # the MLP of layers without experts, in a model whose other layers have some

    @property
    def is_mlp(self) -> bool:
        return self not in (BlockKind.attention, BlockKind.cross)

    @property
    def prefix(self) -> str:
        """What the names of its axes start with in a family file."""
        return "" if self in (BlockKind.attention, BlockKind.mlp) else f"{self.value}."

    @property
    def axes(self) -> frozenset[str]:
        """Its axes as the solvers know them, without the prefix."""
        if self is BlockKind.attention:
            return ATTENTION_AXES
        if self is BlockKind.cross:
            return frozenset(("query", "key", "value", "attended"))
        return MLP_AXES if self is BlockKind.mlp else MLP_AXES - {"expert"}

    @property
    def names(self) -> frozenset[str]:
        """Its axes as family files name them."""
        return frozenset(self.prefix + axis for axis in self.axes)


class Positions(str, Enum):
    """How positions enter the attention, which decides what query and key may do."""

    rope_half = "rope_half"  # rotary planes (i, i + r/2)
    rope_interleaved = "rope_interleaved"  # rotary planes (2i, 2i + 1)
    none = "none"  # learned positions, added to the embeddings


class MlpKind(str, Enum):
    """What a neuron is."""

    gated = "gated"  # act(gate) · up, read by down: permutation and signed scale
    clamped = "clamped"  # gated, and up is clamped, so that no factor passes: permutation
    plain = "plain"  # act(up), read by down: permutation

    @property
    def has_gate(self) -> bool:
        """Whether each neuron has a gate row."""
        return self is not MlpKind.plain


class StreamNorm(str, Enum):
    """How the norms on the residual stream normalise, which decides what may be done to its coordinates."""

    rms = "rms"  # by the root mean square
    layer = "layer"  # less the mean, by the standard deviation


class _Data(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class TensorSpec(_Data):
    """One tensor: the name of each of its axes.

    Attributes:
        axes: one name for each axis of the stored tensor, in order; several for an axis that is fused of them.
        fused_per_head: the parts of a fused axis follow one another for each KV head, not once (for each query head,
            where only these have parts).
        interleaved: a gate row and an up row by turns, neuron by neuron.
        fused_groups: how often the parts of a fused axis follow one another, each time with the next share of all.
        when: config key; the tensor exists only where that is true.
        unless: config key; the tensor exists only where that is not true.
        optional: the tensor may be absent (tied embeddings).
        stored_as: names that checkpoints may have instead (inside a layer: by the rest of the name, or in full with
            ``{layer}``); with ``*``, for tensors that are stored in pieces and joined when they are loaded. They tell a
            tensor of a block by its name alone (`is_block_tensor`); loads find names as transformers does.
        offset: what is added to the stored numbers to get the weights (1 for gains stored as γ − 1).
        read_by: for a norm on the residual stream: the tensors of the same layer (or the model) that read its output,
            if nothing else does; none where its output goes on along the stream.
        in_front: stored after the layers, and yet needed to run the first of them.
        any_shape: nothing is known of its axes, because no symmetry moves it.
        layers: which layers have it: an entry of the family's ``layer_kinds``; all of them if not given.
    """

    axes: tuple[Union[Axis, tuple[Axis, ...]], ...]
    fused_per_head: bool = False
    interleaved: bool = False
    fused_groups: int = 1
    when: Optional[str] = None
    unless: Optional[str] = None
    optional: bool = False
    stored_as: tuple[str, ...] = ()
    offset: float = 0.0
    read_by: tuple[str, ...] = ()
    in_front: bool = False
    any_shape: bool = False
    layers: Optional[str] = None

    @property
    def block(self) -> BlockKind | None:
        """The block whose symmetries move this tensor, if any do."""
        names = {name for axis in self.axes for name in ((axis,) if isinstance(axis, str) else axis)}
        return next((kind for kind in BlockKind if kind.names & names), None)


class Adjusted(_Data):
    """Neurons that are two thirds of what the config says, times a factor, in whole multiples (config keys).

    Attributes:
        when: whether they are.
        times: the factor, 1 if not given; neither it nor multiples count where the config has none.
        multiple_of: the multiples; a number stands for itself.
    """

    when: str
    times: Optional[str] = None
    multiple_of: Union[int, str]


class SizeKeys(_Data):
    """Where the transformers config keeps each size.

    Left out or absent from the config: as many KV heads as query heads, heads that share the hidden size evenly, four
    times as many neurons. Where the config key ``one_kv_head`` is true, all query heads share one KV head.
    """

    layers: str
    hidden: str
    query_heads: str
    kv_heads: Optional[str] = None
    one_kv_head: Optional[str] = None
    head_dim: Optional[str] = None
    neurons: Optional[str] = None
    experts: Optional[str] = None
    groups: Optional[str] = None  # of experts; a router that chooses groups first lets none leave its group
    shared: tuple[str, ...] = ()  # neurons of the shared expert: the product of these
    dense: Optional[str] = None  # neurons of the MLP of layers without experts
    nope: Optional[str] = None  # of multi-head latent attention: coordinates of a head without positions,
    rope: Optional[str] = None  # that turn,
    value: Optional[str] = None  # and of its value;
    kv_latent: Optional[str] = None  # of the latent of keys and values,
    q_latent: Optional[str] = None  # and of the latent of queries
    adjusted: Optional[Adjusted] = None

    def named(self) -> dict[str, str]:
        """The config key of each size that has one alone."""
        values = self.model_dump(exclude={"shared", "adjusted"})
        return {size: key for size, key in values.items() if key is not None}

    def config_keys(self) -> tuple[str, ...]:
        """All config keys that are named here."""
        return (*self.named().values(), *self.shared)


class LayersWhere(_Data):
    """Some of a model's layers, by what its config says; a layer belongs to them if it meets every condition.

    Attributes:
        key, value: a list in the config that has this value for the layer (one of these, if several).
        among: config key of a list of layers.
        but: config key of a list of layers that do not belong to them.
        only: these layers.
        first: config key of the first of them.
        last: config key of the last of them.
        every: config key of n: each n-th layer, counted from ``first``, or from 1 without one.
        other_than: another entry of ``layer_kinds``: all layers but those.
        within: another entry of ``layer_kinds``: those layers alone.
        when: config key; no layer belongs to them unless it is set.
        unless: config keys and a value of each; no layer belongs to them where the config has it.
    """

    key: Optional[str] = None
    value: Any = None
    among: Optional[str] = None
    but: Optional[str] = None
    only: Optional[tuple[int, ...]] = None
    first: Optional[str] = None
    last: Optional[str] = None
    every: Optional[str] = None
    other_than: Optional[str] = None
    within: Optional[str] = None
    when: Optional[str] = None
    unless: dict[str, Any] = Field(default_factory=dict)


class AttentionSpec(_Data):
    """What decides the admissible group of query and key.

    Attributes:
        positions: how positions enter.
        interleaved_when: config key; planes are neighbouring coordinates, as for ``rope_interleaved``, if that is true.
        rotary_factor: config keys of the share of each head that RoPE turns; the first that is there counts.
        rotary_dim: config key of the number of coordinates of each head that RoPE turns; all, where it is absent.
        without_rope: layers that are an exception.
        norm: normalisation of queries and keys.
        norm_when: config key; the normalisation is there only where that is true.
        layers: those that have an attention, an entry of ``layer_kinds``; all if not given.
        head_bias: each head has a bias of its own for each distance (ALiBi, T5), so that heads stay where they are. A
            config key: only where that is true, and there in place of RoPE.
        unit_norm: queries and keys are normalised over the head, behind RoPE and without a gain, in layers with RoPE. A
            config key: only where that is true.
        heads_stay: heads stay where they are for another reason: a tensor outside the layers has a number for each.
        value_norm: values are normalised over the head (RMS, without a gain), so that they have no scale. Under a
            QK-norm, without a tensor that has the axis ``value``, they are what the key projection writes.
    """

    positions: Positions
    interleaved_when: Optional[str] = None
    rotary_factor: tuple[str, ...] = ()
    rotary_dim: Optional[str] = None
    without_rope: Optional[LayersWhere] = None
    norm: GainScope = GainScope.none
    norm_when: Optional[str] = None
    layers: Optional[str] = None
    head_bias: Union[bool, str] = False
    unit_norm: Union[bool, str] = False
    heads_stay: bool = False
    value_norm: bool = False


class StreamSpec(_Data):
    """The residual stream.

    Attributes:
        norm: of all norms on it.
        returned: the model returns the stream itself, behind its last norm.
        shared: with another stack of layers, which has the same embeddings or reads what this one writes.
        computed_positions: positions are added to it that are calculated, not stored, so its coordinates are fixed.
    """

    norm: StreamNorm = StreamNorm.rms
    returned: bool = False
    shared: bool = False
    computed_positions: bool = False


class Tower(_Data):
    """Another stack of layers in a model's checkpoint.

    Attributes:
        family: of the stack.
        families: its config's ``model_type`` -> its family, where models differ; a stack of any other type passes
            through unaligned, as does one of a variant that its family was not checked for.
        config: the part of the config that describes it; empty for the whole.
        prefix: what its names start with; in a family with ``heads``, behind the family's own prefix.
    """

    family: Optional[str] = None
    families: dict[str, str] = Field(default_factory=dict)
    config: str = ""
    prefix: str

    @model_validator(mode="after")
    def _has_a_family(self) -> Tower:
        if (self.family is None) == (not self.families):
            raise ValueError(f"the tower {self.prefix} needs either family or families")
        return self


class Wrapper(_Data):
    """A file of a model around a text model: vision-language models have such files.

    Attributes:
        name: as the file is called.
        title: for people.
        architectures: transformers class names.
        config: the part of the config that describes the text model.
        text: what the names of the text model start with.
        text_families: the text config's ``model_type`` -> the family of the text model; for others the family of the
            causal language model that transformers has for it.
        passes_through: patterns of names outside the text model.
        tensors: of those that write to the text model's residual stream, by full name.
        towers: other stacks of layers, by name.
        stored_prefixes: as in `Family`.
    """

    name: str
    title: str
    architectures: tuple[str, ...]
    config: str = "text_config"
    text: str
    text_families: dict[str, str] = Field(default_factory=dict)
    passes_through: tuple[str, ...]
    tensors: dict[str, TensorSpec] = Field(default_factory=dict)
    towers: dict[str, Tower] = Field(default_factory=dict)
    stored_prefixes: dict[str, str] = Field(default_factory=dict)


class Family(_Data):
    """One family file.

    Attributes:
        name: as the file is called.
        title: for people.
        architectures: transformers class names.
        sizes: config keys.
        attention: what decides the admissible group of the heads.
        stream: what decides the admissible group of the residual stream.
        mlp: what a neuron is.
        gated_when: config key; the MLP is gated only where that is true, and plain otherwise.
        activation: config key of a plain MLP's activation, which decides whether its neurons have a scale.
        variants: config key -> the values this family was checked for (None: the key is absent); any other is refused.
        tensors: outside the layers, by full name.
        layer_prefix: what the names inside a layer start with; ``{layer}`` is its index.
        prefix: what models with a head put before the names above.
        heads: by how a class's name ends, the tensors of its head, by full name (`families/classes.py`).
        derives: classes that differ from those of ``architectures`` only in their head belong to the family too.
        task_heads: tensors of heads, by full name; none of them is in every model.
        config: the part of the config that all keys above are in; empty for the whole.
        passes_through: patterns of names outside this model (a vision tower's), which no symmetry moves.
        stored_prefixes: how names may begin in checkpoints and in MergeKit's plans -> how they begin here; the first
            that fits counts.
        towers: other stacks of layers in the same checkpoint, by name.
        layer: inside a layer, by the rest of the name.
        layer_kinds: names for some of the layers, where not all have the same tensors.
        buffers: names that old checkpoints carry beside the weights, and that are never merged.
        runs: whether its layers can be run one after another on prompts or images alone.
        layers_return_tuples: transformers' layers return their attention beside the hidden states.
        positions_after_padding: learned positions begin after the index of the padding token.
    """

    name: str
    title: str
    architectures: tuple[str, ...]
    sizes: SizeKeys
    attention: AttentionSpec
    stream: StreamSpec = StreamSpec()
    mlp: MlpKind = MlpKind.gated
    gated_when: Optional[str] = None
    activation: Optional[str] = None
    variants: dict[str, tuple[Any, ...]] = Field(default_factory=dict)
    tensors: dict[str, TensorSpec]
    layer_prefix: str
    layer: dict[str, TensorSpec]
    layer_kinds: dict[str, LayersWhere] = Field(default_factory=dict)
    prefix: str = ""
    heads: dict[str, dict[str, TensorSpec]] = Field(default_factory=dict)
    derives: bool = True
    config: str = ""
    passes_through: tuple[str, ...] = ()
    towers: dict[str, Tower] = Field(default_factory=dict)
    stored_prefixes: dict[str, str] = Field(default_factory=dict)
    task_heads: dict[str, TensorSpec] = Field(default_factory=dict)
    buffers: tuple[str, ...] = ()
    runs: bool = True
    layers_return_tuples: bool = False
    positions_after_padding: bool = False

    @model_validator(mode="after")
    def _readers_exist(self) -> Family:
        of_heads = {name: spec for head in self.heads.values() for name, spec in head.items()}
        known = {**self.tensors, **self.layer, **self.task_heads, **of_heads}
        for name, spec in known.items():
            if missing := set(spec.read_by) - known.keys():
                raise ValueError(f"{name} is read by {sorted(missing)}, which it does not list")
            if spec.layers is not None and spec.layers not in self.layer_kinds:
                raise ValueError(f"{name} is in layers {spec.layers}, which layer_kinds does not list")
        if self.attention.layers is not None and self.attention.layers not in self.layer_kinds:
            raise ValueError(f"attention.layers is {self.attention.layers}, which layer_kinds does not list")
        if "{layer}" not in self.layer_prefix:
            raise ValueError("layer_prefix has no {layer}")
        return self
