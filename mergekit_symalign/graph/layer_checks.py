"""Which layers a merge configuration names, and whether the models have them."""

from __future__ import annotations

from collections.abc import Mapping

from mergekit.architecture import ModelArchitecture
from mergekit.common import ModelReference
from mergekit.config import MergeConfiguration

from mergekit_symalign.errors import ConfigError, GeometryError
from mergekit_symalign.graph.config_groups import Group, groups_of
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
