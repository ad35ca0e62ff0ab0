"""From a transformers config and its family to the blocks of one model, by tensor name."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from fnmatch import fnmatchcase
from functools import cache, cached_property
from math import prod
from typing import Any

from mergekit_symalign.errors import ArchitectureError
from mergekit_symalign.families.known import OTHERWISE, families, family_of, lookup, supported_architectures
from mergekit_symalign.families.layers import layers_where
from mergekit_symalign.families.schema import (
    MLP_AXES,
    Adjusted,
    AttentionSpec,
    BlockKind,
    Family,
    MlpKind,
    Positions,
    TensorSpec,
    Tower,
)
from mergekit_symalign.families.towers import Layer, TowerLayer
from mergekit_symalign.symmetry.element import Fused, TensorAxes
from mergekit_symalign.symmetry.options import (
    AttentionShape,
    BlockShape,
    GainScope,
    HeadShape,
    HeadValues,
    LatentShape,
    MlpShape,
    NeuronScale,
)

__all__ = ["families", "lookup", "supported_architectures"]  # of `known`

_COUNTED_APART = MLP_AXES - {"expert"} | {"query_gain", "key_gain"}  # may have their experts or heads as another axis
_PASSES = TensorSpec(axes=(), optional=True, any_shape=True)
_PROPORTIONAL = "proportional"  # of a RoPE that turns all planes of a head, the last of them by 0
_POSITIVELY_HOMOGENEOUS = frozenset(("relu",))


@dataclass(frozen=True)
class Geometry:
    """The sizes that two models must share to be aligned (all counts)."""

    hidden: int
    query_heads: int
    kv_heads: int
    head_dim: int
    neurons: int
    experts: int = 1
    groups: int = 1
    shared: int = 0
    dense: int = 0
    nope: int = 0
    rope: int = 0
    value: int = 0
    kv_latent: int = 0
    q_latent: int = 0

    def length(self, axis: str, gains: GainScope = GainScope.head) -> int | None:
        """Whole length of an axis of a block, or None where any is right (vocabulary, labels)."""
        every = gains.per_head
        if self.latent is not None and axis in (lengths := self.latent.lengths()):
            return lengths[axis]
        return {
            "query": self.query_heads * self.head_dim,
            **dict.fromkeys(BlockKind.cross.names, self.query_heads * self.head_dim),
            "attended": self.query_heads * self.head_dim,
            "key": self.kv_heads * self.head_dim,
            "value": self.kv_heads * self.head_dim,
            "attended_gate": self.query_heads * self.head_dim,
            "query_gain": self.head_dim * (self.query_heads if every else 1),
            "key_gain": self.head_dim * (self.kv_heads if every else 1),
            "query_head": self.query_heads,
            "gate": self.experts * self.neurons,
            "up": self.experts * self.neurons,
            "down": self.experts * self.neurons,
            "expert": self.experts,
            **{f"shared.{one}": self.shared for one in ("gate", "up", "down")},
            **{f"dense.{one}": self.dense for one in ("gate", "up", "down")},
            "residual": self.hidden,
        }.get(axis)

    @property
    def latent(self) -> LatentShape | None:
        """Of multi-head latent attention, with planes that are not interleaved; None for any other."""
        if not self.kv_latent:
            return None
        return LatentShape(self.query_heads, self.nope, self.rope, self.value, self.kv_latent, self.q_latent)

    def mlp(self, kind: BlockKind) -> tuple[int, int]:
        """Neurons and experts of one of a layer's MLPs."""
        others = {BlockKind.shared: self.shared, BlockKind.dense: self.dense}
        return (others[kind], 1) if kind in others else (self.neurons, self.experts)

    def differences(self, other: Geometry) -> list[str]:
        """Each size in which the two differ, as ``name 8 != 4``."""
        pairs = ((f.name, getattr(self, f.name), getattr(other, f.name)) for f in fields(self))
        return [f"{name} {mine} != {theirs}" for name, mine, theirs in pairs if mine != theirs]


@dataclass(frozen=True)
class Claim:
    """What a family says about one tensor of a model.

    Attributes:
        layer: index of the layer, None outside the layers.
        part: the name inside the layer (the full name outside).
        spec: its axes.
    """

    layer: int | None
    part: str
    spec: TensorSpec


@dataclass(frozen=True)
class Placed:
    """A tensor in the stack of layers that it belongs to.

    Attributes:
        layout: of that stack.
        claim: what its family says of the tensor.
        tower: the name of the stack; empty for the main one.
    """

    layout: ModelLayout
    claim: Claim
    tower: str = ""

    @property
    def name(self) -> str:
        """Its full name."""
        layer = self.claim.layer
        return self.claim.part if layer is None else self.layout.name(layer, self.claim.part)

    @property
    def layer(self) -> Layer | None:
        """The layer among those of all stacks; None outside the layers."""
        index = self.claim.layer
        return TowerLayer(self.tower, index) if self.tower and index is not None else index

    @property
    def block(self) -> tuple[Layer, BlockKind] | None:
        """The block whose symmetries move the tensor, if any do."""
        layer, kind = self.layer, self.claim.spec.block
        return None if layer is None or kind is None else (layer, kind)


@dataclass(frozen=True)
class ModelLayout:
    """A family applied to one config: every tensor of the model, with its axes and sizes.

    Attributes:
        family, geometry, layers: what it was made from.
        outside: tensors outside the layers, by name.
        inside: tensors of the layers, by the rest of their name; `parts` are those of one layer.
        rotary: coordinates of each head that RoPE turns, in layers that have it.
        interleaved: rotary planes are neighbouring coordinates.
        without_rope: layers that have none.
        norm: normalisation of queries and keys.
        locked: each head has a bias of positions of its own.
        unit_norm: queries and keys are normalised without a gain, in layers with RoPE.
        neuron_scale: which factors the neurons have.
        activation: of a plain MLP, as the config names it; None where it decides nothing.
        absent: tensors that the family knows and this config does not have, by the rest of their name.
        layer_kinds: the layers of each kind, where they differ in their tensors.
        towers: other stacks of layers, by name. What is said of layers and tensors here leaves them out, and `claim`
            passes their tensors through; `placed`, `blocks` and `block_shape` know all stacks.
    """

    family: Family
    geometry: Geometry
    layers: int
    outside: Mapping[str, TensorSpec]
    inside: Mapping[str, TensorSpec]
    rotary: int
    interleaved: bool = False
    without_rope: frozenset[int] = frozenset()
    norm: GainScope = GainScope.none
    locked: bool = False
    unit_norm: bool = False
    neuron_scale: NeuronScale = NeuronScale.signed
    activation: str | None = None
    absent: frozenset[str] = frozenset()
    layer_kinds: Mapping[str, frozenset[int]] = field(default_factory=dict)
    towers: Mapping[str, ModelLayout] = field(default_factory=dict)

    @cached_property
    def _layer_name(self) -> re.Pattern[str]:
        prefix = re.escape(self._layer_prefix).replace(re.escape("{layer}"), r"(\d+)")
        return re.compile(prefix + "(.+)")

    @property
    def _layer_prefix(self) -> str:
        return self.family.prefix + self.family.layer_prefix

    def claim(self, name: str) -> Claim | None:
        """The one rule that claims this tensor, or None if the family does not know it."""
        name = self.canonical(name)
        if name in self.outside:
            return Claim(None, name, self.outside[name])
        match = self._layer_name.fullmatch(name)
        if match and match[2] in self.inside and self._has(int(match[1]), self.inside[match[2]]):
            return Claim(int(match[1]), match[2], self.inside[match[2]])
        return Claim(None, name, _PASSES) if self._passes(name) else None

    def placed(self, name: str) -> Placed | None:
        """A tensor in its own stack of layers; None if no family knows it."""
        name = self.canonical(name)
        if not self._is_own(name):
            towers = ((tower, layout, layout.claim(name)) for tower, layout in self.towers.items())
            found = (Placed(layout, claim, tower) for tower, layout, claim in towers if claim is not None)
            if (placed := next(found, None)) is not None:
                return placed
        claim = self.claim(name)
        return None if claim is None else Placed(self, claim)

    def in_layers(self) -> list[Placed]:
        """The tensors inside the layers of all stacks."""
        return [
            Placed(of, Claim(layer, part, spec), tower)
            for tower, of in {"": self, **self.towers}.items()
            for layer in range(of.layers)
            for part, spec in of.parts(layer).items()
        ]

    def stack(self, layer: Layer) -> tuple[ModelLayout, int]:
        """The stack that a layer is in, and its index there."""
        return (self, layer) if isinstance(layer, int) else (self.towers[layer.tower], layer.index)

    @property
    def stacks(self) -> tuple[ModelLayout, ...]:
        """The main stack of layers, and the others."""
        return (self, *self.towers.values())

    def canonical(self, name: str) -> str:
        """The name of a tensor in transformers' model, for one that checkpoints and MergeKit's plans may have."""
        if self._is_known(name):
            return name
        prefixes = self.family.stored_prefixes.items()
        others = (new + name.removeprefix(old) for old, new in prefixes if name.startswith(old))
        return next(filter(self._is_known, others), name)

    def _is_known(self, name: str) -> bool:
        return self._is_own(name) or self._passes(name)

    def _passes(self, name: str) -> bool:
        """Whether no symmetry of the main stack moves a tensor of this name."""
        in_tower = any(name.startswith(of.family.prefix) for of in self.towers.values())
        return in_tower or any(fnmatchcase(name, pattern) for pattern in self.family.passes_through)

    def _is_own(self, name: str) -> bool:
        """Whether a tensor is of the main stack."""
        return name in self.outside or self._layer_name.fullmatch(name) is not None

    def layer_of(self, name: str) -> int | None:
        """The layer that a tensor lies in by its name, whether the family knows the tensor or not."""
        match = self._layer_name.fullmatch(self.canonical(name))
        return int(match[1]) if match else None

    def is_around_text(self, name: str) -> bool:
        """Whether a tensor lies outside the text model of a model around one (a vision tower's): no text reaches it."""
        name = self.canonical(name)
        around = any(fnmatchcase(name, pattern) for pattern in self.family.passes_through)
        return bool(self.family.config) and around and self.layer_of(name) is None

    def is_buffer(self, name: str) -> bool:
        """Whether old checkpoints carry this beside the weights."""
        return any(fnmatchcase(name, pattern) for of in self.stacks for pattern in of.family.buffers)

    def is_absent(self, name: str) -> bool:
        """Whether models of this family have such a tensor, but not with this config, or not in this layer."""
        name = self.canonical(name)
        return any(of._lacks(name) for of in self.stacks)

    def _lacks(self, name: str) -> bool:
        match = self._layer_name.fullmatch(self.canonical(name))
        if match is None:
            return False
        elsewhere = match[2] in self.inside and not self._has(int(match[1]), self.inside[match[2]])
        return elsewhere or match[2] in self.absent

    def name(self, layer: int, part: str) -> str:
        """Full name of a tensor inside a layer."""
        return self._layer_prefix.format(layer=layer) + part

    def parts(self, layer: int) -> dict[str, TensorSpec]:
        """The tensors of one layer, by the rest of their name."""
        return {part: spec for part, spec in self.inside.items() if self._has(layer, spec)}

    def _has(self, layer: int, spec: TensorSpec) -> bool:
        attends = self.family.attention.layers if spec.block is BlockKind.attention else None
        kind = spec.layers or attends
        return kind is None or layer in self.layer_kinds[kind]

    def kinds(self, layer: int) -> tuple[BlockKind, ...]:
        """The blocks of one layer."""
        there = {spec.block for spec in self.parts(layer).values()}
        return tuple(kind for kind in BlockKind if kind in there)

    def blocks(self) -> tuple[tuple[Layer, BlockKind], ...]:
        """The blocks of all layers of all stacks."""
        own = ((layer, kind) for layer in range(self.layers) for kind in self.kinds(layer))
        towers = ((tower, i, of) for tower, of in self.towers.items() for i in range(of.layers))
        others = ((TowerLayer(tower, i), kind) for tower, i, of in towers for kind in of.kinds(i))
        return (*own, *others)

    def block(self, kind: BlockKind) -> dict[str, TensorSpec]:
        """The tensors of a block, by their name inside the layer."""
        return {part: spec for part, spec in self.inside.items() if spec.block is kind}

    def block_shape(self, layer: Layer, kind: BlockKind) -> BlockShape:
        """The heads or neurons of a block."""
        of, index = self.stack(layer)
        return of.mlp_shape(kind) if kind.is_mlp else of.attention_shape(index, kind)

    def attention_shape(self, layer: int, kind: BlockKind) -> AttentionShape:
        """The heads of a block; those of a layer's own attention for a block that has none."""
        g, cross = self.geometry, kind is BlockKind.cross
        return HeadShape(g.query_heads, g.query_heads, g.head_dim, 0) if cross else self.head_shape(layer)

    def shape(self, spec: TensorSpec) -> tuple[int | None, ...]:
        """The shape a tensor must be stored in; None where any length is right."""
        lengths = [self._length(self._named(axis, spec)) for axis in spec.axes]
        if (joined := _joined(spec)) is not None:
            i, j = joined
            whole = lengths[j] or 0
            lengths[i] = self.geometry.experts if spec.axes[i] == "expert" else whole // self.geometry.head_dim
            lengths[j] = whole // (lengths[i] or 1)
        return tuple(lengths)

    def axes(self, spec: TensorSpec) -> TensorAxes:
        """What the axes of a stored tensor are, as the solvers know them."""
        prefix = "" if spec.block is None else spec.block.prefix
        names = [_without_prefix(self._named(axis, spec), prefix) for axis in spec.axes]
        if (joined := _joined(spec)) is None:
            return TensorAxes(tuple(names), None, spec.offset)
        i, j = joined
        names[i] = names.pop(j)
        return TensorAxes(tuple(names), (i, j, self.shape(spec)[j] or 0), spec.offset)

    def head_shape(self, layer: int) -> AttentionShape:
        """The heads of a layer, and how positions enter its queries and keys."""
        g, attention = self.geometry, self.family.attention
        if g.latent is not None:
            return replace(g.latent, interleaved=self.interleaved)
        turning = attention.positions is not Positions.none and layer not in self.without_rope and not self.locked
        rotary = self.rotary if turning else 0
        axes = {name for spec in self.inside.values() for axis in spec.axes for name in _names(axis)}
        sizes = (g.query_heads, g.kv_heads, g.head_dim, rotary)
        numbered, values = "query_head" in axes, self._values(axes)
        unit, locked = self.unit_norm and turning, self.locked or attention.heads_stay
        return HeadShape(*sizes, self.interleaved, self.norm, numbered, locked, values, unit)

    def _values(self, axes: set[str]) -> HeadValues:
        if "attended_gate" in axes:
            return HeadValues.gated
        if "value" not in axes:
            return HeadValues.keys
        return HeadValues.normed if self.family.attention.value_norm else HeadValues.free

    def mlp_shape(self, kind: BlockKind = BlockKind.mlp) -> MlpShape:
        """The neurons of one of a layer's MLPs, and which factors they have."""
        groups = self.geometry.groups if kind is BlockKind.mlp else 1
        return MlpShape(*self.geometry.mlp(kind), self.neuron_scale, self.family.mlp.has_gate, groups)

    def _named(self, axis: str | tuple[str, ...], spec: TensorSpec) -> str | Fused:
        if isinstance(axis, str):
            return axis
        groups = self.geometry.experts if "expert" in spec.axes else 1
        groups = max(groups, spec.fused_groups)
        if spec.fused_per_head:
            groups = self.geometry.kv_heads if {"key", "value"} & set(axis) else self.geometry.query_heads
        groups = self.geometry.experts * self.geometry.neurons if spec.interleaved else groups
        return Fused(tuple((part, self.geometry.length(part, self.norm) or 0) for part in axis), groups)

    def _length(self, axis: str | Fused) -> int | None:
        if isinstance(axis, str):
            return self.geometry.length(axis, self.norm)
        return sum(length for _, length in axis.parts)

    @property
    def has_qk_norm(self) -> bool:
        return self.norm is not GainScope.none


def _joined(spec: TensorSpec) -> tuple[int, int] | None:
    """The positions of ``expert`` or ``head`` and of the axis it belongs to, if the tensor has both."""
    first = next((i for i, axis in enumerate(spec.axes) if axis in ("expert", "head")), None)
    second = next((i for i, axis in enumerate(spec.axes) if _names(axis) & _COUNTED_APART), None)
    return None if first is None or second is None else (first, second)


def _without_prefix(axis: str | Fused, prefix: str) -> str | Fused:
    if isinstance(axis, str):
        return axis.removeprefix(prefix)
    return Fused(tuple((name.removeprefix(prefix), length) for name, length in axis.parts), axis.groups)


def _names(axis: str | tuple[str, ...]) -> set[str]:
    return {axis} if isinstance(axis, str) else set(axis)


def is_block_tensor(name: str) -> bool:
    """Whether any family takes a tensor of this name for part of an attention block or MLP."""
    return any(re.search(pattern, name) for pattern in _block_patterns())


@cache
def _block_patterns() -> tuple[str, ...]:
    patterns = set()
    for family in families().values():
        for part, spec in family.layer.items():
            if spec.block is not None:
                inside = [part, *(name.rpartition("{layer}.")[2] for name in spec.stored_as)]
                patterns |= {rf"(^|\.)\d+\.{re.escape(name).replace(re.escape('*'), '[0-9]+')}$" for name in inside}
    return tuple(sorted(patterns))


def resolve(config: Any, *, model: str, family: Family | None = None) -> ModelLayout:
    """The layout of the model that this transformers config describes.

    Args:
        config: a transformers config (attributes, and dicts inside).
        model: the model's name, for errors.
        family: that describes it; by the class that the config names if not given.

    Raises:
        ArchitectureError: no family has this architecture, or the family was not checked for this variant of it.
    """
    family = family or family_of(config, model)
    towers = _towers(config, family, model)
    config = text_config(config, family)
    if family.gated_when is not None and not lookup(config, family.gated_when):
        family = family.model_copy(update={"mlp": MlpKind.plain})
    for key, allowed in family.variants.items():
        wrong = [value for value in _values(config, key) if value not in allowed]
        if wrong:
            raise ArchitectureError(
                f"model {model}",
                f"config.{key} is {wrong[0]!r}; family {family.name} ({family.title}) is known only for "
                f"{', '.join(map(repr, allowed))}",
                OTHERWISE,
            )
    geometry = _geometry(config, family, model)
    attention = family.attention
    normalised = attention.norm_when is None or lookup(config, attention.norm_when)
    layers = lookup(config, family.sizes.layers)
    kinds = {k: layers_where(of, config, layers, family.layer_kinds) for k, of in family.layer_kinds.items()}
    flat = attention.without_rope
    inside = {k: spec for k, spec in _present(config, family.layer).items() if _has_neurons(geometry, spec.block)}
    return ModelLayout(
        family=family,
        geometry=geometry,
        layers=layers,
        outside=_present(config, {family.prefix + k: x for k, x in family.tensors.items()} | family.task_heads),
        inside=inside,
        rotary=_rotary(config, family, geometry, model),
        interleaved=_interleaved(config, attention),
        without_rope=layers_where(flat, config, layers, family.layer_kinds) if flat else frozenset(),
        norm=attention.norm if normalised else GainScope.none,
        locked=_is_set(config, attention.head_bias),
        unit_norm=_is_set(config, attention.unit_norm),
        neuron_scale=_neuron_scale(config, family),
        activation=_activation(config, family),
        absent=frozenset(family.layer) - inside.keys(),
        layer_kinds=kinds,
        towers=towers,
    )


def _towers(config: Any, family: Family, model: str) -> dict[str, ModelLayout]:
    """The other stacks of layers, by name; those whose family may be unknown only where they are of a known variant."""
    found = {}
    for name, tower in family.towers.items():
        try:
            of = _family_of_tower(config, tower)
            if of is not None:
                found[name] = resolve(config, model=model, family=of)
        except ArchitectureError:
            if tower.family is not None:
                raise
    return found


def _family_of_tower(config: Any, tower: Tower) -> Family | None:
    part = lookup(config, tower.config) if tower.config else config
    name = tower.family or tower.families.get(str(getattr(part, "model_type", None)))
    changes = {"config": tower.config, "prefix": tower.prefix, "passes_through": (f"{tower.prefix}*",)}
    return None if name is None else families()[name].model_copy(update=changes)


def _values(config: Any, key: str) -> list[Any]:
    """The value of a key; the values of all kinds of layers, where each kind has its own RoPE.

    Which part of a head turns is nobody's question under ``proportional``: planes beyond that part turn by 0.
    """
    ropes = _ropes(config)
    if key.endswith("partial_rotary_factor"):
        ropes = [rope for rope in ropes if rope.get("rope_type") != _PROPORTIONAL]
        if not ropes and _ropes(config):
            return []
    if ropes and key.startswith("rope_parameters."):
        return [lookup(rope, key.removeprefix("rope_parameters.")) for rope in ropes]
    return [lookup(config, key)]


def _ropes(config: Any) -> list[Mapping[str, Any]]:
    """What the config says of RoPE: once, or for each kind of layers."""
    rope = lookup(config, "rope_parameters")
    kinds = [x for x in rope.values() if isinstance(x, Mapping)] if isinstance(rope, Mapping) else []
    return kinds or ([rope] if isinstance(rope, Mapping) else [])


def _present(config: Any, tensors: Mapping[str, TensorSpec]) -> dict[str, TensorSpec]:
    return {name: spec for name, spec in tensors.items() if _exists(config, spec)}


def _exists(config: Any, spec: TensorSpec) -> bool:
    wanted = spec.when is None or bool(lookup(config, spec.when))
    return wanted and (spec.unless is None or not lookup(config, spec.unless))


def _activation(config: Any, family: Family) -> str | None:
    """Of a plain MLP."""
    plain = family.mlp is MlpKind.plain and family.activation is not None
    return lookup(config, family.activation) if plain and family.activation is not None else None


def _has_neurons(geometry: Geometry, block: BlockKind | None) -> bool:
    """Whether a model has a block: one without experts, or shared ones, has no tensors of them."""
    return block is None or not block.is_mlp or min(geometry.mlp(block)) > 0


def _is_set(config: Any, key: bool | str) -> bool:
    return key if isinstance(key, bool) else bool(lookup(config, key))


def _neuron_scale(config: Any, family: Family) -> NeuronScale:
    if family.mlp is MlpKind.gated:
        return NeuronScale.signed
    return NeuronScale.positive if _activation(config, family) in _POSITIVELY_HOMOGENEOUS else NeuronScale.none


def _geometry(config: Any, family: Family, model: str) -> Geometry:
    """Sizes from the config, with transformers' own rules for those it may leave out."""
    keys = family.sizes.named()
    sizes: dict[str, Any] = {key: lookup(config, where) for key, where in keys.items() if key != "layers"}
    for size, value in sizes.items():
        if isinstance(value, (list, tuple)):
            raise ArchitectureError(f"model {model}", f"config.{keys[size]} differs between layers: {value}", OTHERWISE)
    sizes = dict.fromkeys(f.name for f in fields(Geometry)) | sizes
    sizes["kv_heads"] = 1 if sizes.pop("one_kv_head", None) else sizes["kv_heads"] or sizes["query_heads"]
    sizes |= {key: sizes[key] or 0 for key in ("nope", "rope", "value", "kv_latent", "q_latent")}
    sizes["head_dim"] = sizes["head_dim"] or sizes["nope"] + sizes["rope"] or sizes["hidden"] // sizes["query_heads"]
    sizes["neurons"] = _adjusted(config, family.sizes.adjusted, sizes["neurons"] or 4 * sizes["hidden"])
    sizes["groups"] = sizes["groups"] or 1
    sizes["experts"] = 1 if sizes["experts"] is None else sizes["experts"]
    sizes["dense"] = sizes["dense"] or 0
    sizes["shared"] = prod(lookup(config, key) or 0 for key in family.sizes.shared) if family.sizes.shared else 0
    geometry = Geometry(**sizes)
    if geometry.query_heads % geometry.kv_heads:
        raise ArchitectureError(
            f"model {model}",
            f"{geometry.query_heads} query heads cannot share {geometry.kv_heads} KV heads evenly",
            "Check the model's config.json",
        )
    if geometry.latent is not None and geometry.query_heads != geometry.kv_heads:
        raise ArchitectureError(
            f"model {model}",
            f"it has {geometry.query_heads} query heads and {geometry.kv_heads} KV heads, but heads that share a "
            "latent have keys of their own",
            "Check the model's config.json",
        )
    return geometry


def _interleaved(config: Any, attention: AttentionSpec) -> bool:
    when = attention.interleaved_when
    return attention.positions is Positions.rope_interleaved or (when is not None and bool(lookup(config, when)))


def _adjusted(config: Any, rule: Adjusted | None, neurons: int) -> int:
    if rule is None or not lookup(config, rule.when):
        return neurons
    neurons = int(2 * neurons / 3)
    if (factor := 1 if rule.times is None else lookup(config, rule.times)) is None:
        return neurons
    multiple: int = rule.multiple_of if isinstance(rule.multiple_of, int) else lookup(config, rule.multiple_of)
    return multiple * -(-int(factor * neurons) // multiple)


def _rotary(config: Any, family: Family, geometry: Geometry, model: str) -> int:
    """How many coordinates of each head RoPE turns."""
    factors = {_factor(config, family, rope) for rope in _ropes(config) or [{}]}
    if len(factors) > 1:
        raise ArchitectureError(
            f"model {model}", f"its kinds of layers turn different parts of each head ({sorted(factors)})", OTHERWISE
        )
    counted = lookup(config, family.attention.rotary_dim) if family.attention.rotary_dim is not None else None
    rotary = int((geometry.rope or geometry.head_dim) * factors.pop()) if counted is None else int(counted)
    if rotary % 2 and family.attention.positions is not Positions.none:
        whole = rotary == geometry.head_dim
        what = f"head dimension {rotary}" if whole else f"rotary part {rotary} of the head dimension"
        raise ArchitectureError(
            f"model {model}", f"{what} is odd, so it has no rotary planes", "Check the model's config.json"
        )
    return rotary


def _factor(config: Any, family: Family, rope: Mapping[str, Any]) -> float:
    """Which share of each head turns, in layers with this RoPE."""
    if rope.get("rope_type") == _PROPORTIONAL:
        return 1.0
    inside = ((key, key.removeprefix("rope_parameters.")) for key in family.attention.rotary_factor)
    factors = (lookup(config if key == own else rope, own) for key, own in inside)
    return next((factor for factor in factors if factor is not None), 1.0)


def text_config(config: Any, family: Family) -> Any:
    """The part of a config that describes the model of a family.

    Raises:
        ArchitectureError: if it has none.
    """
    part = lookup(config, family.config) if family.config else config
    if part is None:
        raise ArchitectureError(
            f"family {family.name}", f"the model's config has no {family.config}", "Check the model's config.json"
        )
    return part
