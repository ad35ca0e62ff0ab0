"""MergeKit's planner at work on an aligned merge: what hook.py calls instead of the planner's own functions."""

from __future__ import annotations

import functools
import inspect
from typing import Any

from mergekit import merge_methods
from mergekit.config import MergeConfiguration
from mergekit.graph import Task
from mergekit.io.tasks import ReturnTensor
from mergekit.options import MergeOptions
from mergekit.parameter_resolver import resolve_parameter
from mergekit.plan import MergePlanner

from mergekit_symalign.graph.complete import completed, layouts
from mergekit_symalign.graph.config_checks import check_config, check_models, require_extra
from mergekit_symalign.graph.config_groups import listed_models
from mergekit_symalign.graph.fresh import forget_architectures
from mergekit_symalign.graph.layer_checks import check_kinds, check_layers
from mergekit_symalign.graph.opening import require_openable
from mergekit_symalign.graph.planning import AlignedPlan
from mergekit_symalign.graph.prefixes import with_dots
from mergekit_symalign.graph.shared_files import SharedFiles
from mergekit_symalign.graph.text_parts import in_slices, outer_alone, require_mergeable, text_parts
from mergekit_symalign.graph.untie import UNTIE

_PLAN = "_mergekit_symalign_plan"  # where a planner keeps our plan, for the tasks at the end of the merge


def before_merge(config: MergeConfiguration, options: MergeOptions) -> SharedFiles:
    """What is to be done and checked before MergeKit looks at the models.

    Returns:
        The files on the Hub that the configuration names, all of them on this machine now.

    Raises:
        SymalignError: for what MergeKit would not explain.
    """
    require_extra(merge_methods.get(config.merge_method))
    shared = SharedFiles.of(config, options)
    require_openable(config.referenced_models(), options)
    forget_architectures()
    check_models(config, options.trust_remote_code)
    require_mergeable(text_parts(config, options.trust_remote_code), merge_methods.get(config.merge_method))
    return shared


def architecture_of(config: MergeConfiguration, options: MergeOptions, original: Any) -> Any:
    """What MergeKit plans from: of a merge of text models into a model around one, the architecture of the latter."""
    texts = text_parts(config, options.trust_remote_code)
    return original(config if texts.outer is None else outer_alone(config), options)


def plan_aligned(planner: Any, original: Any) -> None:
    """MergeKit's own plan between our checks of the configuration and our rewriting of its tasks.

    MergeKit plans on a copy of the configuration, because planning writes the base model into the sources. Where
    MergeKit then saves the configuration itself (mergekit-multi, `run_merge`), the anchor would look like a listed
    model.
    """
    planner.config = SharedFiles.of(planner.config, planner.options).config(planner.config)
    method, listed = planner._method, listed_models(planner.config)
    check_config(planner.config, method)
    trust = planner.options.trust_remote_code
    texts = text_parts(planner.config, trust)
    require_mergeable(texts, method)
    check_layers(planner.config, planner.arch_info, trust, texts)
    layout_of = layouts()
    check_kinds(planner.config, layout_of, trust, texts)
    planner.arch_info = completed(with_dots(planner.arch_info), layout_of)
    plan = AlignedPlan(planner.config, planner.options, method, listed, texts)
    planner.arch_info = plan.with_heads(planner.arch_info)
    planner.config = planner.config.model_copy(deep=True)
    if texts.outer is not None:
        planner.config = in_slices(planner.config, planner.arch_info, texts.outer.config(trust_remote_code=trust))
    _know_other_names(planner, plan)
    if planner.config.base_model not in listed:
        planner._method = method.with_unlisted_anchor()
        if not method.aligns and not method.anchor_is_base:
            planner.config.base_model = None  # it names a tokenizer and a config; its weights are not merged
    original(planner)
    planner._method = method
    planner._tensors = plan.rewrite(planner._tensors)
    plan.keep_own_config(planner.out_model_config)  # the object that `run_merge` saves when all is written
    setattr(planner, _PLAN, plan)


def plan_of(planner: Any) -> AlignedPlan:
    """Our plan, once `plan_aligned` has run."""
    plan: AlignedPlan = getattr(planner, _PLAN)
    return plan


def plan_in_memory(planner: Any, original: Any) -> Any:
    """MergeKit 0.1.5 cannot plan a merge in memory: it asks for a task of an abstract class. For our methods it can.

    Whoever runs such a plan takes every task for a tensor, so nothing can be saved beside it.
    """
    if ReturnTensor.model_fields["tensor_task"].annotation is Task:
        targets = original(planner)
    else:
        planner._plan()
        targets = [
            ReturnTensor.model_construct(
                weight_info=weight, tensor_task=task, dtype=weight.force_dtype or planner.config.out_dtype
            )
            for weight, task in planner._tensors
        ]
    plan_of(planner).require_no_files()
    return targets


def _know_other_names(planner: Any, plan: Any) -> None:
    """Let MergeKit find tensors under the older names that checkpoints may have, and plan a head that is untied."""
    original = planner.plan_tensor
    broken = "[w_in.name] + (w_in.aliases or [])" in inspect.getsource(MergePlanner.plan_tensor)
    sequence: Any = _AddableTuple if broken else tuple

    def known(info: Any, model: Any) -> Any:
        names = (*(info.aliases or ()), *plan.other_names(info, model))
        tied = (*(info.tied_names or ()), *plan.tied_names(info, model))
        found = {"aliases": sequence(names) if names else None, "tied_names": tied or None}
        return info.model_copy(update=found)

    @functools.wraps(original)
    def plan_tensor(weight: Any, weights_in: Any, models: Any, cfg_reader: Any) -> None:
        infos = [known(info, model) for info, model in zip(weights_in, models, strict=True)]
        wanted = plan.planned_head(weight, models[0], lambda: _asks_to_untie(planner, weight.name, cfg_reader))
        original(weight=wanted, weights_in=infos, models=models, cfg_reader=cfg_reader)

    architecture = planner._model_arch
    planner.plan_tensor = plan_tensor
    planner._model_arch = lambda model: architecture(plan.texts.config_for(model))


def _asks_to_untie(planner: Any, name: str, cfg_reader: Any) -> bool:
    """The parameter ``untie`` of a tensor that is being planned."""
    asked = next((p for p in planner._method.spec.shared_parameters if p.name == UNTIE), None)
    sources = cfg_reader.parameter_sources()
    return asked is not None and bool(resolve_parameter(asked, sources, tensor_name=name, t=cfg_reader.t))


class _AddableTuple(tuple[str, ...]):
    """MergeKit 0.1.5 adds the aliases of an optional tensor, a tuple, to a list, which fails for a plain tuple."""

    def __radd__(self, other: list[str]) -> list[str]:
        return [*other, *self]
