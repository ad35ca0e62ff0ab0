"""Merges on a Ray cluster of two nodes: the bits of one process, and what if some die. No wait here is unbounded."""

from __future__ import annotations

import _thread
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any
from unittest.mock import patch

import psutil
import pytest
import torch
import yaml
from click.testing import CliRunner
from merges_in_parts import MERGES, NO_RAY, OPTIONS, assert_same, config_of, merged, models, one_thread
from models import make_model, save
from safetensors.torch import load_file, save_file

from mergekit_symalign import hook
from mergekit_symalign.cli import main
from mergekit_symalign.distributed import cluster, worker
from mergekit_symalign.distributed.executor import Request
from mergekit_symalign.distributed.job import Done, Job
from mergekit_symalign.distributed.parts import Part
from mergekit_symalign.distributed.worker import run_part
from mergekit_symalign.errors import ConfigError
from mergekit_symalign.whole_file import written_whole

__all__ = ["models", "one_thread"]  # fixtures

SPOILT = "model.layers.1.mlp.up_proj.weight"
LONG = 180.0  # seconds that nothing here takes, however busy the machine is


@contextmanager
def within(seconds: float) -> Iterator[None]:
    """Interrupt what takes longer, again and again. Of all exceptions, only an interruption leaves Ray's waits."""
    late = False

    def interrupt(*_: Any) -> None:
        nonlocal late
        late = True
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGALRM, interrupt)
    signal.setitimer(signal.ITIMER_REAL, seconds, 5.0)
    try:
        yield
    except KeyboardInterrupt:
        if late:
            raise TimeoutError(f"it took longer than {seconds:g} s") from None
        raise
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0.0)
        signal.signal(signal.SIGALRM, before)


def started_by_this() -> set[psutil.Process]:
    return set(psutil.Process().children(recursive=True))


@pytest.fixture(scope="module")
def nodes() -> Iterator[Any]:
    """Two nodes with a CPU each, on this machine. Whatever happens, none of their processes is left."""
    ray = pytest.importorskip("ray", reason=NO_RAY)
    if sys.platform != "linux":
        pytest.skip("Ray runs clusters of several nodes on one machine on Linux only")
    from ray.cluster_utils import Cluster

    ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])
    before = started_by_this()
    started = Cluster()
    try:
        with within(LONG), patch.dict(os.environ, cluster.FOR_NODES):
            for _ in range(2):
                started.add_node(num_cpus=1)
            ray.init(address=started.address, log_to_driver=False)
        yield started
    finally:
        left = started_by_this() - before
        try:
            with within(60):
                ray.shutdown()
                started.shutdown()
        finally:
            for process in left:
                with suppress(psutil.NoSuchProcess):
                    process.kill()


def merged_on_ray(
    config: dict[str, Any], out: Path, work: cluster.Work = run_part, workers: int = 2, seed: int | None = None
) -> Path:
    options = OPTIONS.model_copy(update={"random_seed": seed})
    request = Request(yaml.safe_dump(config), options, str(out), "auto", workers, 0.0, work)
    with within(LONG), hook.executed_by(request.executor):
        return merged(config, out, random_seed=seed)


@pytest.mark.parametrize("name", MERGES[:5])
@pytest.mark.usefixtures("nodes")
def test_two_nodes_merge_what_one_process_merges(name: str, models: list[Path], tmp_path: Path) -> None:
    config = config_of(name, models, tmp_path / "saved")
    one = merged(config, tmp_path / "one" / "out", random_seed=7)
    saved = {path.name: path.read_bytes() for path in (tmp_path / "saved").glob("*")}
    two = merged_on_ray(config, tmp_path / "two" / "out", seed=7)
    assert_same(one, two)
    assert {path.name: path.read_bytes() for path in (tmp_path / "saved").glob("*")} == saved
    assert len(saved) == (2 if name == "aligned" else 0)
    assert not [path for path in two.iterdir() if path.name.startswith(".")]


@pytest.mark.usefixtures("nodes")
def test_a_worker_that_fits_nowhere_is_refused(models: list[Path], tmp_path: Path) -> None:
    torch.set_num_threads(4)
    with pytest.raises(ConfigError, match="no node of the cluster has 4 CPUs for a worker"):
        merged_on_ray(config_of("plain", models), tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.usefixtures("nodes")
def test_workers_yield_the_cores_to_nobody() -> None:
    """With Ray's default, 15, a worker on busy cores gets 3 % of one, and its imports take minutes."""
    import ray

    def niceness() -> int:
        return int(psutil.Process().nice())

    assert ray.get(ray.remote(niceness).remote(), timeout=LONG) == niceness()


def waiting(node: str | None, marker: Path) -> Callable[[Job, Part], Done]:
    """Work that does not end on one node (on any, if None), once its shards are written; others begin after that."""

    def wait(*_: Any) -> Any:
        with written_whole(marker) as scratch:
            scratch.write_text(str(os.getpid()), "utf-8")
        time.sleep(2 * LONG)

    def work(job: Job, part: Part) -> Done:
        import ray

        if node in (None, ray.get_runtime_context().get_node_id()):
            worker._shards = wait
        else:
            soon(marker.exists)
        return run_part(job, part)

    return work


def when_there(marker: Path, act: Callable[[], object]) -> threading.Thread:
    """Do something as soon as a file is there."""

    def watch() -> None:
        if soon(marker.exists):
            act()

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    return thread


@contextmanager
def interrupted(marker: Path) -> Iterator[None]:
    """Ctrl-C as soon as a file is there; also in a process that a shell has started to ignore it, in the background."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    when_there(marker, _thread.interrupt_main)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def soon(happened: Callable[[], bool]) -> bool:
    """Whether something happens before it is too late."""
    end = time.monotonic() + LONG
    while not (known := happened()) and time.monotonic() < end:
        time.sleep(0.05)
    return known


def test_a_node_that_dies_in_the_middle_changes_nothing(nodes: Any, models: list[Path], tmp_path: Path) -> None:
    config = config_of("aligned", models)
    (victim,) = nodes.worker_nodes
    dies = when_there(tmp_path / "marker", lambda: nodes.remove_node(victim, allow_graceful=False))
    work = waiting(victim.node_id, tmp_path / "marker")
    out = merged_on_ray(config, tmp_path / "ray" / "out", work)
    dies.join(LONG)
    assert (tmp_path / "marker").exists()
    assert_same(merged(config, tmp_path / "one" / "out"), out)
    assert not [path for path in out.iterdir() if path.name.startswith(".")]


@pytest.mark.usefixtures("nodes")
def test_a_part_that_fails_is_one_line_and_leaves_nothing(models: list[Path], tmp_path: Path) -> None:
    state = load_file(models[1] / "model.safetensors")
    state[SPOILT][3, 5] = float("nan")
    spoilt = save(make_model("llama", 1), tmp_path / "spoilt")
    save_file(state, spoilt / "model.safetensors", metadata={"format": "pt"})
    config = config_of("aligned", [models[0], spoilt, models[2]])
    (tmp_path / "config.yml").write_text(yaml.safe_dump(config), "utf-8")
    arguments = ["yaml", str(tmp_path / "config.yml"), str(tmp_path / "out"), "--quiet", "--ray", "--workers", "2"]
    with within(LONG):
        done = CliRunner().invoke(main, arguments)
    assert done.exit_code == 1, done.output
    # Ray tells of killed workers from a thread of its own, which the cluster of these tests outlives the command with.
    (line,) = [line for line in done.output.splitlines() if line.startswith("Error: ")]
    assert line.startswith(f"Error: tensor {SPOILT} of model {spoilt}: it holds NaN")
    assert "Traceback" not in done.output
    assert not (tmp_path / "out").exists()


@pytest.mark.usefixtures("nodes")
def test_an_interruption_leaves_nothing(models: list[Path], tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt), interrupted(tmp_path / "marker"):
        merged_on_ray(config_of("plain", models), tmp_path / "out", waiting(None, tmp_path / "marker"))
    assert not (tmp_path / "out").exists()
    waits = int((tmp_path / "marker").read_text("utf-8"))
    assert soon(lambda: not psutil.pid_exists(waits)), "a worker still runs"
