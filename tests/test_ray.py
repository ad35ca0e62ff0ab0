"""A merge on several machines: how it is cut, that its parts give the bits of one process, and what if some die."""

from __future__ import annotations

import _thread
import os
import random
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import pairwise, product
from pathlib import Path
from typing import Any
from unittest.mock import patch

import psutil
import pytest
import torch
import yaml
from click.testing import CliRunner
from conftest import OFFLINE, load, merge_config
from mergekit.config import MergeConfiguration
from mergekit.merge import run_merge
from mergekit.options import MergeOptions
from models import make_model, save, word_tokenizer
from safetensors.torch import load_file, save_file

from mergekit_symalign import hook
from mergekit_symalign.cli import main
from mergekit_symalign.distributed import cluster, worker
from mergekit_symalign.distributed.executor import RayExecutor, Request
from mergekit_symalign.distributed.job import Done, Job, digest_of, local_paths
from mergekit_symalign.distributed.join import join
from mergekit_symalign.distributed.parts import Component, Graph, Part, balanced, share_of_largest
from mergekit_symalign.distributed.planning import targets
from mergekit_symalign.distributed.sizes import LoadSizes
from mergekit_symalign.distributed.worker import run_part, seed_of
from mergekit_symalign.errors import ConfigError, ValueInTensorError, WorkerError
from mergekit_symalign.whole_file import written_whole

OPTIONS = MergeOptions(quiet=True, random_seed=None)
SPOILT = "model.layers.1.mlp.up_proj.weight"
NO_RAY = "Ray is not installed: pip install 'mergekit-symalign[ray]'"
MERGES = ("plain", "aligned", "slices", "tokenizer", "shared")


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Three models with tokenizers; the last has a word that the others lack, so that a union has one order only."""
    folder = tmp_path_factory.mktemp("models")
    paths = [save(make_model("llama", seed), folder / str(seed)) for seed in range(3)]
    for path, words in zip(paths, (96, 96, 97), strict=True):
        word_tokenizer(words).save_pretrained(path)
    return paths


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Workers have as many threads as the driver, and the nodes of these tests have one CPU each."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def config_of(name: str, models: list[Path], saved: Path | None = None) -> dict[str, Any]:
    """The merges that are tried here."""
    weighed = [{"model": m, "parameters": {"weight": 0.5}} for m in models[1:]]
    if name == "aligned":
        save = {} if saved is None else {"parameters": {"save_alignment": str(saved)}}
        return merge_config("aligned_task_arithmetic", models[0], weighed, dtype="bfloat16", **save)
    if name == "tokenizer":
        return merge_config("linear", None, weighed, tokenizer={"source": "union"})
    if name == "slices":
        ranges = [(0, 2), (1, 3)]
        slices = [
            {"sources": [{"model": str(m), "layer_range": list(r)}]} for m, r in zip(models, ranges, strict=False)
        ]
        return {"merge_method": "passthrough", "slices": slices, "dtype": "float32"}
    if name == "shared":  # one layer of a model in two layers of the output
        slices = [{"sources": [{"model": str(models[0]), "layer_range": [0, end]}]} for end in (2, 1)]
        return {"merge_method": "passthrough", "slices": slices, "dtype": "float32"}
    if name == "residual":
        return merge_config("aligned_linear", models[0], weighed, parameters={"residual": "permutation"})
    return merge_config("task_arithmetic", models[0], weighed)


def job_of(config: dict[str, Any], out: Path) -> Job:
    return Job(yaml.safe_dump(config), OPTIONS, str(out), str(out / "scratch"), str(Path.cwd()), 1, (), "")


def planned(config: dict[str, Any], out: Path) -> tuple[Job, Graph, tuple[Component, ...]]:
    """A job as the driver makes it, and its cut."""
    job = job_of(config, out)
    graph = Graph(targets(job))
    components = graph.components(LoadSizes())
    return replace(job, digest=digest_of(graph, components), seen=local_paths(graph)), graph, components


def merged(config: dict[str, Any], out: Path, **options: Any) -> Path:
    run_merge(MergeConfiguration.model_validate(config), str(out), MergeOptions(quiet=True, **options))
    return out


def merged_on_ray(config: dict[str, Any], out: Path, work: cluster.Work = run_part, workers: int = 2) -> Path:
    request = Request(yaml.safe_dump(config), OPTIONS, str(out), "auto", workers, 0.0, work)
    with hook.executed_by(request.executor):
        return merged(config, out)


def assert_same(one: Path, other: Path) -> None:
    """Every tensor's bits, and every other file; only the shards may be others."""
    weights, others = (load(path) for path in (one, other))
    assert weights.keys() == others.keys()
    for name, x in weights.items():
        assert (x.dtype, x.shape) == (others[name].dtype, others[name].shape)
        assert torch.equal(x.view(torch.uint8), others[name].view(torch.uint8)), name
    files, more = (
        {p.name: p.read_bytes() for p in path.iterdir() if "safetensors" not in p.name} for path in (one, other)
    )
    assert files == more
    assert {"config.json", "mergekit_config.yml", "README.md"} <= files.keys()


# How a merge is cut


@pytest.mark.parametrize("name", [*MERGES, "residual"])
def test_every_tensor_is_in_one_part_and_parts_need_nothing_of_each_other(
    name: str, models: list[Path], tmp_path: Path
) -> None:
    _, graph, components = planned(config_of(name, models, tmp_path / "saved"), tmp_path / "out")
    saves = [tensor for component in components for tensor in component.saves]
    assert sorted(saves) == sorted(graph.saves)
    assert len(saves) == len(set(saves))
    assert sorted(value for c in components for value in c.told) == sorted(graph.told)
    needed = [_needed(graph, component) for component in components]
    assert sum(map(len, needed)) == len(set().union(*needed))


def _needed(graph: Graph, component: Component) -> set[int]:
    """All tasks that run for a component, but for those that each worker repeats."""
    waiting = [graph.saves[name] for name in component.saves] + [graph.told[value] for value in component.told]
    found: set[int] = set()
    while waiting:
        handle = waiting.pop()
        if handle._index not in found and type(handle.task()).__name__ not in ("TensorWriterTask", "BuildTokenizer"):
            found.add(handle._index)
            waiting += handle.arguments().values()
    return found


def test_the_tensors_of_a_block_stay_together_and_those_of_others_do_not(models: list[Path], tmp_path: Path) -> None:
    _, _, components = planned(config_of("aligned", models), tmp_path / "out")
    (attention,) = [c for c in components if "model.layers.1.self_attn.q_proj.weight" in c.saves]
    assert {name.split(".")[4] for name in attention.saves} == {"q_proj", "k_proj", "v_proj", "o_proj"}
    assert len(attention.told) == 2  # the facts of two models' solves
    assert {name.split(".")[2] for name in attention.saves} == {"1"}
    assert attention.size == 3 * 4 * sum(x.numel() for n, x in load(models[0]).items() if n in attention.saves)
    assert share_of_largest(components) < 0.5


def test_a_residual_stream_connects_everything(models: list[Path], tmp_path: Path) -> None:
    _, graph, components = planned(config_of("residual", models), tmp_path / "out")
    assert len(components) == 1
    assert set(components[0].saves) == set(graph.saves)


def test_a_layer_that_is_read_twice_is_read_by_one_worker(models: list[Path], tmp_path: Path) -> None:
    _, _, components = planned(config_of("shared", models), tmp_path / "out")
    twice = [c for c in components if "model.layers.0.mlp.up_proj.weight" in c.saves]
    assert twice[0].saves == ("model.layers.0.mlp.up_proj.weight", "model.layers.2.mlp.up_proj.weight")


def _components(*sizes: int) -> list[Component]:
    return [Component((f"t{i}",), (), size) for i, size in enumerate(sizes)]


@pytest.mark.parametrize("seed", range(5))
def test_parts_are_about_as_large_as_each_other(seed: int) -> None:
    """Longest first is within 4/3 − 1/(3 m) of the best division (Graham 1969), which is found here by trying all."""
    sizes, m = [random.Random(seed * 100 + i).randrange(100) for i in range(7)], 3
    divisions = product(range(m), repeat=len(sizes))
    best = min(max(sum(s for s, at in zip(sizes, to, strict=True) if at == b) for b in range(m)) for to in divisions)
    parts = balanced(_components(*sizes), m)
    assert max(part.size for part in parts) <= (4 / 3 - 1 / (3 * m)) * best
    assert [part.number for part in parts] == [0, 1, 2]
    assert parts == balanced(_components(*sizes), m)


def test_no_part_is_empty_and_components_keep_their_order() -> None:
    assert [len(part.components) for part in balanced(_components(1, 1), 8)] == [1, 1]
    part = balanced(_components(0, 9, 0), 1)[0]
    assert [c.saves for c in part.components] == [("t0",), ("t1",), ("t2",)]
    assert sorted(len(p.components) for p in balanced(_components(0, 0, 0, 0), 2)) == [2, 2]


def test_the_largest_share_bounds_what_workers_can_save() -> None:
    assert share_of_largest(_components(1, 1, 2)) == 0.5
    assert share_of_largest(_components(0, 0)) == 1.0


# What a worker does, in this process


def done_in_parts(config: dict[str, Any], out: Path, most: int) -> list[Done]:
    job, _, components = planned(config, out)
    Path(job.scratch).mkdir(parents=True)
    return [run_part(job, part) for part in balanced(components, most)]


@pytest.mark.parametrize("shard", [10**9, 30_000])
def test_parts_that_are_joined_are_what_one_process_writes(shard: int, models: list[Path], tmp_path: Path) -> None:
    config = config_of("plain", models)
    one = merged(config, tmp_path / "one", out_shard_size=shard)
    with patch.object(sys.modules[__name__], "OPTIONS", OPTIONS.model_copy(update={"out_shard_size": shard})):
        done = done_in_parts(config, tmp_path / "out", 3)
        _, graph, _ = planned(config, tmp_path / "out")
    join(graph.writer, tmp_path / "out" / "scratch", done)
    state, expected = load(tmp_path / "out"), load(one)
    assert state.keys() == expected.keys()
    assert all(torch.equal(x, expected[name]) for name, x in state.items())
    index = yaml.safe_load((tmp_path / "out" / "model.safetensors.index.json").read_text("utf-8"))
    shards = sorted(path.name for path in (tmp_path / "out").glob("*.safetensors"))
    assert sorted(set(index["weight_map"].values())) == shards
    assert shards[0] == f"model-00001-of-{len(shards):05d}.safetensors"
    assert index["metadata"]["total_size"] == sum(x.nbytes for x in state.values())
    for name, file in index["weight_map"].items():
        assert name in load_file(tmp_path / "out" / file)


def test_one_part_is_one_file_without_an_index(models: list[Path], tmp_path: Path) -> None:
    config = config_of("plain", models)
    done = done_in_parts(config, tmp_path / "out", 1)
    join(planned(config, tmp_path / "out")[1].writer, tmp_path / "out" / "scratch", done)
    assert [path.name for path in (tmp_path / "out").iterdir() if path.is_file()] == ["model.safetensors"]


def test_joining_that_is_interrupted_takes_all_back(models: list[Path], tmp_path: Path) -> None:
    config = config_of("plain", models)
    done = done_in_parts(config, tmp_path / "out", 2)
    broken = [done[0], replace(done[1], folder="gone")]
    with pytest.raises(FileNotFoundError):
        join(planned(config, tmp_path / "out")[1].writer, tmp_path / "out" / "scratch", broken)
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["scratch"]


def test_a_part_that_is_done_again_writes_beside_the_first(models: list[Path], tmp_path: Path) -> None:
    job, _, components = planned(config_of("aligned", models), tmp_path / "out")
    Path(job.scratch).mkdir(parents=True)
    part = balanced(components, 2)[0]
    first, second = run_part(job, part), run_part(job, part)
    assert first.folder != second.folder
    assert first.weight_map == second.weight_map
    states = [load(Path(job.scratch, done.folder)) for done in (first, second)]
    assert all(torch.equal(x, states[1][name]) for name, x in states[0].items())


@pytest.mark.parametrize("lacks", ["model", "output folder"])
def test_a_node_that_does_not_see_a_path_is_named(lacks: str, models: list[Path], tmp_path: Path) -> None:
    job, _, components = planned(config_of("plain", models), tmp_path / "out")
    if lacks == "model":
        Path(job.scratch).mkdir(parents=True)
        job = replace(job, seen=(*job.seen, "/elsewhere/model"))
    path = "/elsewhere/model" if lacks == "model" else job.out
    with pytest.raises(WorkerError, match=f"node .+: it does not see the {lacks} {path}"):
        run_part(job, balanced(components, 1)[0])


def test_a_node_with_other_files_under_the_same_name_is_refused(models: list[Path], tmp_path: Path) -> None:
    copies = [tmp_path / path.name for path in models]
    for path, copy in zip(models, copies, strict=True):
        copy.mkdir()
        for file in path.iterdir():
            (copy / file.name).write_bytes(file.read_bytes())
    job, _, components = planned(config_of("plain", copies), tmp_path / "out")
    Path(job.scratch).mkdir(parents=True)
    state = load_file(copies[1] / "model.safetensors")
    save_file(state | {"model.another": torch.zeros(3)}, copies[1] / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(WorkerError, match="it plans another merge than the machine that started it"):
        run_part(job, balanced(components, 1)[0])


def test_random_draws_do_not_depend_on_how_parts_are_made(models: list[Path], tmp_path: Path) -> None:
    config = config_of("plain", models) | {"merge_method": "dare_linear"}
    config["models"] = [m | {"parameters": {"weight": 0.5, "density": 0.5}} for m in config["models"]]
    with patch.object(sys.modules[__name__], "OPTIONS", OPTIONS.model_copy(update={"random_seed": 7})):
        states = []
        for most in (1, 4):
            out = tmp_path / str(most)
            done = done_in_parts(config, out, most)
            states.append({k: x for one in done for k, x in load(out / "scratch" / one.folder).items()})
    assert all(torch.equal(x, states[1][name]) for name, x in states[0].items())
    seeds = [seed_of(component, 7) for component in _components(1, 1, 1)]
    assert all(a != b for a, b in pairwise(seeds))


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


def test_a_part_whose_workers_always_die_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    ray = pytest.importorskip("ray", reason=NO_RAY)

    def die(_: Any) -> None:
        raise ray.exceptions.WorkerCrashedError

    monkeypatch.setattr(ray, "get", die)
    with pytest.raises(WorkerError, match="a part of the merge failed 4 times because its worker died"):
        cluster._result(None)


# On a cluster of two nodes


@pytest.fixture(scope="module")
def nodes() -> Iterator[Any]:
    """Two nodes with a CPU each, on this machine."""
    ray = pytest.importorskip("ray", reason=NO_RAY)
    if sys.platform != "linux":
        pytest.skip("Ray runs clusters of several nodes on one machine on Linux only")
    from ray.cluster_utils import Cluster

    ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])
    started = Cluster(initialize_head=True, head_node_args={"num_cpus": 1})
    started.add_node(num_cpus=1)
    ray.init(address=started.address, log_to_driver=False)
    yield started
    ray.shutdown()
    started.shutdown()


@pytest.mark.parametrize("name", MERGES[:4])
@pytest.mark.usefixtures("nodes")
def test_two_nodes_merge_what_one_process_merges(name: str, models: list[Path], tmp_path: Path) -> None:
    config = config_of(name, models, tmp_path / "saved")
    one = merged(config, tmp_path / "one" / "out")
    saved = {path.name: path.read_bytes() for path in (tmp_path / "saved").glob("*")}
    two = merged_on_ray(config, tmp_path / "two" / "out")
    assert_same(one, two)
    assert {path.name: path.read_bytes() for path in (tmp_path / "saved").glob("*")} == saved
    assert len(saved) == (2 if name == "aligned" else 0)
    assert not [path for path in two.iterdir() if path.name.startswith(".")]


def waiting(node: str | None, marker: Path) -> Callable[[Job, Part], Done]:
    """Work that never ends on one node (on any, if None), once its shards are written."""

    def wait(*_: Any) -> Any:
        with written_whole(marker) as scratch:
            scratch.write_text(str(os.getpid()), "utf-8")
        time.sleep(600)

    def work(job: Job, part: Part) -> Done:
        import ray

        if node in (None, ray.get_runtime_context().get_node_id()):
            worker._shards = wait
        return run_part(job, part)

    return work


def when_there(marker: Path, act: Callable[[], object]) -> threading.Thread:
    """Do something as soon as a file is there."""

    def watch() -> None:
        while not marker.exists():
            time.sleep(0.05)
        act()

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    return thread


def test_a_node_that_dies_in_the_middle_changes_nothing(nodes: Any, models: list[Path], tmp_path: Path) -> None:
    config = config_of("aligned", models)
    victim = nodes.add_node(num_cpus=1)
    dies = when_there(tmp_path / "marker", lambda: nodes.remove_node(victim, allow_graceful=False))
    work = waiting(victim.node_id, tmp_path / "marker")
    out = merged_on_ray(config, tmp_path / "ray" / "out", work, workers=3)
    dies.join(60)
    assert (tmp_path / "marker").exists()
    assert_same(merged(config, tmp_path / "one" / "out"), out)
    assert not [path for path in out.iterdir() if path.name.startswith(".")]


@pytest.mark.usefixtures("nodes")
def test_an_interruption_leaves_nothing(models: list[Path], tmp_path: Path) -> None:
    when_there(tmp_path / "marker", _thread.interrupt_main)
    with pytest.raises(KeyboardInterrupt):
        merged_on_ray(config_of("plain", models), tmp_path / "out", waiting(None, tmp_path / "marker"))
    assert not (tmp_path / "out").exists()
    for _ in range(100):
        if not psutil.pid_exists(int((tmp_path / "marker").read_text("utf-8"))):
            return
        time.sleep(0.1)
    raise AssertionError("a worker still runs")


@pytest.mark.usefixtures("nodes")
def test_a_part_that_fails_is_one_line_and_leaves_nothing(models: list[Path], tmp_path: Path) -> None:
    state = load_file(models[1] / "model.safetensors")
    state[SPOILT][3, 5] = float("nan")
    spoilt = save(make_model("llama", 1), tmp_path / "spoilt")
    save_file(state, spoilt / "model.safetensors", metadata={"format": "pt"})
    config = config_of("aligned", [models[0], spoilt, models[2]])
    (tmp_path / "config.yml").write_text(yaml.safe_dump(config), "utf-8")
    with pytest.raises(ValueInTensorError, match=SPOILT):
        merged_on_ray(config, tmp_path / "python")
    arguments = ["yaml", str(tmp_path / "config.yml"), str(tmp_path / "out"), "--quiet", "--ray", "--workers", "2"]
    done = CliRunner().invoke(main, arguments)
    assert done.exit_code == 1, done.output
    assert done.output.strip().splitlines()[-1].startswith(f"Error: tensor {SPOILT} of model {spoilt}: it holds NaN")
    assert "Traceback" not in done.output
    assert not (tmp_path / "python").exists()
    assert not (tmp_path / "out").exists()


@pytest.mark.usefixtures("nodes")
def test_a_worker_that_fits_nowhere_is_refused(models: list[Path], tmp_path: Path) -> None:
    torch.set_num_threads(4)
    with pytest.raises(ConfigError, match="no node of the cluster has 4 CPUs for a worker"):
        merged_on_ray(config_of("plain", models), tmp_path / "out")
    assert not (tmp_path / "out").exists()
