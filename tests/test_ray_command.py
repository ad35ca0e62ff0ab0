"""``yaml --ray`` without a cluster: its options, and what it says of workers, nodes and addresses."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import yaml
from click.testing import CliRunner
from conftest import OFFLINE
from merges_in_parts import NO_RAY, OPTIONS, config_of, merged, models, one_thread, planned

from mergekit_symalign import hook
from mergekit_symalign.cli import main
from mergekit_symalign.distributed import cluster, draws
from mergekit_symalign.distributed.executor import RayExecutor, Request
from mergekit_symalign.distributed.job import Done, Job
from mergekit_symalign.distributed.parts import Part
from mergekit_symalign.distributed.worker import run_part
from mergekit_symalign.errors import ConfigError, WorkerError

__all__ = ["models", "one_thread"]  # fixtures


# The command


@pytest.fixture
def file(models: list[Path], tmp_path: Path) -> str:
    path = tmp_path / "config.yml"
    path.write_text(yaml.safe_dump(config_of("plain", models)), "utf-8")
    return str(path)


def test_without_the_option_nothing_of_it_is_imported() -> None:
    code = (
        "import sys; import mergekit_symalign.commands.merge_yaml; "
        "assert not [m for m in sys.modules if m == 'ray' or m.startswith('mergekit_symalign.distributed')]"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=OFFLINE)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--workers", "2"], "--workers is for --ray, which is not given"),
        (["--gpus-per-worker", "1"], "--gpus-per-worker is for --ray, which is not given"),
        (["--ray", "merged"], "merged is no address of a Ray cluster. Write --ray auto, or --ray HOST:PORT"),
        (["--ray", "--multi-gpu"], "--multi-gpu and --gpu-rich exclude --ray"),
        (["--ray", "--cuda", "--gpus-per-worker", "0"], "--gpus-per-worker 0 leaves workers without a GPU"),
        (["--ray", "--device", "abacus"], "--device abacus: torch knows no such device"),
        (["--ray", "--workers", "0"], "0 is not in the range x>=1"),
    ],
)
def test_a_wrong_option_is_refused(options: list[str], said: str, file: str, tmp_path: Path) -> None:
    done = CliRunner().invoke(main, ["yaml", file, str(tmp_path / "out"), *options])
    assert done.exit_code == 2
    assert said in done.output
    assert not (tmp_path / "out").exists()


def test_ray_that_is_not_installed_is_named(file: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cluster, "find_spec", lambda _: None)
    done = CliRunner().invoke(main, ["yaml", file, str(tmp_path / "out"), "--ray"])
    assert done.exit_code == 2
    assert done.output.strip().splitlines()[-1] == (
        "Error: --ray: it needs the Python package ray, which is not installed. pip install 'mergekit-symalign[ray]'."
    )


def test_a_config_is_refused_before_ray_starts(
    models: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def started(*_: Any, **__: Any) -> None:
        raise AssertionError("Ray was started")

    monkeypatch.setattr(cluster, "connected", started)
    monkeypatch.setattr(cluster, "find_spec", lambda _: True)
    config = config_of("aligned", models) | {"parameters": {"rotatoin": "full"}}
    (tmp_path / "wrong.yml").write_text(yaml.safe_dump(config), "utf-8")
    done = CliRunner().invoke(main, ["yaml", str(tmp_path / "wrong.yml"), str(tmp_path / "out"), "--ray", "--quiet"])
    assert done.exit_code == 1
    assert "has no parameter of this name" in done.output
    assert not (tmp_path / "out").exists()


# What Ray says


@pytest.mark.parametrize(
    ("name", "asked", "said"),
    [
        ("residual", 2, ["--ray: 100 % of the merge hangs together and runs on one worker"]),
        ("plain", 3, ["--workers 3: the cluster has room for 2 with 1 threads each"]),
        ("plain", 2, []),
    ],
)
def test_workers_that_help_nothing_are_told(
    name: str,
    asked: int,
    said: list[str],
    models: list[Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(cluster, "workers_at_once", lambda _: 2)
    config = config_of(name, models)
    _, graph, components = planned(config, tmp_path)
    request = Request(yaml.safe_dump(config), OPTIONS, str(tmp_path), "auto", asked, 0.0)
    caplog.clear()
    assert RayExecutor(request, graph)._workers(cluster.Needs(1, 0.0), components) == asked
    assert len(caplog.messages) == len(said)
    assert all(message.startswith(start) for message, start in zip(caplog.messages, said, strict=True))


@pytest.mark.parametrize("known", [True, False])
def test_random_numbers_that_one_process_does_not_draw_are_told(
    known: bool, models: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def run_parts(job: Job, parts: Sequence[Part], *_: Any) -> Iterator[Done]:
        yield from (run_part(job, part) for part in parts)

    monkeypatch.setattr(cluster, "connected", lambda *_, **__: nullcontext())
    monkeypatch.setattr(cluster, "workers_at_once", lambda _: 2)
    monkeypatch.setattr(cluster, "run_parts", run_parts)
    if not known:
        monkeypatch.setattr(draws, "_counts", lambda *_: [])
    config, options = config_of("drawing", models), OPTIONS.model_copy(update={"random_seed": 7})
    request = Request(yaml.safe_dump(config), options, str(tmp_path / "out"), "auto", 2, 0.0)
    with hook.executed_by(request.executor):
        merged(config, tmp_path / "out", random_seed=7)
    told = [message for message in caplog.messages if "not those of one process" in message]
    assert len(told) == (0 if known else 1)


@pytest.mark.parametrize(
    ("needs", "room"), [((1, 0.0), 6), ((2, 0.0), 3), ((1, 1.0), 2), ((1, 0.5), 4), ((4, 0.0), 1), ((4, 1.0), 1)]
)
def test_room_is_what_each_node_has(needs: tuple[int, float], room: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cluster, "_nodes", lambda: [{"CPU": 4.0, "GPU": 2.0}, {"CPU": 2.0}, {}])
    assert cluster.workers_at_once(cluster.Needs(*needs)) == room


def test_a_cluster_without_room_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cluster, "_nodes", lambda: [{"CPU": 4.0}])
    with pytest.raises(ConfigError, match=r"no node of the cluster has 1 CPUs and 0\.5 GPUs for a worker"):
        cluster.workers_at_once(cluster.Needs(1, 0.5))
    with pytest.raises(WorkerError, match="no node is left that a worker fits on"):
        cluster._require_nodes(cluster.Needs(8, 0.0))


def test_an_address_that_nobody_answers_at_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    ray = pytest.importorskip("ray", reason=NO_RAY)

    def refuse(**_: Any) -> None:
        raise ConnectionError("Could not find any running Ray instance.\nTry again")

    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(ray, "init", refuse)
    with pytest.raises(ConfigError) as error, cluster.connected("10.0.0.1:1"):
        pass
    assert str(error.value).startswith(
        "--ray 10.0.0.1:1: there is no cluster that answers (Could not find any running Ray instance). Start one"
    )


def test_a_cluster_that_is_started_here_does_not_starve_its_workers(monkeypatch: pytest.MonkeyPatch) -> None:
    ray = pytest.importorskip("ray", reason=NO_RAY)
    started = []
    monkeypatch.setattr(os, "environ", {"RAY_USAGE_STATS_ENABLED": "1"})
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(ray, "init", lambda **_: started.append(dict(os.environ)))
    monkeypatch.setattr(ray, "shutdown", lambda: None)
    with cluster.connected("auto"):
        assert started == [{"RAY_USAGE_STATS_ENABLED": "1", "RAY_worker_niceness": "0"}]


def test_a_part_whose_workers_always_die_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    ray = pytest.importorskip("ray", reason=NO_RAY)

    def die(_: Any) -> None:
        raise ray.exceptions.WorkerCrashedError

    monkeypatch.setattr(ray, "get", die)
    with pytest.raises(WorkerError, match="a part of the merge failed 4 times because its worker died"):
        cluster._result(None)
