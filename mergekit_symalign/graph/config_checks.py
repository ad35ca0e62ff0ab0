"""What a merge configuration can tell by itself, before MergeKit plans anything."""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches
from importlib.util import find_spec
from typing import Any

from mergekit.config import MergeConfiguration
from mergekit.merge_methods.base import MergeMethodSpec, ParameterScope
from pydantic import ValidationError

from mergekit_symalign.errors import ConfigError, ParameterError
from mergekit_symalign.graph.config_groups import Group, Settings, all_settings, groups_of, model_settings, scalars
from mergekit_symalign.graph.plain_merge import resolve_stored
from mergekit_symalign.methods import ALIGNMENT_NAMES, DataMethod, PlannedMethod


def check_models(config: MergeConfiguration, trust_remote_code: bool) -> None:
    """Every model's config must name one architecture that we know: MergeKit plans nothing without, and merges nothing.

    Raises:
        ArchitectureError: if one does not.
    """
    for model in sorted(config.referenced_models(), key=str):
        resolve_stored(model.config(trust_remote_code=trust_remote_code), model)


def require_extra(method: PlannedMethod) -> None:
    """
    Raises:
        ConfigError: if the method needs a library that is not installed.
    """
    inner = method.inner
    if isinstance(inner, DataMethod) and inner.extra is not None and find_spec(inner.extra[0]) is None:
        module, extra = inner.extra
        raise ConfigError(
            f"merge_method {method.spec.name}",
            f"it needs the Python package {module}, which is not installed",
            f"pip install 'mergekit-symalign[{extra}]'",
        )


def check_config(config: MergeConfiguration, method: PlannedMethod) -> None:
    """Refuse what cannot be merged, whatever the models are.

    Raises:
        ParameterError: an unknown parameter, a value that a parameter cannot have, or a required one that is not given.
        ConfigError: no anchor, nothing to align to it, or another number of models than the method takes.
    """
    require_extra(method)
    for where, settings in all_settings(config):
        for name, value in settings.items():
            _check_parameter(where, name, value, method.spec)
    _check_levels(config, method)
    for group in groups_of(config):
        _check_sources(group, method)
        _check_required(group, method)
        _check_number(group, method)


def _check_parameter(where: str, name: str, value: Any, spec: MergeMethodSpec) -> None:
    known = {p.name: p for p in spec.parameters}
    if name not in known:
        near = get_close_matches(name, known, n=1)
        raise ParameterError(
            f"parameter {name} ({where})",
            f"{spec.name} has no parameter of this name",
            f"Did you mean {near[0]}?" if near else f"Known: {', '.join(known)}",
        )
    for scalar in scalars(value):
        try:
            known[name].validate(scalar)
        except ValidationError as error:
            raise ParameterError(
                f"parameter {name} ({where})",
                f"it cannot be {scalar!r}: {error.errors()[0]['msg']}",
                "Correct the value",
            ) from error


def _check_levels(config: MergeConfiguration, method: PlannedMethod) -> None:
    """MergeKit passes over what holds for all models where it stands beside a single one. Ours is not lost in silence.

    Raises:
        ParameterError: naming the parameter and the model.
    """
    shared = {p.name for p in method.spec.shared_parameters} & ALIGNMENT_NAMES
    for where, settings in model_settings(config):
        if given := sorted(settings.keys() & shared):
            raise ParameterError(
                f"parameter {given[0]} ({where})",
                "it holds for all models of the merge, and stands beside one of them, where nothing reads it",
                "Move it to the parameters of the merge",
            )


def _check_sources(group: Group, method: PlannedMethod) -> None:
    anchor = group.anchor
    if not method.aligns and not method.anchor_is_base:
        return
    if anchor is None:
        needs, remedy = method.needs_base
        raise ConfigError(
            f"base_model ({group.where})", f"{method.spec.name} {needs}", f"Add base_model: the model {remedy}"
        )
    if not set(group.models) - {anchor}:
        raise ConfigError(
            group.where,
            f"the only model is the anchor {anchor} itself, so there is nothing to align or merge"
            if method.aligns
            else f"the only model is base_model {anchor} itself, so there is nothing to merge",
            "List at least one other model",
        )
    if group.from_slices and anchor not in group.models:
        weight = ", with weight: 0.0 if it shall not take part" if not method.anchor_is_base else ""
        raise ConfigError(
            group.where,
            f"the anchor {anchor} is not among the sources, so nothing says which of its layers to align to"
            if method.aligns
            else f"base_model {anchor} is not among the sources, so nothing says which of its layers is the base",
            f"List it as a source with its layer_range{weight}",
        )


def _check_required(group: Group, method: PlannedMethod) -> None:
    """Parameters without a default must be given at some level, to every listed model that the method asks for them."""
    for p in method.spec.parameters:
        if p.required and p.scope is ParameterScope.SHARED and not _given(p.name, group.settings):
            raise ParameterError(
                f"parameter {p.name} ({group.where})",
                f"{method.spec.name} needs one, and none is given",
                f"Add parameters: {{{p.name}: …}}",
            )
        for source in group.sources if p.required and p.scope is not ParameterScope.SHARED else ():
            exempt = source.model == group.anchor and p.scope is ParameterScope.NON_BASE
            if not exempt and not _given(p.name, (source.parameters or {}, *group.settings)):
                raise ParameterError(
                    f"parameter {p.name} of model {source.model} ({group.where})",
                    f"{method.spec.name} needs one for every model, and none is given",
                    f"Add parameters: {{{p.name}: …}} to the model",
                )


def _given(name: str, settings: Iterable[Settings]) -> bool:
    return any(name in level for level in settings)


def _check_number(group: Group, method: PlannedMethod) -> None:
    """What MergeKit would say of the inner method's inputs, with a traceback."""
    models = group.all_models if method.anchor_is_base else group.models
    base = group.anchor if group.anchor in models else None  # a method that needs none does not look at it
    try:
        method.inner.validate_inputs(models, base)
    except ValueError as error:
        raise ConfigError(
            group.where, f"{method.spec.name} cannot take these models ({error})", "Change the list of models"
        ) from error
