"""Merges that are cut into parts: configurations, plans, and what they are compared with."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from conftest import load, merge_config
from mergekit.config import MergeConfiguration
from mergekit.merge import run_merge
from mergekit.options import MergeOptions
from models import make_model, save, word_tokenizer

from mergekit_symalign.distributed.draws import state_of
from mergekit_symalign.distributed.job import Job, digest_of, local_paths
from mergekit_symalign.distributed.parts import Component, Graph
from mergekit_symalign.distributed.planning import targets
from mergekit_symalign.distributed.sizes import LoadSizes

OPTIONS = MergeOptions(quiet=True, random_seed=None)
NO_RAY = "Ray is not installed: pip install 'mergekit-symalign[ray]'"
MERGES = ("plain", "aligned", "slices", "tokenizer", "drawing", "shared")


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
    if name == "drawing":
        drawn = [entry | {"parameters": {"weight": 0.5, "density": 0.6}} for entry in weighed]
        return merge_config("dare_ties", models[0], drawn)
    if name == "residual":
        return merge_config("aligned_linear", models[0], weighed, parameters={"residual": "permutation"})
    return merge_config("task_arithmetic", models[0], weighed)


def job_of(config: dict[str, Any], out: Path, **options: Any) -> Job:
    asked = OPTIONS.model_copy(update=options)
    return Job(yaml.safe_dump(config), asked, str(out), str(out / "scratch"), str(Path.cwd()), 1, (), "")


def planned(config: dict[str, Any], out: Path, **options: Any) -> tuple[Job, Graph, tuple[Component, ...]]:
    """A job as the driver makes it, and its cut."""
    job = job_of(config, out, **options)
    graph, random = Graph(targets(job)), state_of(job.options.random_seed)
    components = graph.components(LoadSizes())
    tokenizer = None if graph.tokenizer is None else graph.tokenizer.task().execute()
    facts = {"digest": digest_of(graph, components), "seen": local_paths(graph), "random": random}
    return replace(job, tokenizer=tokenizer, **facts), graph, components


def merged(config: dict[str, Any], out: Path, **options: Any) -> Path:
    run_merge(MergeConfiguration.model_validate(config), str(out), MergeOptions(quiet=True, **options))
    return out


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
