"""What a worker does: it plans the merge, executes its part of it, and writes shards into a folder of its own."""

from __future__ import annotations

import logging
import os
import platform
import secrets
import zlib
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
import transformers
from mergekit.graph import Executor, TaskHandle
from mergekit.io.tensor_writer import TensorWriter

from mergekit_symalign.distributed.draws import Draws, InPlace, draws_of, generator_of, start_of
from mergekit_symalign.distributed.job import Done, Job
from mergekit_symalign.distributed.parts import Component, Graph, Part
from mergekit_symalign.distributed.planning import planned
from mergekit_symalign.distributed.sizes import LoadSizes
from mergekit_symalign.errors import WorkerError


def run_part(job: Job, part: Part) -> Done:
    """Execute a part. Doing so again is right at any time: every attempt has a folder that nothing else writes to.

    Raises:
        WorkerError: if this machine does not see a path, or plans another merge.
        SymalignError: what a merge in one process raises.
    """
    logging.basicConfig(level=logging.INFO if job.options.verbosity else logging.WARNING)
    if Path(job.folder).is_dir():
        os.chdir(job.folder)
    _require_seen(job)
    torch.set_num_threads(job.threads)
    graph = _plan(job)
    folder = Path(job.scratch) / f"{part.number:05d}-{secrets.token_hex(4)}"
    folder.mkdir()
    writer = _writer(graph, folder)
    told: dict[Any, Any] = {}
    strayed = False
    for component in part.components:
        found, drew_others = _execute(graph, component, writer, job)
        told |= found
        strayed |= drew_others
    writer.finalize()
    return Done(folder.name, _shards(writer, folder), writer.total_size, told, strayed)


def _shards(writer: TensorWriter, folder: Path) -> dict[str, str]:
    """The shard of each tensor. MergeKit's writer does not note the last name of a shard that is the only one."""
    only = [path.name for path in folder.iterdir()] if writer.shards_written == 1 else None
    return {tensor: only[0] if only else shard for tensor, shard in writer.weight_map.items()}


_plan = lru_cache(maxsize=1)(planned)  # a worker does several parts of a merge


def _require_seen(job: Job) -> None:
    for path, what in ((job.scratch, "the output folder"), *((path, "the model") for path in job.seen)):
        if not Path(path).exists():
            shown = job.out if path == job.scratch else path
            raise WorkerError(
                f"node {platform.node()}",
                f"it does not see {what} {shown}",
                "Put models and output on a file system that all nodes share, or name models of the Hugging Face hub",
            )


def _writer(graph: Graph, folder: Path) -> TensorWriter:
    """MergeKit's own, with the settings of the merge and another folder."""
    return graph.writer.model_copy(update={"out_path": str(folder)}).execute()


def _execute(graph: Graph, component: Component, writer: TensorWriter, job: Job) -> tuple[dict[Any, Any], bool]:
    """Save the tensors of a component.

    Returns:
        its values for the end of the merge, and whether it drew other random numbers than one process.
    """
    told = {graph.told[value]: value for value in component.told}
    given: dict[Any, Any] = {graph.handle(graph.writer): writer}
    if graph.tokenizer is not None:
        given[graph.tokenizer] = job.tokenizer
    wanted = dict.fromkeys([*(graph.saves[name] for name in component.saves), *told])
    draws = _draws(job)
    if draws:
        wanted |= dict.fromkeys(h for h in Executor([*wanted], cached_values=given).schedule.tasks if h in draws)
    executor = Executor(
        [*wanted],
        math_device=_device(job),
        storage_device=torch.device((job.options.device if job.options.low_cpu_memory else None) or "cpu"),
        cached_values=given,
    )
    values = executor._run(quiet=True)
    if job.random is None:
        return {told[handle]: value for handle, value in values if handle in told}, False
    assert job.options.random_seed is not None
    transformers.trainer_utils.set_seed(seed_of(component, job.options.random_seed))
    in_place = InPlace(draws, generator_of(_device(job)))
    values = in_place.run(executor.schedule.tasks, values)
    return {told[handle]: value for handle, value in values if handle in told}, in_place.strayed


def _device(job: Job) -> torch.device:
    return torch.device(job.options.device or "cpu")


@lru_cache(maxsize=1)
def _draws(job: Job) -> Mapping[TaskHandle, Draws]:
    """Where the random numbers of each task begin; nothing without a seed."""
    seed, device = job.options.random_seed, _device(job)
    if job.random is None or seed is None or generator_of(device) is None:
        return {}
    graph, tokens = _plan(job), 0 if job.tokenizer is None else len(job.tokenizer.tokenizer.get_vocab())
    return draws_of(graph.order, LoadSizes().header, tokens, start_of(job.random, seed, device), device)


def seed_of(component: Component, seed: int) -> int:
    """For what draws unforeseen: a seed that does not depend on which worker draws, nor on what it did before."""
    return (seed + zlib.crc32("\n".join(component.saves).encode())) % 2**32
