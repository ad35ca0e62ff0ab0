"""What stands where MergeKit's executor stands: parts go to Ray's workers, the end of the merge stays here."""

from __future__ import annotations

import logging
import secrets
import shutil
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from mergekit.graph import Executor, Task
from mergekit.io.tasks import FinalizeModel
from mergekit.options import MergeOptions
from tqdm import tqdm

from mergekit_symalign.distributed import cluster
from mergekit_symalign.distributed.draws import state_of
from mergekit_symalign.distributed.job import Done, Job, digest_of, local_paths
from mergekit_symalign.distributed.join import join
from mergekit_symalign.distributed.parts import Component, Graph, balanced, share_of_largest
from mergekit_symalign.distributed.sizes import LoadSizes
from mergekit_symalign.distributed.worker import run_part

LOG = logging.getLogger(__name__)

PARTS = 4  # for each worker, so that one that is slow or dies is waited for a quarter of its time
_HALF = 0.5
_STRAYED = (
    "--ray: the merge drew random numbers in a way that is not known here. They come from the seed, and are the same "
    "for any number of workers, but they are not those of one process"
)


@dataclass(frozen=True)
class Request:
    """What the user asks for.

    Attributes:
        config: the configuration, as YAML.
        options: of the workers.
        out: folder of the output.
        address: of Ray's cluster, or ``auto``.
        workers: how many at a time; as many as fit, if None.
        gpus: of each.
        work: what a worker does.
    """

    config: str
    options: MergeOptions
    out: str
    address: str
    workers: int | None
    gpus: float
    work: cluster.Work = run_part

    def executor(self, targets: Sequence[Task], **_: Any) -> RayExecutor:
        """In the place of MergeKit's executor; its devices are those of the workers' options."""
        return RayExecutor(self, Graph(targets), state_of(self.options.random_seed))


@dataclass(frozen=True)
class RayExecutor:
    """Executes the tasks of a merge on a cluster."""

    request: Request
    graph: Graph
    random: bytes | None = None

    def run(self, quiet: bool = False) -> Iterator[tuple[Task, Any]]:
        """As MergeKit's: the values of the targets that write no tensor."""
        components = self.graph.components(LoadSizes())
        built = self._tokenizer()
        needs = cluster.Needs(torch.get_num_threads(), self.request.gpus)
        ray = cluster.connected(self.request.address, log=self.request.options.verbosity > 0)
        with ray, _scratch(Path(self.request.out)) as scratch:
            workers = self._workers(needs, components)
            parts = balanced(components, workers * PARTS)
            job = self._job(scratch, components, needs, built)
            with closing(cluster.run_parts(job, parts, workers, needs, self.request.work)) as work:
                bar = tqdm(work, total=len(parts), desc=f"Executing parts on {workers} workers", disable=quiet)
                done = sorted(bar, key=lambda one: one.folder)
            join(self.graph.writer, scratch, done)
        if any(one.strayed for one in done):
            LOG.warning(_STRAYED)
        yield from built.items()
        yield from self._end(done)

    def _tokenizer(self) -> dict[Task, Any]:
        """The output's tokenizer, by the task that builds it; nothing if there is none to build."""
        task = self.graph.tokenizer.task() if self.graph.tokenizer is not None else None
        return {} if task is None else {task: task.execute()}

    def _workers(self, needs: cluster.Needs, components: Sequence[Component]) -> int:
        room = cluster.workers_at_once(needs)
        workers = room if self.request.workers is None else self.request.workers
        if workers > room:
            LOG.warning("--workers %d: the cluster has room for %d with %d threads each", workers, room, needs.cpus)
        share = share_of_largest(components)
        if workers > 1 and share > _HALF:
            LOG.warning(
                "--ray: %.0f %% of the merge hangs together and runs on one worker; more workers save little. "
                "A residual stream, activations and transport connect all layers",
                100 * share,
            )
        return workers

    def _job(self, scratch: Path, components: Sequence[Component], needs: cluster.Needs, built: dict[Task, Any]) -> Job:
        return Job(
            config=self.request.config,
            options=self.request.options,
            out=str(Path(self.request.out).absolute()),
            scratch=str(scratch),
            folder=str(Path.cwd()),
            threads=needs.cpus,
            seen=local_paths(self.graph),
            digest=digest_of(self.graph, components),
            random=self.random,
            tokenizer=next(iter(built.values()), None),
        )

    def _end(self, done: Sequence[Done]) -> Iterator[tuple[Task, Any]]:
        """The tasks at the end of the merge, with the values that the workers found."""
        told = {self.graph.told[value]: found for one in done for value, found in one.told.items()}
        ended = {handle: None for handle in self.graph.ends if isinstance(handle.task(), FinalizeModel)}
        rest = [handle for handle in self.graph.ends if handle not in ended]
        yield from Executor(rest, cached_values={**told, **ended}).run(quiet=True)


@contextmanager
def _scratch(out: Path) -> Iterator[Path]:
    """A hidden folder in the output's, which is gone afterwards; so is the output's if nothing came into it."""
    new = not out.exists()
    scratch = out.absolute() / f".symalign-parts-{secrets.token_hex(4)}"
    scratch.mkdir(parents=True)
    try:
        yield scratch
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
        if new:
            with suppress(OSError):  # it is not empty
                out.rmdir()
