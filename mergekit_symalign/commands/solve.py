"""``mergekit-symalign solve``: find an alignment and save it, without merging anything."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import click
from mergekit.architecture import get_architecture_info
from mergekit.config import MergeConfiguration
from mergekit.graph import Executor, Task
from mergekit.io.tasks import LoaderCache
from mergekit.options import MergeOptions, add_merge_options
from mergekit.plan import MergePlanner

from mergekit_symalign.commands.common import readable, require_one_family
from mergekit_symalign.graph.alignments import SaveAlignment
from mergekit_symalign.methods import ALIGNMENT_PARAMETERS

_NOT_HERE = ("anchor", "align", "alignment", "save_alignment")  # parameters of a merge that a solve has no use for
_PARAMETERS = tuple(p for p in ALIGNMENT_PARAMETERS if p.name not in _NOT_HERE)


def alignment_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """An option for every parameter of the aligned methods that says how to align."""
    for p in reversed(_PARAMETERS):
        name, shown = p.name.replace("_", "-"), {"default": p.default, "show_default": p.default is not None}
        if p.value_type is bool:
            option = click.option(f"--{name}/--no-{name}", help=p.description, **shown)
        elif get_origin(p.value_type) is Literal:
            option = click.option(f"--{name}", type=click.Choice(get_args(p.value_type)), help=p.description, **shown)
        else:
            kind = int if p.value_type is int else str
            option = click.option(f"--{name}", type=kind, help=p.description, **shown)
        command = option(command)
    return command


@click.command()
@click.argument("anchor")
@click.argument("model")
@click.option("-o", "--out", type=click.Path(path_type=Path, dir_okay=False), required=True, help="The file to write.")
@alignment_options
@add_merge_options
def solve(anchor: str, model: str, out: Path, merge_options: MergeOptions, **parameters: Any) -> None:
    """Align MODEL to ANCHOR and save the alignment, to be used by `alignment:` in a merge or by `apply`.

    \b
    Example: mergekit-symalign solve HuggingFaceTB/SmolLM2-135M ./tuned -o tuned.safetensors
    """
    merge_options.apply_global_options()
    with readable():
        require_one_family((anchor, model), merge_options)
        run_solve(anchor, model, out, merge_options, parameters)


def run_solve(anchor: str, model: str, out: Path, options: MergeOptions, parameters: dict[str, Any]) -> None:
    """Plan the merge that would bring the model to the anchor, and run what leads to its alignment file."""
    given = {name: value for name, value in parameters.items() if value is not None}
    config = MergeConfiguration.model_validate(
        {
            "merge_method": "rotation_match",
            "base_model": anchor,
            "models": [{"model": model}],
            "parameters": given | {"save_alignment": str(out.parent)},
        }
    )
    task = _save_task(config, options).model_copy(update={"path": str(out)})
    device = options.device or "cpu"
    executor = Executor([task], math_device=device, storage_device=device if options.low_cpu_memory else "cpu")
    for _, path in executor.run(quiet=options.quiet, desc="Solving"):
        click.echo(f"wrote {path}")


def _save_task(config: MergeConfiguration, options: MergeOptions) -> Task:
    LoaderCache().setup(options=options)
    arch = get_architecture_info(config, options)
    assert config.base_model is not None
    out_config = config.base_model.config(trust_remote_code=options.trust_remote_code)
    targets = MergePlanner(config, arch, options=options, out_model_config=out_config).plan_to_disk(out_path="unused")
    return next(task for task in targets if isinstance(task, SaveAlignment))
