"""What MergeKit is to plan of each layer: every tensor that the family lists, packed experts in one piece.

MergeKit's own architecture leaves out what its file does not list (the MLP of dense layers), and what is stored in
another layout in some of the layers only (packed experts behind dense layers). Its plain merges lose both in silence.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from fnmatch import fnmatchcase
from typing import Any

from mergekit.architecture import ModelArchitecture, WeightInfo
from mergekit.architecture.base import ModuleArchitecture

from mergekit_symalign.families.resolve import ModelLayout, resolve
from mergekit_symalign.families.schema import TensorSpec
from mergekit_symalign.graph.architectures import Extended

LayoutOf = Callable[[Any], ModelLayout]  # of a transformers config


def layouts() -> LayoutOf:
    """Resolves every config once."""
    known: dict[int, tuple[Any, ModelLayout]] = {}  # with the config, so that its number stays its own

    def layout_of(config: Any) -> ModelLayout:
        if id(config) not in known:
            known[id(config)] = (config, resolve(config, model=str(getattr(config, "_name_or_path", "") or "output")))
        return known[id(config)][1]

    return layout_of


def completed(arch: ModelArchitecture, layout_of: LayoutOf) -> ModelArchitecture:
    """An architecture of MergeKit's whose layers have every tensor of their family."""
    modules = {
        name: module.model_copy(
            update={"architecture": _Completed(module.architecture, module.weight_prefix or "", layout_of)}
        )
        for name, module in arch.modules.items()
    }
    return arch.model_copy(update={"modules": modules})


class _Completed(Extended):
    def __init__(self, listed: ModuleArchitecture, prefix: str, layout_of: LayoutOf) -> None:
        super().__init__(listed)
        self._prefix, self._layout_of = prefix, layout_of

    def layer_weights(self, index: int, config: Any) -> list[WeightInfo]:
        listed = super().layer_weights(index, config) or []
        return list(_completed(listed, self._prefix, self._layout_of(config)))


def _completed(listed: list[WeightInfo], prefix: str, layout: ModelLayout) -> Iterator[WeightInfo]:
    """What MergeKit lists of a layer, by the names that the model has, and after it what is missing."""
    placed = {w.name: layout.placed(prefix + w.name) for w in listed}
    found = {of.claim.part: (name, of) for name, of in placed.items() if of and of.claim.layer is not None}
    if not found:
        yield from listed
        return
    name, first = next(iter(found.values()))
    stack, layer = first.layout, first.claim.layer
    parts = stack.parts(layer or 0)
    start = name.removesuffix(first.claim.part)
    for weight in listed:
        of = placed[weight.name]
        if not _is_stored_otherwise(weight.name.removeprefix(start), stack):
            yield weight if of is None else _needed(weight, of.claim.part, parts)
    for part, spec in parts.items():
        if part not in found:
            yield WeightInfo(name=start + part, optional=spec.optional)


def _is_stored_otherwise(part: str, layout: ModelLayout) -> bool:
    """Whether a name is an older one of a tensor of the family, or a piece of one."""
    patterns = (old for spec in layout.family.layer.values() for old in spec.stored_as)
    return part not in layout.family.layer and any(fnmatchcase(part, pattern) for pattern in patterns)


def _needed(weight: WeightInfo, part: str, parts: Mapping[str, TensorSpec]) -> WeightInfo:
    """A tensor that every model has in this layer. MergeKit takes one that not all layers have for optional in all of
    them, and never looks for the pieces of those."""
    always = part in parts and not parts[part].optional
    return weight.model_copy(update={"optional": False}) if always and weight.optional else weight
