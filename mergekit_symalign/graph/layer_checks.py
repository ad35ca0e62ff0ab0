"""Which layers a merge configuration names, and whether the models have them."""

from __future__ import annotations

import copy
from collections import defaultdict
from collections.abc import Iterator, Mapping
from typing import Any

from mergekit.architecture import ModelArchitecture
from mergekit.common import ModelReference
from mergekit.config import MergeConfiguration

from mergekit_symalign.errors import ConfigError, GeometryError
from mergekit_symalign.families.resolve import ModelLayout, text_config
from mergekit_symalign.graph.complete import LayoutOf
from mergekit_symalign.graph.config_groups import Group, groups_of
from mergekit_symalign.graph.models import check_geometry
from mergekit_symalign.graph.text_parts import NO_TEXTS, TextParts


def check_layers(
    config: MergeConfiguration, arch: ModelArchitecture, trust_remote_code: bool, texts: TextParts = NO_TEXTS
) -> None:
    """Whole models must have as many layers as the anchor, and slices must name layers that there are.

    Raises:
        ConfigError: a module or a range that does not exist, or slices of different lengths.
        GeometryError: if models differ in depth.
    """

    def depth(module: str, model: ModelReference) -> int:
        planned = texts.config_for(model).config(trust_remote_code=trust_remote_code)
        layers: int = arch.modules[module].architecture.num_layers(planned)
        return layers

    _check_modules(config, arch)
    for group in groups_of(config):
        for module in arch.modules if group.module is None else (group.module,):
            depths = {model: depth(module, model) for model in group.all_models}
            if group.from_slices:
                _check_ranges(group, depths)
            else:
                _check_depths(group, depths)


def _check_modules(config: MergeConfiguration, arch: ModelArchitecture) -> None:
    for name in config.modules or {}:
        if name not in arch.modules:
            raise ConfigError(
                f"modules.{name}", "the architecture has no such module", f"It has: {', '.join(arch.modules)}"
            )


def _check_depths(group: Group, depths: Mapping[ModelReference, int]) -> None:
    for model, count in depths.items():
        if group.anchor is not None and count != depths[group.anchor]:
            raise GeometryError(
                f"model {model}",
                f"it has {count} layers, the anchor {group.anchor} has {depths[group.anchor]}",
                "Merge models of the same depth, or name the layers to merge with slices:",
            )


def _check_ranges(group: Group, depths: Mapping[ModelReference, int]) -> None:
    lengths = {}
    for source in group.sources:
        first, end = source.layer_range
        depth = depths[source.model]
        if not 0 <= first < end <= depth:
            what = "is empty" if 0 <= end <= first <= depth else "names layers that do not exist"
            raise ConfigError(
                f"{group.where}: layer_range [{first}, {end}] of model {source.model}",
                f"it {what}; the model has {depth} layers, numbered from 0",
                f"Choose a range within [0, {depth}]; its end does not count",
            )
        lengths[str(source.model), first, end] = end - first
    if len(set(lengths.values())) > 1:
        shown = ", ".join(f"{length} of {model} ({first} to {end})" for (model, first, end), length in lengths.items())
        raise ConfigError(
            group.where, f"its sources differ in their number of layers: {shown}", "Give them equal ranges"
        )


def check_kinds(
    config: MergeConfiguration, layout_of: LayoutOf, trust_remote_code: bool, texts: TextParts = NO_TEXTS
) -> None:
    """Models must have the same tensors in their layers; so must layers that a slice merges, and the output's there.

    MergeKit's plan takes for granted that their lists are of one length.

    Raises:
        GeometryError: naming two models or layers of which one has tensors that the other has not.
    """

    def config_of(model: ModelReference) -> Any:
        return model.config(trust_remote_code=trust_remote_code)

    for group in groups_of(config):
        first = group.all_models[0]
        for model in group.all_models[1:] if texts.outer is None else ():
            check_geometry(first, layout_of(config_of(first)), model, layout_of(config_of(model)))
    named: dict[str | None, list[Group]] = defaultdict(list)
    for group in groups_of(config):
        if group.from_slices and layout_of(config_of(group.sources[0].model)).layer_kinds:
            named[group.module].append(group)
    for groups in named.values():
        base = config.base_model or groups[0].sources[0].model
        out = _of_depth(config_of(base), layout_of, sum(len(list(_layers(group))) for group in groups))
        rows = [(group, row) for group in groups for row in _layers(group)]
        for i, (group, row) in enumerate(rows):
            found = [(f"layer {layer} of {m}", layout_of(config_of(m)), layer) for m, layer in row]
            _check_row(group, [(f"layer {i} of the output, by the config of {base},", out, i), *found])


def _layers(group: Group) -> Iterator[list[tuple[ModelReference, int]]]:
    """The layers that are merged with each other, by the depth in the slice."""
    ranges = (range(*source.layer_range) for source in group.sources)
    for row in zip(*ranges, strict=True):
        yield [(source.model, layer) for source, layer in zip(group.sources, row, strict=True)]


def _of_depth(config: Any, layout_of: LayoutOf, layers: int) -> ModelLayout:
    """The layout of a model with another number of layers."""
    family = layout_of(config).family
    config = copy.deepcopy(config)
    setattr(text_config(config, family), family.sizes.layers, layers)
    return layout_of(config)


def _check_row(group: Group, row: list[tuple[str, ModelLayout, int]]) -> None:
    first, parts = row[0][0], row[0][1].parts(row[0][2]).keys()
    for name, layout, layer in row[1:]:
        if other := layout.parts(layer).keys() ^ parts:
            raise GeometryError(
                group.where,
                f"{name} and {first} are layers of different kinds: only one of them has {min(other)}",
                "Choose ranges that pair layers of one kind, where the output's config has that kind",
            )
