"""What a merge configuration can tell by itself, before MergeKit plans anything."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from difflib import get_close_matches
from typing import Any

from mergekit.architecture import ModelArchitecture
from mergekit.common import ModelReference
from mergekit.config import ConditionalParameter, MergeConfiguration, OutputSliceDefinition
from mergekit.merge_methods.base import MergeMethodSpec
from pydantic import ValidationError

from mergekit_symalign.errors import ConfigError, GeometryError, ParameterError
from mergekit_symalign.methods import AlignedMethod

Settings = Mapping[str, Any]


def check_config(config: MergeConfiguration, method: AlignedMethod) -> None:
    """Refuse what cannot be merged, whatever the models are.

    Raises:
        ParameterError: an unknown parameter, or a value that a parameter cannot have.
        ConfigError: no anchor, or nothing to align to it.
    """
    for where, settings in _all_settings(config):
        for name, value in settings.items():
            _check_parameter(where, name, value, method.spec)
    for where, anchor, sources in _groups(config):
        _check_sources(where, anchor, sources, method, from_slices=where != "models")


def check_layers(config: MergeConfiguration, arch: ModelArchitecture, trust_remote_code: bool) -> None:
    """Whole models must have as many layers as the anchor.

    Raises:
        GeometryError: if they have not.
    """
    for _, anchor, sources in _groups(config, whole_models=True):
        for module in arch.modules.values():
            counts = {
                model: module.architecture.num_layers(model.config(trust_remote_code=trust_remote_code))
                for model in {anchor: None, **dict.fromkeys(sources)}
                if model is not None
            }
            for model, count in counts.items():
                if anchor is not None and count != counts[anchor]:
                    raise GeometryError(
                        f"model {model}",
                        f"it has {count} layers, the anchor {anchor} has {counts[anchor]}",
                        "Merge models of the same depth, or name the layers to merge with slices:",
                    )


def listed_models(config: MergeConfiguration) -> frozenset[ModelReference]:
    """The models that the user listed as inputs (MergeKit adds the base model to them when it plans)."""
    return frozenset(model for _, _, sources in _groups(config) for model in sources)


def _check_parameter(where: str, name: str, value: Any, spec: MergeMethodSpec) -> None:
    known = {p.name: p for p in spec.parameters}
    if name not in known:
        near = get_close_matches(name, known, n=1)
        raise ParameterError(
            f"parameter {name} ({where})",
            f"{spec.name} has no parameter of this name",
            f"Did you mean {near[0]}?" if near else f"Known: {', '.join(known)}",
        )
    for scalar in _scalars(value):
        try:
            known[name].validate(scalar)
        except ValidationError as error:
            raise ParameterError(
                f"parameter {name} ({where})",
                f"it cannot be {scalar!r}: {error.errors()[0]['msg']}",
                "Correct the value",
            ) from error


def _scalars(value: Any) -> Iterator[Any]:
    """Every single value of a setting with filters and gradients."""
    if isinstance(value, ConditionalParameter):
        yield from _scalars(value.value)
    elif isinstance(value, list):
        for item in value:
            yield from _scalars(item)
    else:
        yield value


def _check_sources(
    where: str,
    anchor: ModelReference | None,
    sources: list[ModelReference],
    method: AlignedMethod,
    *,
    from_slices: bool,
) -> None:
    if anchor is None:
        raise ConfigError(
            f"base_model ({where})",
            f"{method.spec.name} aligns every model to base_model, and none is given",
            "Add base_model: the model whose coordinates the output shall have",
        )
    if not set(sources) - {anchor}:
        raise ConfigError(
            where,
            f"the only model is the anchor {anchor} itself, so there is nothing to align or merge",
            "List at least one other model",
        )
    if from_slices and anchor not in sources:
        weight = ", with weight: 0.0 if it shall not take part" if not method.anchor_is_base else ""
        raise ConfigError(
            where,
            f"the anchor {anchor} is not among the sources, so nothing says which of its layers to align to",
            f"List it as a source with its layer_range{weight}",
        )


def _groups(
    config: MergeConfiguration, *, whole_models: bool = False
) -> Iterator[tuple[str, ModelReference | None, list[ModelReference]]]:
    """Every set of models that is merged with each other: where it stands, its anchor, its models."""
    if config.models:
        yield "models", config.base_model, [m.model for m in config.models]
    for name, module in (config.modules or {}).items():
        if module.models:
            yield "models", config.base_model, [m.model for m in module.models]
        elif not whole_models:
            yield from _slice_groups(config, f"modules.{name}.slices", module.slices or [])
    if config.slices and not whole_models:
        yield from _slice_groups(config, "slices", config.slices)


def _slice_groups(
    config: MergeConfiguration, where: str, slices: list[OutputSliceDefinition]
) -> Iterator[tuple[str, ModelReference | None, list[ModelReference]]]:
    for i, out in enumerate(slices):
        yield f"{where}[{i}]", out.base_model or config.base_model, [s.model for s in out.sources]


def _all_settings(config: MergeConfiguration) -> Iterator[tuple[str, Settings]]:
    """Every ``parameters:`` of the configuration, and where it stands."""
    yield "parameters", config.parameters or {}
    for model in config.models or []:
        yield f"models: {model.model}", model.parameters or {}
    for i, out in enumerate(config.slices or []):
        yield from _slice_settings(f"slices[{i}]", out)
    for name, module in (config.modules or {}).items():
        yield f"modules.{name}", module.parameters or {}
        for model in module.models or []:
            yield f"modules.{name}: {model.model}", model.parameters or {}
        for i, out in enumerate(module.slices or []):
            yield from _slice_settings(f"modules.{name}.slices[{i}]", out)


def _slice_settings(where: str, out: OutputSliceDefinition) -> Iterator[tuple[str, Settings]]:
    yield where, out.parameters or {}
    for source in out.sources:
        yield f"{where}: {source.model}", source.parameters or {}
