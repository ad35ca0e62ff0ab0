"""A worker's own plan of the merge: everything that MergeKit and this package do before the first task runs."""

from __future__ import annotations

import platform
from collections.abc import Sequence
from typing import Any

import yaml
from mergekit.config import MergeConfiguration
from mergekit.graph import Task
from mergekit.io.tasks import LoaderCache
from mergekit.merge import run_merge

from mergekit_symalign import hook
from mergekit_symalign.distributed.job import Job, digest_of
from mergekit_symalign.distributed.parts import Graph
from mergekit_symalign.distributed.sizes import LoadSizes
from mergekit_symalign.errors import WorkerError
from mergekit_symalign.graph.silence import without_warnings


class _Planned(Exception):  # noqa: N818 - no error: it ends MergeKit's function where the tasks would run
    def __init__(self, targets: Sequence[Task]) -> None:
        self.targets = targets


def planned(job: Job) -> Graph:
    """
    Raises:
        WorkerError: if the plan is not the driver's.
        SymalignError: for whatever is wrong with the merge on this machine.
    """
    graph = Graph(targets(job))
    if digest_of(graph, graph.components(LoadSizes())) != job.digest:
        raise WorkerError(
            f"node {platform.node()}",
            "it plans another merge than the machine that started it: it sees other files under the same names, or has "
            "other versions of mergekit-symalign, mergekit, torch or transformers",
            "Give all nodes the same files and versions",
        )
    return graph


def targets(job: Job) -> Sequence[Task]:
    """What MergeKit's planner makes of a job, none of it executed."""
    config = MergeConfiguration.model_validate(yaml.safe_load(job.config))
    options = job.options.model_copy(update={"quiet": True})
    hook.install()
    LoaderCache().loaders.clear()  # they may be of an earlier merge
    try:
        with hook.executed_by(_stop), without_warnings():  # the driver has shown them
            run_merge(config, job.out, options)
    except _Planned as end:
        return end.targets
    raise AssertionError("MergeKit merged without its executor")


def _stop(targets: Sequence[Task], **_: Any) -> Any:
    raise _Planned(targets)
