"""What stands in a merge configuration: its sets of models, and all of its parameters."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mergekit.common import ModelReference
from mergekit.config import ConditionalParameter, MergeConfiguration, OutputSliceDefinition

from mergekit_symalign.hub.address import is_address

Settings = Mapping[str, Any]


@dataclass(frozen=True)
class Group:
    """A set of models that is merged with each other.

    Attributes:
        where: it stands in the configuration.
        module: it belongs to, or None for all modules.
        anchor: of these models.
        sources: the models with their parameters, and layers if the group is a slice.
        settings: the parameters that hold for all of them, from the innermost level.
        from_slices: whether layers are named.
    """

    where: str
    module: str | None
    anchor: ModelReference | None
    sources: Sequence[Any]
    settings: tuple[Settings, ...]
    from_slices: bool

    @property
    def models(self) -> list[ModelReference]:
        """As listed."""
        return [source.model for source in self.sources]

    @property
    def all_models(self) -> list[ModelReference]:
        """The anchor first if it is not listed."""
        unlisted = self.anchor is not None and self.anchor not in self.models
        return [*([self.anchor] if unlisted else []), *self.models]  # type: ignore[list-item]


def groups_of(config: MergeConfiguration) -> Iterator[Group]:
    """Every set of models that is merged with each other."""
    shared: Settings = config.parameters or {}
    if config.models:
        yield Group("models", None, config.base_model, config.models, (shared,), from_slices=False)
    for name, module in (config.modules or {}).items():
        levels: tuple[Settings, ...] = (module.parameters or {}, shared)
        if module.models:
            yield Group(f"modules.{name}", name, config.base_model, module.models, levels, from_slices=False)
        yield from _slice_groups(config, f"modules.{name}.slices", name, module.slices or [], levels)
    yield from _slice_groups(config, "slices", None, config.slices or [], (shared,))


def listed_models(config: MergeConfiguration) -> frozenset[ModelReference]:
    """The models that the user listed as inputs (MergeKit adds the base model to them when it plans)."""
    return frozenset(model for group in groups_of(config) for model in group.models)


def _slice_groups(
    config: MergeConfiguration,
    where: str,
    module: str | None,
    slices: list[OutputSliceDefinition],
    levels: tuple[Settings, ...],
) -> Iterator[Group]:
    for i, out in enumerate(slices):
        anchor, settings = out.base_model or config.base_model, (out.parameters or {}, *levels)
        yield Group(f"{where}[{i}]", module, anchor, out.sources, settings, from_slices=True)


def all_settings(config: MergeConfiguration) -> Iterator[tuple[str, Settings]]:
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


def model_settings(config: MergeConfiguration) -> Iterator[tuple[str, Settings]]:
    """The ``parameters:`` of every listed model, and where it stands."""
    for group in groups_of(config):
        for source in group.sources:
            yield f"{group.where}: {source.model}", source.parameters or {}


def _slice_settings(where: str, out: OutputSliceDefinition) -> Iterator[tuple[str, Settings]]:
    yield where, out.parameters or {}
    for source in out.sources:
        yield f"{where}: {source.model}", source.parameters or {}


def scalars(value: Any) -> Iterator[Any]:
    """Every single value of a setting with filters and gradients."""
    if isinstance(value, ConditionalParameter):
        yield from scalars(value.value)
    elif isinstance(value, list):
        for item in value:
            yield from scalars(item)
    else:
        yield value


def statistics_paths(config: MergeConfiguration) -> frozenset[str]:
    """All files of statistics on this machine that the configuration names."""
    values = (settings.get("statistics") for _, settings in all_settings(config))
    paths = (path for value in values for path in scalars(value) if isinstance(path, str))
    return frozenset(path for path in paths if not is_address(path))
