"""The only place that touches MergeKit's internals: what is expected of them, and what is put into them."""

from __future__ import annotations

import functools
import inspect
from importlib import metadata
from pathlib import Path
from types import ModuleType
from typing import Any

from mergekit_symalign import __version__
from mergekit_symalign.errors import HostError

PREFIX = "aligned_"
ROTATION_MATCH = "rotation_match"
_SUPPORTED = "0.1.5"
_MARK = "_mergekit_symalign"
_PLAN = "_mergekit_symalign_plan"  # where a planner keeps our plan, for the tasks at the end of the merge


def install() -> None:
    """Register the methods and hook the planner, once (what the autoload does when MergeKit is imported).

    A MergeKit whose internals are not recognised is left as it is, except that asking for one of our methods
    raises `HostError`.
    """
    import mergekit.merge
    import mergekit.merge_methods
    import mergekit.plan

    on_import(mergekit.merge_methods)
    on_import(mergekit.plan)
    on_import(mergekit.merge)


def on_import(module: ModuleType) -> None:
    """Hook one of MergeKit's modules, right after it was executed. Doing so twice does nothing."""
    if getattr(module, _MARK, False):
        return
    setattr(module, _MARK, True)
    action = {
        "mergekit.merge_methods": _register,
        "mergekit.plan": _hook_planner,
        "mergekit.merge": _hook_card,
        "mergekit.scripts.merge_raw_pytorch": _hook_raw_pytorch,
    }[module.__name__]
    problem = _problem(module)
    if problem is None:
        action(module)
    else:
        _refuse(problem)


def _problem(module: ModuleType) -> str | None:
    """What about this module is not as expected, or None."""
    for path, parameters in _EXPECTED[module.__name__].items():
        target: Any = module
        for part in path.split("."):
            target = getattr(target, part, None)
        if target is None:
            return f"{module.__name__}.{path} is missing"
        if parameters is not None and (missing := set(parameters) - _names(target)):
            return f"{module.__name__}.{path} has no {', '.join(sorted(missing))}"
    return None


_EXPECTED: dict[str, dict[str, tuple[str, ...] | None]] = {
    "mergekit.merge_methods": {
        "register": ("method",),
        "get": ("name",),
        "registered_methods": None,
        "MergeMethod._execute": ("groups", "parameters", "options", "input_dtypes", "out_dtype"),
        "MergeMethodSpec": ("name", "parameters", "contract", "pretty_name", "reference_url"),
    },
    "mergekit.plan": {
        "MergePlanner._plan": ("self",),
        "MergePlanner.plan_to_disk": ("self", "out_path"),
        "MergePlanner.plan_tensor": ("weight", "weights_in", "models", "cfg_reader"),
        "MergePlanner.plan_in_memory": ("self",),
        "ReturnTensor": ("weight_info", "tensor_task", "dtype"),
        "Task": None,
        "MergePlanner": ("config", "arch_info", "options", "out_model_config"),
        "ExecuteMergeMethodTask": (
            "method_name",
            "gather_tensors",
            "model_order",
            "base_model",
            "output_weight",
            "parameters",
            "input_parameters",
            "out_dtype",
        ),
        "GatherTensors": ("weight_info", "dtype", "device"),
    },
    "mergekit.merge": {"run_merge": ("merge_config", "out_path", "options")},
    "mergekit.scripts.merge_raw_pytorch": {"plan_flat_merge": ("config",)},
}


def _names(target: Any) -> set[str]:
    fields = getattr(target, "model_fields", None)
    return set(fields) if fields is not None else set(inspect.signature(target).parameters)


def _register(merge_methods: Any) -> None:
    """Our methods for all that MergeKit has, and for those that are registered later when they are asked for."""
    from mergekit_symalign.methods import aligned, rotation_match

    known = {method.spec.name: method for method in merge_methods.registered_methods()}
    ours = [*map(aligned, known.values()), rotation_match(known["linear"])]
    for method in ours:
        if method is not None and method.spec.name not in known:
            merge_methods.register(method)
    original = merge_methods.get

    @functools.wraps(original)
    def get(name: str) -> Any:
        try:
            return original(name)
        except RuntimeError:
            late = aligned(original(name.removeprefix(PREFIX))) if name.startswith(PREFIX) else None
            if late is None:
                raise
            merge_methods.register(late)
            return late

    merge_methods.get = get


def _hook_planner(plan: Any) -> None:
    original = plan.MergePlanner._plan

    @functools.wraps(original)
    def _plan(self: Any) -> None:
        from mergekit_symalign.methods import AlignedMethod

        if not isinstance(self._method, AlignedMethod):
            original(self)
            return
        from mergekit_symalign.graph.report import readable_errors

        with readable_errors():
            _plan_aligned(self, original)

    plan.MergePlanner._plan = _plan
    to_disk = plan.MergePlanner.plan_to_disk

    @functools.wraps(to_disk)
    def plan_to_disk(self: Any, out_path: str) -> Any:
        targets = to_disk(self, out_path)
        aligned = getattr(self, _PLAN, None)
        return targets if aligned is None else [*targets, *aligned.extra_tasks(out_path, targets)]

    plan.MergePlanner.plan_to_disk = plan_to_disk
    _hook_in_memory(plan)


def _hook_in_memory(plan: Any) -> None:
    """MergeKit 0.1.5 cannot plan a merge in memory: it asks for a task of an abstract class. For our methods it can.

    Whoever runs such a plan takes every task for a tensor, so nothing can be saved beside it.
    """
    broken = plan.ReturnTensor.model_fields["tensor_task"].annotation is not plan.Task
    original = plan.MergePlanner.plan_in_memory

    @functools.wraps(original)
    def plan_in_memory(self: Any) -> Any:
        from mergekit_symalign.methods import AlignedMethod

        if not isinstance(self._method, AlignedMethod):
            return original(self)
        targets = _returned(self) if broken else original(self)
        from mergekit_symalign.graph.report import readable_errors

        with readable_errors():
            getattr(self, _PLAN).require_nothing_to_save()
        return targets

    def _returned(planner: Any) -> list[Any]:
        planner._plan()
        return [
            plan.ReturnTensor.model_construct(
                weight_info=weight, tensor_task=task, dtype=weight.force_dtype or planner.config.out_dtype
            )
            for weight, task in planner._tensors
        ]

    plan.MergePlanner.plan_in_memory = plan_in_memory


def _plan_aligned(planner: Any, original: Any) -> None:
    """MergeKit's own plan between our checks of the configuration and our rewriting of its tasks.

    MergeKit plans on a copy of the configuration: planning writes the base model into the sources, and where MergeKit
    then saves the configuration itself (mergekit-multi, `run_merge`), the anchor would look like a listed model.
    """
    from mergekit_symalign.graph.config_checks import check_config, check_layers, listed_models
    from mergekit_symalign.graph.planning import AlignedPlan

    check_config(planner.config, planner._method)
    check_layers(planner.config, planner.arch_info, planner.options.trust_remote_code)
    plan = AlignedPlan(planner.config, planner.options, planner._method, listed_models(planner.config))
    planner.config = planner.config.model_copy(deep=True)
    _know_other_names(planner, plan)
    original(planner)
    planner._tensors = plan.rewrite(planner._tensors)
    setattr(planner, _PLAN, plan)


def _know_other_names(planner: Any, plan: Any) -> None:
    """Let MergeKit find tensors under the older names that checkpoints may have for them."""
    from mergekit.plan import MergePlanner

    original = planner.plan_tensor
    broken = "[w_in.name] + (w_in.aliases or [])" in inspect.getsource(MergePlanner.plan_tensor)
    sequence: Any = _AddableTuple if broken else tuple

    def known(info: Any, model: Any) -> Any:
        names = (*(info.aliases or ()), *plan.other_names(info, model))
        tied = (*(info.tied_names or ()), *plan.tied_names(info, model))
        return info.model_copy(update={"aliases": sequence(names) if names else None, "tied_names": tied or None})

    @functools.wraps(original)
    def plan_tensor(weight: Any, weights_in: Any, models: Any, cfg_reader: Any) -> None:
        infos = [known(info, model) for info, model in zip(weights_in, models, strict=True)]
        original(weight=weight, weights_in=infos, models=models, cfg_reader=cfg_reader)

    planner.plan_tensor = plan_tensor


class _AddableTuple(tuple[str, ...]):
    """MergeKit 0.1.5 adds the aliases of an optional tensor, a tuple, to a list, which fails for a plain tuple."""

    def __radd__(self, other: list[str]) -> list[str]:
        return [*other, *self]


def _hook_card(merge: Any) -> None:
    original = merge.run_merge

    @functools.wraps(original)
    def run_merge(merge_config: Any, out_path: str, options: Any, *args: Any, **kwargs: Any) -> Any:
        from mergekit.merge_methods import get

        from mergekit_symalign.methods import AlignedMethod

        name = merge_config.merge_method
        aligned = _is_ours(name) and isinstance(get(name), AlignedMethod)
        if aligned:
            _require_openable(merge_config, options)
        result = original(merge_config, out_path, options, *args, **kwargs)
        if options.write_model_card and aligned:
            from mergekit_symalign.card import extend_card

            extend_card(Path(out_path))
        return result

    merge.run_merge = run_merge


def _is_ours(name: str) -> bool:
    return name == ROTATION_MATCH or name.startswith(PREFIX)


def _require_openable(merge_config: Any, options: Any) -> None:
    """Try every model before MergeKit opens it, which explains nothing."""
    from mergekit_symalign.graph.opening import require_openable
    from mergekit_symalign.graph.report import readable_errors

    with readable_errors():
        require_openable(merge_config.referenced_models(), options)


def _hook_raw_pytorch(script: Any) -> None:
    original = script.plan_flat_merge

    @functools.wraps(original)
    def plan_flat_merge(config: Any, *args: Any, **kwargs: Any) -> Any:
        from mergekit_symalign.graph.report import readable_errors
        from mergekit_symalign.methods import AlignedMethod

        method = script.merge_methods.get(config.merge_method)
        tasks = original(config, *args, **kwargs)
        if isinstance(method, AlignedMethod):
            with readable_errors():
                for task in tasks:
                    method.require_unblocked(getattr(task, "tensor_name", None))
        return tasks

    script.plan_flat_merge = plan_flat_merge


def _refuse(problem: str) -> None:
    """Make asking for one of our methods an error that names both versions; leave everything else alone."""
    import mergekit.merge_methods as merge_methods

    original = merge_methods.get

    @functools.wraps(original)
    def get(name: str, *args: Any, **kwargs: Any) -> Any:
        from mergekit_symalign.graph.report import readable_errors

        if not _is_ours(name):
            return original(name, *args, **kwargs)
        with readable_errors():
            raise HostError(
                f"merge method {name}",
                f"mergekit-symalign {__version__} does not know the internals of the installed mergekit "
                f"{metadata.version('mergekit')} ({problem})",
                f"Install mergekit {_SUPPORTED}, or a newer mergekit-symalign",
            )

    merge_methods.get = get
