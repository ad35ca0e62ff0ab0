"""What the commands share that align a model without merging it: options, configuration, plan and run."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from tempfile import gettempdir
from types import MappingProxyType
from typing import Any, Literal, TypeVar, get_args, get_origin

import click
from mergekit.architecture import get_architecture_info
from mergekit.config import MergeConfiguration
from mergekit.graph import Executor, Task
from mergekit.options import MergeOptions
from mergekit.plan import MergePlanner

from mergekit_symalign.commands.outcome import bars
from mergekit_symalign.graph.fresh import forget_architectures
from mergekit_symalign.graph.opening import require_openable
from mergekit_symalign.methods import ALIGNMENT_PARAMETERS

Kind = TypeVar("Kind", bound=Task)

_NOT_HERE = ("anchor", "align", "alignment", "save_alignment")  # parameters of a merge that a solve has no use for
_PARAMETERS = tuple(p for p in ALIGNMENT_PARAMETERS if p.name not in _NOT_HERE)


def alignment_options(
    command: Callable[..., Any], unset: Mapping[str, str] = MappingProxyType({})
) -> Callable[..., Any]:
    """An option for every parameter of the aligned methods that says how to align.

    Args:
        command: what gets them.
        unset: parameters that are None where the user says nothing, and what help says of that.
    """
    for p in reversed(_PARAMETERS):
        name, shown = p.name.replace("_", "-"), {"default": p.default, "show_default": p.default is not None}
        if p.name in unset:
            shown = {"default": None, "show_default": unset[p.name]}  # type: ignore[dict-item]
        if p.value_type is bool:
            option = click.option(f"--{name}/--no-{name}", help=p.description, **shown)
        elif get_origin(p.value_type) is Literal:
            option = click.option(f"--{name}", type=click.Choice(get_args(p.value_type)), help=p.description, **shown)
        else:
            kind = p.value_type if p.value_type in (int, float) else str
            option = click.option(f"--{name}", type=kind, help=p.description, **shown)
        command = option(command)
    return command


def not_default(parameters: Mapping[str, Any]) -> dict[str, Any]:
    """The parameters that a user gave another value than the one they have anyway."""
    usual = {p.name: p.default for p in _PARAMETERS}
    return {name: x for name, x in parameters.items() if name in usual and x is not None and x != usual[name]}


def alignment_config(anchor: str, model: str, parameters: Mapping[str, Any], **rest: Any) -> MergeConfiguration:
    """The merge that writes a model in the anchor's coordinates; parameters that are None were not given."""
    given = {name: value for name, value in parameters.items() if value is not None}
    merge = {"merge_method": "rotation_match", "base_model": anchor, "models": [{"model": model}], "parameters": given}
    return MergeConfiguration.model_validate(merge | rest)


def planned_task(config: MergeConfiguration, options: MergeOptions, kind: type[Kind]) -> Kind:
    """The task of this kind in the plan of a merge, which writes nothing by itself.

    Vocabularies may differ: the plan has MergeKit match them, and nobody runs that part of it.
    """
    config = config.model_copy(update={"tokenizer_source": "base"})
    require_openable(config.referenced_models(), options)
    forget_architectures()
    arch = get_architecture_info(config, options)
    assert config.base_model is not None
    out_config = config.base_model.config(trust_remote_code=options.trust_remote_code)
    planner = MergePlanner(config, arch, options=options, out_model_config=out_config)
    targets = planner.plan_to_disk(out_path=gettempdir())
    return next(task for task in targets if isinstance(task, kind))


def run_tasks(tasks: Sequence[Task], options: MergeOptions, what: str) -> Iterable[tuple[Task, Any]]:
    """Each task and its value, computed where MergeKit's options say."""
    device = options.device or "cpu"
    executor = Executor(list(tasks), math_device=device, storage_device=device if options.low_cpu_memory else "cpu")
    return executor.run(quiet=not bars(options.quiet), desc=what)  # type: ignore[no-any-return]
