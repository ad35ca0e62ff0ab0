"""``mergekit-symalign yaml --ray``: the options of MergeKit's command, for a driver and for workers."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import torch
from mergekit.options import MergeOptions

from mergekit_symalign import hook
from mergekit_symalign.distributed.executor import Request

_ON_THE_DRIVER = {"cuda": False, "device": "cpu", "low_cpu_memory": False, "read_to_gpu": False}
"""It plans, and may have no GPU."""


def requested(arguments: dict[str, Any], *, address: str, workers: int | None, gpus: float | None) -> Request:
    """
    Args:
        arguments: of MergeKit's command.
        address: of a cluster, or ``auto``.
        workers: how many at a time, or None.
        gpus: of each worker, or None.

    Raises:
        UsageError: if an option has no meaning on Ray.
    """
    options = MergeOptions(**{name: arguments[name] for name in MergeOptions.model_fields if name in arguments})
    uses_gpus = _device(options).type != "cpu"
    if options.multi_gpu:
        raise click.UsageError("--multi-gpu and --gpu-rich exclude --ray, whose workers have --gpus-per-worker each")
    if uses_gpus and gpus == 0:
        raise click.UsageError(f"--gpus-per-worker 0 leaves workers without a GPU, but --device is {options.device}")
    return Request(
        config=Path(arguments["config_file"]).read_text("utf-8"),
        options=options,
        out=arguments["out_path"],
        address=address,
        workers=workers,
        gpus=float(uses_gpus) if gpus is None else gpus,
    )


def merge_on_ray(merge: Callable[[dict[str, Any]], None], arguments: dict[str, Any], request: Request) -> None:
    """Run MergeKit's command with workers on Ray in the place of its executor.

    Args:
        merge: MergeKit's command.
        arguments: of it.
        request: made of them.
    """
    with hook.executed_by(request.executor):
        merge(arguments | _ON_THE_DRIVER)


def _device(options: MergeOptions) -> torch.device:
    try:
        return torch.device(options.device or "cpu")
    except RuntimeError as error:
        raise click.UsageError(f"--device {options.device}: torch knows no such device") from error
