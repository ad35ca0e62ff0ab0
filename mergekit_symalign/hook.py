"""The only place that changes MergeKit: what is put into it, and what happens if it is not the expected one."""

from __future__ import annotations

import functools
import importlib
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path
from types import ModuleType
from typing import Any

from mergekit_symalign import __version__, autoload, host
from mergekit_symalign.errors import HostError, SymalignError
from mergekit_symalign.graph.error_translation import readable_errors
from mergekit_symalign.method_names import PREFIX, is_ours, misspelt

_SUPPORTED = "0.1.5"
_MARK = "_mergekit_symalign"
_AT_ONCE = ("mergekit.merge_methods", "mergekit.plan", "mergekit.merge")


def install() -> None:
    """Register the methods and hook the planner, once (what the autoload does when MergeKit is imported).

    A MergeKit whose internals are not recognised is left as it is, except that asking for one of our methods
    raises `HostError`.
    """
    autoload.watch()
    for name in _AT_ONCE if problem() is None else _AT_ONCE[:1]:
        importlib.import_module(name)
    for name in autoload.MODULES:
        if name in sys.modules:
            on_import(sys.modules[name])


def on_import(module: ModuleType) -> None:
    """Hook one of MergeKit's modules, right after it was executed. Doing so twice does nothing.

    Every name that we use is looked up first, in all modules. Whatever is missing, and whatever goes wrong in spite of
    that, ends in refusing our methods: MergeKit itself goes on.
    """
    if getattr(module, _MARK, False):
        return
    setattr(module, _MARK, True)
    found = problem()
    if found is None:
        try:
            _HOOKS[module.__name__](module)
        except Exception as error:
            found = f"{module.__name__}: {_in_words(error)}"
    if found is not None:
        _refuse(found)


@contextmanager
def executed_by(executor: Callable[..., Any]) -> Iterator[None]:
    """Let `run_merge` give its tasks to another executor than MergeKit's on one device, for a while.

    Args:
        executor: takes the arguments of MergeKit's `Executor`, and gives something that has its ``run``.
    """
    merge: Any = importlib.import_module("mergekit.merge")
    original = merge.Executor
    merge.Executor = executor
    try:
        yield
    finally:
        merge.Executor = original


def require_known(where: str) -> None:
    """
    Raises:
        HostError: if the installed MergeKit is not known.
    """
    if (found := problem()) is not None:
        raise HostError(where, *host_error(found))


def problem() -> str | None:
    """What the installed MergeKit lacks, or why nobody can tell."""
    try:
        return host.problem()
    except Exception as error:
        return f"its source cannot be read: {_in_words(error)}"


def _in_words(error: Exception) -> str:
    return str(error) or type(error).__name__


def _replace(module: Any, path: str, hooked: Callable[[Any], Any]) -> None:
    """Put ``hooked(original)`` in the place of a function, also where other modules have bound it by name.

    Raises:
        LookupError: if there is no such function.
    """
    *owners, name = path.split(".")
    owner: Any = functools.reduce(lambda at, part: getattr(at, part, None), owners, module)
    original = getattr(owner, name, None)
    if original is None:
        raise LookupError(f"{path} is missing")
    ours = functools.wraps(original)(hooked(original))
    setattr(owner, name, ours)
    for other, bound in _bindings(original) if owner is module else ():
        setattr(other, bound, ours)


def _bindings(value: object) -> Iterator[tuple[ModuleType, str]]:
    """Every module that has bound this very object, and under which name."""
    modules = [module for module in list(sys.modules.values()) if isinstance(module, ModuleType)]
    for module in modules:
        yield from ((module, name) for name, bound in list(vars(module).items()) if bound is value)


def _method_of_ours(method: Any) -> bool:
    """Whether a method is one of ours; imports nothing, as there is none before our methods were imported."""
    methods = sys.modules.get("mergekit_symalign.planned_methods")
    return methods is not None and isinstance(method, methods.PlannedMethod)


def _hook_methods(merge_methods: Any) -> None:
    """Our methods for all that MergeKit has, and for those that are registered later when they are asked for."""
    from mergekit_symalign.aligned_methods import aligned, rotation_match
    from mergekit_symalign.data_methods import data_methods

    known = {method.spec.name: method for method in merge_methods.registered_methods()}
    with_data = [method for method in data_methods(known) if method.spec.name not in known]
    ours = [*with_data, *map(aligned, (*known.values(), *with_data)), rotation_match(known["linear"])]
    for method in ours:
        if method is not None and method.spec.name not in known:
            merge_methods.register(method)

    def hooked(original: Any) -> Any:
        def late(name: str) -> Any:
            try:
                return aligned(original(name.removeprefix(PREFIX))) if name.startswith(PREFIX) else None
            except RuntimeError:
                return None

        def get(name: str) -> Any:
            try:
                return original(name)
            except RuntimeError:
                if (method := late(name)) is not None:
                    merge_methods.register(method)
                    return method
                if error := misspelt(name, [m.spec.name for m in merge_methods.registered_methods()]):
                    raise error from None
                raise

        return get

    _replace(merge_methods, "get", hooked)


def _hook_planner(plan: Any) -> None:
    """Plans of our methods, to disk and in memory. For all other methods MergeKit's own functions are called alone."""

    def hooked_plan(original: Any) -> Any:
        def _plan(self: Any) -> None:
            if not _method_of_ours(self._method):
                original(self)
                return
            from mergekit_symalign.graph.planner import plan_aligned

            plan_aligned(self, original)

        return _plan

    def hooked_to_disk(original: Any) -> Any:
        def plan_to_disk(self: Any, out_path: str) -> Any:
            targets = original(self, out_path)
            if not _method_of_ours(self._method):
                return targets
            from mergekit_symalign.graph.planner import plan_of

            return [*targets, *plan_of(self).extra_tasks(out_path, targets)]

        return plan_to_disk

    def hooked_in_memory(original: Any) -> Any:
        def plan_in_memory(self: Any) -> Any:
            if not _method_of_ours(self._method):
                return original(self)
            from mergekit_symalign.graph.planner import plan_in_memory

            return plan_in_memory(self, original)

        return plan_in_memory

    _replace(plan, "MergePlanner._plan", hooked_plan)
    _replace(plan, "MergePlanner.plan_to_disk", hooked_to_disk)
    _replace(plan, "MergePlanner.plan_in_memory", hooked_in_memory)


def _hook_merge(merge: Any) -> None:
    """The whole merge: models are checked before MergeKit looks at them, errors become readable, the card is extended.

    Errors of planning and of every task come through here, also from the threads of `--multi-gpu`.
    """

    def hooked(original: Any) -> Any:
        def run_merge(merge_config: Any, out_path: str, options: Any, *args: Any, **kwargs: Any) -> Any:
            with readable_errors():
                ours = _is_our_merge(merge_config)
                if ours:
                    from mergekit_symalign.graph.planner import before_merge

                    shared = before_merge(merge_config, options)
                    merge_config = shared.config(merge_config)
                    args = tuple(map(shared.in_any, args))
                    kwargs = {name: shared.in_any(value) for name, value in kwargs.items()}
                result = original(merge_config, out_path, options, *args, **kwargs)
                if ours and options.write_model_card:
                    from mergekit_symalign.card import extend_card

                    extend_card(Path(out_path), merge_config)
                return result

        return run_merge

    def hooked_architecture(original: Any) -> Any:
        def get_architecture_info(config: Any, options: Any) -> Any:
            if not _is_our_merge(config):
                return original(config, options)
            from mergekit_symalign.graph.planner import architecture_of

            return architecture_of(config, options, original)

        return get_architecture_info

    _replace(merge, "run_merge", hooked)
    _replace(merge, "get_architecture_info", hooked_architecture)


def _is_our_merge(merge_config: Any) -> bool:
    """Whether one of our methods is asked for; a name that nobody has is MergeKit's to refuse, unless ours is meant."""
    from mergekit import merge_methods

    try:
        return _method_of_ours(merge_methods.get(merge_config.merge_method))
    except SymalignError:
        raise
    except RuntimeError:
        return False


def _hook_raw_pytorch(script: Any) -> None:
    def hooked(original: Any) -> Any:
        def plan_flat_merge(config: Any, *args: Any, **kwargs: Any) -> Any:
            with readable_errors():
                method = script.merge_methods.get(config.merge_method)
                tasks = original(config, *args, **kwargs)
                for task in tasks if _method_of_ours(method) else ():
                    method.require_unblocked(getattr(task, "tensor_name", None))
                return tasks

        return plan_flat_merge

    _replace(script, "plan_flat_merge", hooked)


_HOOKS: dict[str, Callable[[Any], None]] = {
    "mergekit.merge_methods": _hook_methods,
    "mergekit.plan": _hook_planner,
    "mergekit.merge": _hook_merge,
    "mergekit.scripts.merge_raw_pytorch": _hook_raw_pytorch,
}


def _refuse(problem: str) -> None:
    """Make asking for one of our methods an error that names both versions; leave everything else alone.

    Methods are asked for by `merge_methods.get`. Where there is none, the dictionary that it would look into refuses.
    """

    def refuse(name: object) -> None:
        if isinstance(name, str) and is_ours(name):
            with readable_errors():
                raise HostError(f"merge method {name}", *host_error(problem))

    def hooked(original: Any) -> Any:
        def get(name: str, *args: Any, **kwargs: Any) -> Any:
            refuse(name)
            return original(name, *args, **kwargs)

        return get

    merge_methods = sys.modules.get("mergekit.merge_methods")
    if merge_methods is not None and hasattr(merge_methods, "get"):
        _replace(merge_methods, "get", hooked)
        return
    for module, name, methods in _registries():
        setattr(module, name, _Refusing(methods, refuse))


def host_error(problem: str) -> tuple[str, str]:
    """Reason and remedy of a `HostError`."""
    return (
        f"mergekit-symalign {__version__} does not know the internals of the installed mergekit "
        f"{metadata.version('mergekit')} ({problem})",
        f"Install mergekit {_SUPPORTED}, or a newer mergekit-symalign",
    )


class _Refusing(dict[str, Any]):
    """The dictionary of all methods without ours, which refuses to look for them."""

    def __init__(self, methods: dict[str, Any], refuse: Callable[[object], None]) -> None:
        super().__init__({name: method for name, method in methods.items() if not _method_of_ours(method)})
        self._refuse = refuse

    def __missing__(self, name: str) -> Any:
        self._refuse(name)
        raise KeyError(name)


def _registries() -> list[tuple[ModuleType, str, dict[str, Any]]]:
    """Where MergeKit keeps its methods, known by what is in it."""
    modules = [m for name, m in list(sys.modules.items()) if name.startswith("mergekit.merge_methods")]
    return [
        (module, name, value)
        for module in modules
        for name, value in list(vars(module).items())
        if type(value) is dict and {"linear", "slerp", "passthrough"} <= value.keys()
    ]
