"""The sizes of a model, from its config."""

from __future__ import annotations

from dataclasses import dataclass, fields
from math import prod
from typing import Any

from mergekit_symalign.errors import ArchitectureError
from mergekit_symalign.families.known import OTHERWISE, lookup
from mergekit_symalign.families.schema import Adjusted, BlockKind, Family
from mergekit_symalign.symmetry.options import GainScope, LatentShape


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


def geometry_of(config: Any, family: Family, model: str) -> Geometry:
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


def _adjusted(config: Any, rule: Adjusted | None, neurons: int) -> int:
    if rule is None or not lookup(config, rule.when):
        return neurons
    neurons = int(2 * neurons / 3)
    if (factor := 1 if rule.times is None else lookup(config, rule.times)) is None:
        return neurons
    multiple: int = rule.multiple_of if isinstance(rule.multiple_of, int) else lookup(config, rule.multiple_of)
    return multiple * -(-int(factor * neurons) // multiple)
