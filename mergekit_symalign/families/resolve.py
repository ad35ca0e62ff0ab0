"""From a transformers config and its family to the blocks of one model, by tensor name."""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import cache
from typing import Any

from mergekit_symalign.errors import ArchitectureError
from mergekit_symalign.families.geometry import Geometry, geometry_of
from mergekit_symalign.families.known import (
    OTHERWISE,
    families,
    family_named,
    family_of,
    lookup,
    supported_architectures,
)
from mergekit_symalign.families.layers import layers_where
from mergekit_symalign.families.layout import Claim, ModelLayout, Placed
from mergekit_symalign.families.rope import is_interleaved, rotary_of, values_of
from mergekit_symalign.families.schema import BlockKind, Family, MlpKind, TensorSpec, Tower
from mergekit_symalign.symmetry.options import GainScope, NeuronScale

__all__ = ["Claim", "Geometry", "ModelLayout", "Placed", "families", "lookup", "supported_architectures"]  # of others

_POSITIVELY_HOMOGENEOUS = frozenset(("relu",))


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
        wrong = [value for value in values_of(config, key) if value not in allowed]
        if wrong:
            raise ArchitectureError(
                f"model {model}",
                f"config.{key} is {wrong[0]!r}; family {family.name} ({family.title}) is known only for "
                f"{', '.join(map(repr, allowed))}",
                OTHERWISE,
            )
    geometry = geometry_of(config, family, model)
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
        rotary=rotary_of(config, family, geometry, model),
        interleaved=is_interleaved(config, attention),
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
    return None if name is None else family_named(name).model_copy(update=changes)


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
