"""``mergekit-symalign solve``: find an alignment and save it, without merging anything."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import click
from mergekit.options import MergeOptions, add_merge_options

from mergekit_symalign.alignments.destinations import require_alignment_or_nothing
from mergekit_symalign.commands.alignment import alignment_config, alignment_options, planned_task, run_tasks
from mergekit_symalign.commands.common import require_alignable
from mergekit_symalign.commands.outcome import Command
from mergekit_symalign.graph.alignments import SaveAlignment
from mergekit_symalign.whole_file import require_writable


@click.command(cls=Command)
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
    require_writable(out)
    require_alignment_or_nothing(out)
    require_alignable(anchor, model, merge_options)
    run_solve(anchor, model, out, merge_options, parameters)


def run_solve(
    anchor: str,
    model: str,
    out: Path,
    options: MergeOptions,
    parameters: Mapping[str, Any],
    say: Callable[[str], object] = click.echo,
) -> None:
    """Plan the merge that would bring the model to the anchor, and run what leads to its alignment file."""
    config = alignment_config(anchor, model, {**parameters, "save_alignment": str(out.parent)})
    task = planned_task(config, options, SaveAlignment).model_copy(update={"path": str(out)})
    for _, path in run_tasks([task], options, "Solving"):
        say(f"wrote {path}")
