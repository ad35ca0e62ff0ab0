"""The options that say how models are opened and where they run, for commands that do not take all of a merge's."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import click

_OPTIONS = (
    click.option("--lora-merge-cache", help="Directory for models with their adapters (model+adapter)."),
    click.option("--lora-merge-dtype", help="Override the dtype in which adapters are applied."),
    click.option("--transformers-cache", help="Override the directory for downloaded models."),
    click.option("--lazy-unpickle", is_flag=True, help="Read PyTorch files with less memory (experimental)."),
    click.option("--trust-remote-code", is_flag=True, help="Allow code that comes with a model's config or tokenizer."),
)
_NAMES = ("device", "lora_merge_cache", "lora_merge_dtype", "transformers_cache", "lazy_unpickle", "trust_remote_code")


def model_options(command: Callable[..., Any], device: str = "cpu") -> Callable[..., Any]:
    """The command gets them together, as ``models``: arguments for MergeKit's `MergeOptions`, whose names they have.

    Args:
        command: what gets them.
        device: where models run unless the user says otherwise.
    """

    @functools.wraps(command)
    def collected(**given: Any) -> Any:
        models = {name: given.pop(name) for name in _NAMES}
        return command(models=models, **given)

    where = click.option("--device", default=device, show_default=True, help="Where to run the models.")
    for option in reversed((where, *_OPTIONS)):
        collected = option(collected)
    return collected
