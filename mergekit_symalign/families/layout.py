"""A family applied to one config: every tensor of a model by name, its axes and sizes, and the blocks of its layers."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from functools import cached_property

from mergekit_symalign.families.geometry import Geometry
from mergekit_symalign.families.schema import MLP_AXES, BlockKind, Family, Positions, TensorSpec
from mergekit_symalign.families.towers import Layer, TowerLayer
from mergekit_symalign.symmetry.element import Fused, TensorAxes
from mergekit_symalign.symmetry.options import (
    AttentionShape,
    BlockShape,
    GainScope,
    HeadShape,
    HeadValues,
    MlpShape,
    NeuronScale,
)

_COUNTED_APART = MLP_AXES - {"expert"} | {"query_gain", "key_gain"}  # may have their experts or heads as another axis
_PASSES = TensorSpec(axes=(), optional=True, any_shape=True)


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
        own = self._claim_of(name)
        return own if own is not None or not self._passes(name) else Claim(None, name, _PASSES)

    def has(self, name: str) -> bool:
        """Whether the main stack has a tensor of exactly this name."""
        return self._claim_of(name) is not None

    @property
    def has_other_names(self) -> bool:
        """Whether checkpoints may have a tensor of the main stack under another name."""
        return any(spec.stored_as for spec in (*self.outside.values(), *self.inside.values()))

    def _claim_of(self, name: str) -> Claim | None:
        """The claim of a tensor of the main stack."""
        if name in self.outside:
            return Claim(None, name, self.outside[name])
        match = self._layer_name.fullmatch(name)
        if match and match[2] in self.inside and self._has(int(match[1]), self.inside[match[2]]):
            return Claim(int(match[1]), match[2], self.inside[match[2]])
        return None

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
