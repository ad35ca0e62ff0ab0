"""A merge that is cut into parts, without Ray: how it is cut, and that its parts give the bits of one process."""

from __future__ import annotations

import random
from dataclasses import replace
from itertools import pairwise, product
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from conftest import load, merge_config
from merges_in_parts import MERGES, config_of, merged, models, one_thread, planned
from safetensors.torch import load_file, save_file

from mergekit_symalign.distributed import draws
from mergekit_symalign.distributed.job import Done
from mergekit_symalign.distributed.join import join
from mergekit_symalign.distributed.parts import Component, Graph, balanced, share_of_largest
from mergekit_symalign.distributed.worker import run_part, seed_of
from mergekit_symalign.errors import WorkerError

__all__ = ["models", "one_thread"]  # fixtures


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


def done_in_parts(config: dict[str, Any], out: Path, most: int, **options: Any) -> list[Done]:
    job, _, components = planned(config, out, **options)
    Path(job.scratch).mkdir(parents=True)
    return [run_part(job, part) for part in balanced(components, most)]


@pytest.mark.parametrize("shard", [10**9, 30_000])
def test_parts_that_are_joined_are_what_one_process_writes(shard: int, models: list[Path], tmp_path: Path) -> None:
    config = config_of("plain", models)
    one = merged(config, tmp_path / "one", out_shard_size=shard)
    done = done_in_parts(config, tmp_path / "out", 3, out_shard_size=shard)
    _, graph, _ = planned(config, tmp_path / "out", out_shard_size=shard)
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


def randomly(name: str, models: list[Path]) -> dict[str, Any]:
    """A merge that draws random numbers: for each model, for some layers, or for a vocabulary that is made first."""
    drawing: dict[str, Any] = {"weight": 0.5, "density": [0.5, 1.0, 0.7]}
    method = "dare_linear" if name == "tokenizer" else name
    drawing |= {"epsilon": 0.1} if "della" in name else {}
    entries = [{"model": m, "parameters": drawing} for m in models[1:]]
    more = {"tokenizer": {"source": "union"}} if name == "tokenizer" else {}
    return merge_config(method, models[0], entries, dtype="float32" if name == "tokenizer" else "bfloat16", **more)


def drawn(config: dict[str, Any], out: Path, most: int) -> tuple[dict[str, torch.Tensor], bool]:
    """What the parts of a merge save, and whether any of them drew other numbers than one process."""
    done = done_in_parts(config, out, most, random_seed=7)
    state = {k: x for one in done for k, x in load(out / "scratch" / one.folder).items()}
    return state, any(one.strayed for one in done)


@pytest.mark.parametrize("name", ["dare_linear", "della", "aligned_dare_linear", "tokenizer"])
def test_parts_draw_the_random_numbers_of_one_process(name: str, models: list[Path], tmp_path: Path) -> None:
    config = randomly(name, models)
    one = load(merged(config, tmp_path / "one", random_seed=7))
    for most in (1, 4):
        state, strayed = drawn(config, tmp_path / str(most), most)
        assert state.keys() == one.keys()
        assert all(torch.equal(x, one[name]) for name, x in state.items())
        assert not strayed
    other = load(merged(config, tmp_path / "other", random_seed=8))
    assert any(not torch.equal(x, one[name]) for name, x in other.items())


def test_draws_of_unknown_length_are_told_and_still_come_from_the_seed(
    models: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(draws, "_counts", lambda *_: [])
    states = [drawn(randomly("dare_linear", models), tmp_path / str(most), most) for most in (1, 4)]
    assert all(strayed for _, strayed in states)
    assert all(torch.equal(x, states[1][0][name]) for name, x in states[0][0].items())
    seeds = [seed_of(component, 7) for component in _components(1, 1, 1)]
    assert all(a != b for a, b in pairwise(seeds))
