"""Text models that are merged into the text part of a model around one: a vision-language model stays what it is.

MergeKit plans the merge for the outer model. Each text model is then a checkpoint with the outer model's names and
without its other tensors (`TextNames`), so that everything else treats it like the outer model's own text part. What
only the outer model has passes into the output as it is.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from mergekit.architecture import ModelArchitecture
from mergekit.common import ModelReference
from mergekit.config import (
    InputModelDefinition,
    InputSliceDefinition,
    MergeConfiguration,
    OutputModuleDefinition,
    OutputSliceDefinition,
)

from mergekit_symalign.errors import ConfigError, GeometryError
from mergekit_symalign.families.known import family_inside
from mergekit_symalign.families.resolve import ModelLayout, resolve
from mergekit_symalign.graph.names import Names, Place
from mergekit_symalign.graph.plain_merge import resolve_stored
from mergekit_symalign.methods import DataMethod, PlannedMethod


@dataclass(frozen=True)
class TextParts:
    """The text models of a merge into a model around one of their kind.

    Attributes:
        outer: the model around a text model; None in every other merge.
        layouts: of the text models, by the names that their tensors have inside the outer model.
    """

    outer: ModelReference | None = None
    layouts: Mapping[ModelReference, ModelLayout] = field(default_factory=dict)

    def config_for(self, model: ModelReference) -> ModelReference:
        """The model whose config says what MergeKit's plan has for a model."""
        return self.outer if model in self.layouts and self.outer is not None else model


NO_TEXTS = TextParts()


def text_parts(config: MergeConfiguration, trust_remote_code: bool) -> TextParts:
    """
    Args:
        config: of a merge whose models are all of supported architectures.
        trust_remote_code: MergeKit's option.

    Raises:
        ConfigError: if there are models around text models and text models, and ``base_model`` is none of the former.
        GeometryError: if a text model is of another kind or depth than the one inside ``base_model``.
    """
    configs = {m: m.config(trust_remote_code=trust_remote_code) for m in sorted(config.referenced_models(), key=str)}
    layouts = {m: resolve_stored(of, m) for m, of in configs.items()}
    around = [m for m, layout in layouts.items() if layout.family.config]
    inside = [m for m in layouts if m not in around]
    if not around or not inside:
        return NO_TEXTS
    outer = config.base_model
    if outer is None or outer not in around:
        raise ConfigError(
            f"model {around[0]}",
            f"it is a model around a text model, and {inside[0]} is a text model by itself",
            f"Make it the base_model: {inside[0]} is then merged into its text part. Or leave one of them out",
        )
    return TextParts(outer, {m: _inside(m, configs[m], outer, configs[outer], layouts[outer]) for m in inside})


def _inside(
    model: ModelReference, config: Any, outer: ModelReference, outer_config: Any, outer_layout: ModelLayout
) -> ModelLayout:
    """The layout of a text model, by the outer model's names."""
    family = family_inside(outer_config, config, str(model))
    if family is None:
        raise GeometryError(
            f"model {model}",
            f"it is of another architecture than the text model inside {outer} ({outer_layout.family.title})",
            "Merge a text model of the same kind into it",
        )
    layout = resolve(config, model=str(model), family=family)
    if layout.layers != outer_layout.layers:
        raise GeometryError(
            f"model {model}",
            f"it has {layout.layers} layers, the text model inside {outer} has {outer_layout.layers}",
            "Merge a text model of the same size into it",
        )
    return layout


def require_mergeable(texts: TextParts, method: PlannedMethod) -> None:
    """
    Raises:
        ConfigError: if the method reads data, which is measured on whole models.
    """
    if texts.outer is not None and isinstance(method.inner, DataMethod):
        raise ConfigError(
            f"merge_method {method.spec.name}",
            f"it reads data of whole models, and the text models are merged into a part of {texts.outer}",
            "Use rotation_match, aligned_task_arithmetic or another aligned method without data",
        )


class TextNames(Names):
    """The names of a text model as they are inside an outer model.

    Args:
        config: the text model's transformers config.
        model: its name, for errors.
        layout: by the outer model's names.
        own: by its own.
    """

    def __init__(self, config: Any, model: str, layout: ModelLayout, own: ModelLayout) -> None:
        super().__init__(config, model)
        self._layout, self._prefixes = layout, (layout.family.prefix, own.family.prefix)

    def place(self, stored: str) -> Place | None:
        """Under the outer model's names, for a name of either model."""
        found = super().place(self.own(stored))
        return None if found is None else Place(self._outer(found.name), found.piece)

    def own(self, name: str) -> str:
        """What the text model calls a tensor, for a name that the outer model or a plan for it may have."""
        outer, own = self._prefixes
        name = self._layout.canonical(name)
        return own + name.removeprefix(outer) if name.startswith(outer) else name

    def tied(self, name: str) -> frozenset[str]:
        return frozenset(map(self._outer, super().tied(self.own(name))))

    def all_tied(self) -> frozenset[str]:
        return frozenset(map(self._outer, super().all_tied()))

    def _outer(self, name: str) -> str:
        outer, own = self._prefixes
        return outer + name.removeprefix(own) if own and name.startswith(own) else name


def outer_alone(config: MergeConfiguration) -> MergeConfiguration:
    """A configuration from which MergeKit tells the outer model's architecture."""
    assert config.base_model is not None
    alone = [InputModelDefinition(model=config.base_model)]
    return MergeConfiguration(merge_method=config.merge_method, base_model=config.base_model, models=alone)


def in_slices(config: MergeConfiguration, arch: ModelArchitecture, outer_config: Any) -> MergeConfiguration:
    """The same merge with the outer model's layers in every module, as MergeKit cannot ask a text model for them."""
    listed = dict.fromkeys(arch.modules, config.models) if config.models else {}
    given = config.modules or {name: OutputModuleDefinition(models=models) for name, models in listed.items()}
    modules = {
        name: _in_slices(module, config.base_model, arch.modules[name].architecture.num_layers(outer_config))
        for name, module in given.items()
    }
    return config.model_copy(update={"models": None, "modules": modules} if modules else {})


def _in_slices(module: OutputModuleDefinition, base: ModelReference | None, layers: int) -> OutputModuleDefinition:
    if not module.models:
        return module
    unlisted = [] if base is None or base in [m.model for m in module.models] else [InputModelDefinition(model=base)]
    sources = [
        InputSliceDefinition(model=m.model, layer_range=(0, layers), parameters=m.parameters)
        for m in [*module.models, *unlisted]
    ]
    return OutputModuleDefinition(slices=[OutputSliceDefinition(sources=sources)], parameters=module.parameters)
