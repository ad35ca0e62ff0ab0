"""Ray: connecting to a cluster, and running parts on its nodes. The only module that imports Ray."""

from __future__ import annotations

import logging
import os
from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

from mergekit_symalign.distributed.job import Done, Job
from mergekit_symalign.distributed.parts import Part
from mergekit_symalign.errors import ConfigError, SymalignError, WorkerError

LOG = logging.getLogger(__name__)

RETRIES = 3
FOR_NODES = {"RAY_USAGE_STATS_ENABLED": "0", "RAY_worker_niceness": "0"}
"""Variables of a cluster that is started here. It reports to nobody, and its workers have the priority of any program:
at Ray's own, 15, they get 3 % of a core that something else keeps busy."""
_LOOK = 5.0  # seconds between looks at the nodes
_END = 30.0  # seconds for cancelled parts to end
Work = Callable[[Job, Part], Done]


@dataclass(frozen=True)
class Needs:
    """What a worker takes of its node: CPUs are threads."""

    cpus: int
    gpus: float


def require_ray() -> None:
    """
    Raises:
        ConfigError: if Ray is not installed.
    """
    if find_spec("ray") is None:
        raise ConfigError(
            "--ray", "it needs the Python package ray, which is not installed", "pip install 'mergekit-symalign[ray]'"
        )


@contextmanager
def connected(address: str, *, log: bool = False) -> Iterator[None]:
    """Join a cluster, or start one on this machine; a connection that is there already is used and kept.

    Args:
        address: of a cluster; ``auto`` joins a running one, or starts one.
        log: whether to show what workers write to their consoles.

    Raises:
        ConfigError: if there is none at this address.
    """
    import ray

    if ray.is_initialized():
        yield
        return
    for name, value in FOR_NODES.items():
        os.environ.setdefault(name, value)
    try:
        ray.init(address=None if address == "auto" else address, logging_level=logging.ERROR, log_to_driver=log)
    except Exception as error:  # it has errors of its own, and those of gRPC
        raise ConfigError(
            f"--ray {address}",
            f"there is no cluster that answers ({_first_line(error)})",
            "Start one with ray start --head, or use --ray auto",
        ) from error
    try:
        yield
    finally:
        ray.shutdown()


def workers_at_once(needs: Needs) -> int:
    """How many workers the cluster has room for.

    Raises:
        ConfigError: if there is no node that one fits on.
    """
    room = sum(_fitting(node, needs) for node in _nodes())
    if room == 0:
        gpus = f" and {needs.gpus:g} GPUs" if needs.gpus else ""
        raise ConfigError(
            "--ray",
            f"no node of the cluster has {needs.cpus} CPUs{gpus} for a worker",
            "Choose fewer threads (-j) or --gpus-per-worker, or add a node",
        )
    return room


def _nodes() -> list[dict[str, float]]:
    import ray

    return [node["Resources"] for node in ray.nodes() if node["Alive"]]


def _fitting(node: dict[str, float], needs: Needs) -> int:
    rooms = [node.get("CPU", 0) / needs.cpus]
    rooms += [node.get("GPU", 0) / needs.gpus] if needs.gpus else []
    return int(min(rooms))


def run_parts(job: Job, parts: Sequence[Part], workers: int, needs: Needs, work: Work) -> Generator[Done]:
    """What was done by each part, as they end. If this is left before the last of them, all others are stopped.

    Args:
        job: the merge.
        parts: of it.
        workers: how many run at a time.
        needs: of each.
        work: what a worker does.

    Raises:
        SymalignError: what a worker raises.
        WorkerError: if workers of a part died more than `RETRIES` times, or no node is left.
    """
    import ray

    remote = ray.remote(work).options(
        num_cpus=needs.cpus, num_gpus=needs.gpus, max_retries=RETRIES, scheduling_strategy="SPREAD"
    )
    shared = ray.put(job)
    waiting = deque(sorted(parts, key=lambda part: -part.size))
    running: list[Any] = []
    try:
        while waiting or running:
            while waiting and len(running) < workers:
                running.append(remote.remote(shared, waiting.popleft()))
            ready, running = ray.wait(running, num_returns=1, timeout=_LOOK)
            if not ready:
                _require_nodes(needs)
            for reference in ready:
                yield _result(reference)
    finally:
        _stop(running)


def _result(reference: Any) -> Done:
    import ray
    from ray.exceptions import RayError, RayTaskError

    try:
        done: Done = ray.get(reference)
    except RayTaskError as error:
        if isinstance(cause := error.cause, SymalignError):
            raise cause from None
        raise
    except RayError as error:
        raise WorkerError(
            "--ray",
            f"a part of the merge failed {RETRIES + 1} times because its worker died ({_first_line(error)})",
            "A worker that runs out of memory is killed: use fewer --workers, or see Ray's logs",
        ) from error
    return done


def _require_nodes(needs: Needs) -> None:
    if not any(_fitting(node, needs) for node in _nodes()):
        raise WorkerError("--ray", "no node is left that a worker fits on", "Start the nodes again, then the merge")


def _stop(references: list[Any]) -> None:
    """End parts, and wait until they have ended: they write into a folder that is removed next."""
    import ray

    for reference in references:
        ray.cancel(reference, force=True)
    if references:
        ray.wait(references, num_returns=len(references), timeout=_END)


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")
