"""Optimal transport fusion holds one layer of each model: nothing is read before the layer in front of it is merged."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import merge_config
from mergekit.architecture import get_architecture_info
from mergekit.config import MergeConfiguration
from mergekit.graph import Executor, Task
from mergekit.io.tasks import LoaderCache
from mergekit.options import MergeOptions
from mergekit.plan import MergePlanner
from models import make_model, save, word_tokenizer

from mergekit_symalign.graph.load import LoadFinite
from mergekit_symalign.graph.transport import TransportLayer
from mergekit_symalign.graph.transport_run import RunOutputs

LAYERS = 12  # by name, layer 10 would come before layer 2


def _schedule(config: dict[str, Any], out: Path) -> list[Task]:
    merge, options = MergeConfiguration.model_validate(config), MergeOptions()
    LoaderCache().setup(options)
    assert merge.base_model is not None
    planner = MergePlanner(merge, get_architecture_info(merge, options), options, merge.base_model.config())
    return [handle.task() for handle in Executor(planner.plan_to_disk(str(out))).schedule.tasks]


def _loads(task: Task) -> set[Task]:
    """The loads that a task needs, without those of the steps before it."""
    found = {needed for needed in task.arguments().values() if isinstance(needed, LoadFinite)}
    for name, needed in task.arguments().items():
        if name.startswith("tensor"):
            found |= _loads(needed)
    return found


@pytest.mark.parametrize("cost", ["weights", "activations"])
@pytest.mark.parametrize("family", ["llama", "modernbert"])  # MergeKit has a file for one of them, and infers the other
def test_layers_are_read_one_after_another(family: str, cost: str, tmp_path: Path) -> None:
    paths = []
    for seed in (0, 1):
        model = make_model(family, seed, num_hidden_layers=LAYERS, hidden_size=24, intermediate_size=16)
        paths.append(save(model, tmp_path / str(seed)))
        word_tokenizer(97).save_pretrained(paths[-1])
    (tmp_path / "prompts.txt").write_text("w5 w6 w7\n", "utf-8")
    parameters = {"cost": cost, "calibration": str(tmp_path / "prompts.txt")} if cost == "activations" else {}
    tasks = _schedule(merge_config("ot_fusion", paths[0], paths, parameters=parameters), tmp_path / "out")
    at = {task: i for i, task in enumerate(tasks)}
    steps = sorted((task for task in tasks if isinstance(task, TransportLayer)), key=lambda task: task.step)
    assert len(steps) == LAYERS
    assert sum(isinstance(task, RunOutputs) for task in tasks) == (LAYERS if cost == "activations" else 0)
    for before, step in pairwise(steps):
        loads = _loads(step)
        assert loads
        assert min(at[load] for load in loads) > at[before], step.title
    loaded = [(task.model, task.tensor) for task in tasks if isinstance(task, LoadFinite)]
    assert len(loaded) == len(set(loaded))


def test_steps_are_told_apart_by_number_and_merge(tmp_path: Path) -> None:
    paths = [save(make_model("llama", seed), tmp_path / str(seed)) for seed in (0, 1)]
    schedules = [
        _schedule(merge_config("ot_fusion", paths[0], paths, dtype=d), tmp_path) for d in ("float32", "bfloat16")
    ]
    first, second = ([task for task in tasks if isinstance(task, TransportLayer)] for tasks in schedules)
    assert len({*first, *second}) == 6
    assert {hash(step) for step in first} != {hash(step) for step in second}
    assert torch.bfloat16 is getattr(torch, second[0].dtypes[0] or "")
