"""From a transformers config and its family to the blocks of one model, by tensor name."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, fields
from fnmatch import fnmatchcase
from functools import cache, cached_property
from importlib.resources import files
from typing import Any

import yaml

from mergekit_symalign.errors import ArchitectureError
from mergekit_symalign.families.schema import BlockKind, Family, Positions, TensorSpec
from mergekit_symalign.symmetry.element import Axes
from mergekit_symalign.symmetry.options import GainScope, HeadShape


@dataclass(frozen=True)
class Geometry:
    """The sizes that two models must share to be aligned (all counts)."""

    hidden: int
    query_heads: int
    kv_heads: int
    head_dim: int
    neurons: int

    def length(self, axis: str, gains: GainScope = GainScope.head) -> int | None:
        """Length of an axis, or None where any is right (vocabulary, labels)."""
        every = gains is GainScope.all
        return {
            "query": self.query_heads * self.head_dim,
            "attended": self.query_heads * self.head_dim,
            "key": self.kv_heads * self.head_dim,
            "value": self.kv_heads * self.head_dim,
            "query_gain": self.head_dim * (self.query_heads if every else 1),
            "key_gain": self.head_dim * (self.kv_heads if every else 1),
            "gate": self.neurons,
            "up": self.neurons,
            "down": self.neurons,
            "residual": self.hidden,
        }.get(axis)

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
class ModelLayout:
    """A family applied to one config: every tensor of the model, with its axes and sizes.

    Attributes:
        family, geometry, layers: what it was made from.
        outside: tensors outside the layers, by name.
        inside: tensors of every layer, by the rest of their name.
        rotary: coordinates of each head that RoPE turns, in layers that have it.
        without_rope: layers that have none.
    """

    family: Family
    geometry: Geometry
    layers: int
    outside: Mapping[str, TensorSpec]
    inside: Mapping[str, TensorSpec]
    rotary: int
    without_rope: frozenset[int] = frozenset()

    @cached_property
    def _layer_name(self) -> re.Pattern[str]:
        prefix = re.escape(self.family.layer_prefix).replace(re.escape("{layer}"), r"(\d+)")
        return re.compile(prefix + "(.+)")

    def claim(self, name: str) -> Claim | None:
        """The one rule that claims this tensor, or None if the family does not know it."""
        if name in self.outside:
            return Claim(None, name, self.outside[name])
        match = self._layer_name.fullmatch(name)
        if match and match[2] in self.inside:
            return Claim(int(match[1]), match[2], self.inside[match[2]])
        return None

    def is_buffer(self, name: str) -> bool:
        """Whether old checkpoints carry this beside the weights."""
        return any(fnmatchcase(name, pattern) for pattern in self.family.buffers)

    def name(self, layer: int, part: str) -> str:
        """Full name of a tensor inside a layer."""
        return self.family.layer_prefix.format(layer=layer) + part

    def block(self, kind: BlockKind) -> dict[str, TensorSpec]:
        """The tensors of a block, by their name inside the layer."""
        return {part: spec for part, spec in self.inside.items() if spec.block is kind}

    def shape(self, spec: TensorSpec) -> tuple[int | None, ...]:
        """The shape a tensor must have; None where any length is right."""
        return tuple(self._length(axis) for axis in spec.axes)

    def axes(self, spec: TensorSpec) -> Axes:
        """The names of a tensor's axes; a fused axis with the lengths of its parts."""
        return tuple(
            axis if isinstance(axis, str) else tuple((part, self._length(part) or 0) for part in axis)
            for axis in spec.axes
        )

    def head_shape(self, layer: int) -> HeadShape:
        """The heads of a layer, and how positions enter its queries and keys."""
        g, attention = self.geometry, self.family.attention
        rotary = 0 if layer in self.without_rope or attention.positions is Positions.none else self.rotary
        interleaved = attention.positions is Positions.rope_interleaved
        return HeadShape(g.query_heads, g.kv_heads, g.head_dim, rotary, interleaved, attention.norm)

    def _length(self, axis: str | tuple[str, ...]) -> int | None:
        if isinstance(axis, str):
            return self.geometry.length(axis, self.family.attention.norm)
        return sum(self._length(part) or 0 for part in axis)

    @property
    def has_qk_norm(self) -> bool:
        return self.family.attention.norm is not GainScope.none


@cache
def families() -> dict[str, Family]:
    """All family files that ship with the package, by name."""
    folder = files(__package__)
    raw = {f.name[:-5]: yaml.safe_load(f.read_text()) for f in folder.iterdir() if f.name.endswith(".yaml")}
    return {name: Family.model_validate(_inherit(raw, name)) for name in sorted(raw)}


@cache
def _by_architecture() -> dict[str, Family]:
    return {arch: family for family in families().values() for arch in family.architectures}


def supported_architectures() -> tuple[str, ...]:
    """transformers class names that some family describes."""
    return tuple(sorted(_by_architecture()))


def is_block_tensor(name: str) -> bool:
    """Whether any family takes a tensor of this name for part of an attention block or MLP."""
    return any(
        spec.block is not None and re.search(rf"(^|\.)\d+\.{re.escape(part)}$", name)
        for family in families().values()
        for part, spec in family.layer.items()
    )


def resolve(config: Any, *, model: str) -> ModelLayout:
    """The layout of the model that this transformers config describes.

    Args:
        config: a transformers config (attributes, and dicts inside).
        model: the model's name, for errors.

    Raises:
        ArchitectureError: no family has this architecture, or the family was not checked for this variant of it.
    """
    family = _family_of(config, model)
    for key, allowed in family.variants.items():
        value = lookup(config, key)
        if value not in allowed:
            raise ArchitectureError(
                f"model {model}",
                f"config.{key} is {value!r}; family {family.name} ({family.title}) is known only for "
                f"{', '.join(map(repr, allowed))}",
                "Use MergeKit's own method for this model",
            )
    layers = lookup(config, family.sizes.layers)

    def present(tensors: Mapping[str, TensorSpec]) -> dict[str, TensorSpec]:
        return {name: spec for name, spec in tensors.items() if spec.when is None or lookup(config, spec.when)}

    geometry = _geometry(config, family, model)
    rotary = _rotary(config, family, geometry, model)
    exception = family.attention.without_rope
    values = lookup(config, exception.key) or () if exception is not None else ()
    without = frozenset(i for i, x in enumerate(values) if exception is not None and x == exception.value)
    return ModelLayout(family, geometry, layers, present(family.tensors), present(family.layer), rotary, without)


def _geometry(config: Any, family: Family, model: str) -> Geometry:
    """Sizes from the config, with transformers' own rules for those it may leave out."""
    keys = family.sizes.model_dump(exclude={"layers"})
    sizes: dict[str, Any] = {key: lookup(config, where) if where is not None else None for key, where in keys.items()}
    sizes["kv_heads"] = sizes["kv_heads"] or sizes["query_heads"]
    sizes["head_dim"] = sizes["head_dim"] or sizes["hidden"] // sizes["query_heads"]
    sizes["neurons"] = sizes["neurons"] or 4 * sizes["hidden"]
    geometry = Geometry(**sizes)
    if geometry.query_heads % geometry.kv_heads:
        raise ArchitectureError(
            f"model {model}",
            f"{geometry.query_heads} query heads cannot share {geometry.kv_heads} KV heads evenly",
            "Check the model's config.json",
        )
    return geometry


def _rotary(config: Any, family: Family, geometry: Geometry, model: str) -> int:
    """How many coordinates of each head RoPE turns."""
    factors = [lookup(config, key) for key in family.attention.rotary_factor]
    factor = next((f for f in factors if f is not None), 1.0)
    rotary = int(geometry.head_dim * factor)
    if rotary % 2 and family.attention.positions is not Positions.none:
        what = f"head dimension {rotary}" if factor == 1 else f"rotary part {rotary} of the head dimension"
        raise ArchitectureError(
            f"model {model}", f"{what} is odd, so it has no rotary planes", "Check the model's config.json"
        )
    return rotary


def lookup(config: Any, key: str) -> Any:
    """``a.b`` in a config whose parts may be attributes or dict items; None where it is absent."""
    for part in key.split("."):
        config = config.get(part) if isinstance(config, Mapping) else getattr(config, part, None)
        if config is None:
            return None
    return config


def _family_of(config: Any, model: str) -> Family:
    names = list(getattr(config, "architectures", None) or ["(none named in its config)"])
    known = _by_architecture()
    if len(names) != 1 or names[0] not in known:
        raise ArchitectureError(
            f"model {model}",
            f"architecture {', '.join(names)} is not supported by the aligned methods",
            f"Supported: {', '.join(supported_architectures())}; use MergeKit's own method for others",
        )
    return known[names[0]]


def _inherit(raw: Mapping[str, dict[str, Any]], name: str) -> dict[str, Any]:
    """A family file over the one it extends: mappings are merged, null removes an entry, all else is replaced."""
    own = dict(raw[name])
    parent = own.pop("extends", None)
    return own if parent is None else _overlaid(_inherit(raw, parent), own)


def _overlaid(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for key, value in over.items():
        both = isinstance(value, Mapping) and isinstance(merged.get(key), Mapping) and "axes" not in value
        merged[key] = _overlaid(merged[key], value) if both else value
    return {key: value for key, value in merged.items() if value is not None}
