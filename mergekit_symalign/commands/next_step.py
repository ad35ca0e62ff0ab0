"""The command to run after `inspect`, ready to paste."""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Mapping
from typing import Any

from mergekit.common import ModelReference
from mergekit.options import MergeOptions

from mergekit_symalign.activations.objectives import predicts_text
from mergekit_symalign.card import nothing_to_align
from mergekit_symalign.commands.alignment import alignment_config, not_default
from mergekit_symalign.commands.compare_merges import arguments
from mergekit_symalign.commands.names import short_names
from mergekit_symalign.graph.text_parts import text_parts

_PLAIN = ("--set", "merge_method=linear", "--set", "models.1.parameters.weight=0.25,0.5,1")
_ALIGNED = ("--set", "merge_method=rotation_match")  # where MergeKit's own methods cannot merge the two


def next_step(
    anchor: str,
    model: str,
    totals: Mapping[str, Any],
    options: MergeOptions,
    parameters: Mapping[str, Any],
    *,
    configs_differ: bool,
) -> list[str]:
    """A line that says what for, and the command.

    Args:
        anchor, model: as the user named them.
        totals: of the report, with the residual stream where it was moved.
        options, parameters: as `inspect` was given them.
        configs_differ: whether the two are different functions of the same weights.
    """
    nothing = nothing_to_align(totals) and not configs_differ
    own = list(arguments(options))[1:]  # without --quiet
    if not predicts_text(ModelReference.parse(model).config(trust_remote_code=options.trust_remote_code)):
        return _without_texts(anchor, model, [*_as_options(parameters), *own], nothing=nothing)
    call = ["mergekit-symalign", "compare", "--average", anchor, model, "--data", "texts.jsonl"]
    if text_parts(alignment_config(anchor, model, {}), options.trust_remote_code).outer is not None:
        question, more = "is the merge better than the model around it?", [*_ALIGNED, *_as_values(parameters)]
    elif nothing:
        question, more = "which weight suits a plain average?", list(_PLAIN)
    elif configs_differ:
        question, more = "does a merge stand the different configs?", list(_as_values(parameters))
    else:
        question, more = "is the aligned average better than the plain one?", list(_as_values(parameters))
    return ["", f"next, on your own texts: {question}", f"  {shlex.join([*call, *more, *own])}"]


def _without_texts(anchor: str, model: str, options: list[str], *, nothing: bool) -> list[str]:
    """Of encoders and vision models, which have no loss on texts."""
    if nothing:
        return ["", "next: merge them with a plain method", "  mergekit-yaml merge.yml merged"]
    file = f"{short_names([model])[0].replace('/', '-')}.safetensors"
    call = ["mergekit-symalign", "solve", anchor, model, "-o", file, *options]
    return ["", "next: save the alignment, for alignment: in a merge", f"  {shlex.join(call)}"]


def _as_values(parameters: Mapping[str, Any]) -> Iterator[str]:
    """Parameters as `compare` takes them."""
    for name, value in not_default(parameters).items():
        yield from ("--set", f"parameters.{name}={str(value).lower() if isinstance(value, bool) else value}")


def _as_options(parameters: Mapping[str, Any]) -> Iterator[str]:
    """Parameters as `solve` takes them."""
    for name, value in not_default(parameters).items():
        option = name.replace("_", "-")
        yield from ([f"--{'' if value else 'no-'}{option}"] if isinstance(value, bool) else [f"--{option}", str(value)])
