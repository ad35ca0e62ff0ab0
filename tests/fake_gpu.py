"""The run on prompts on a device that has no memory: embedding, layers and solves.

Run by tests/test_devices.py in a process of its own: torch knows of the device until the process ends, and takes it for
a GPU that can be used.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import merge_config
from mergekit.architecture import get_architecture_info
from mergekit.config import MergeConfiguration
from mergekit.graph import Executor
from mergekit.io.tasks import LoaderCache
from mergekit.options import MergeOptions
from mergekit.plan import MergePlanner
from models import make_model, save, word_tokenizer
from test_activations import prompts
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_leaves
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend
from transformers import PreTrainedTokenizerFast

from mergekit_symalign.activations.runner import LayerRunner
from mergekit_symalign.families.resolve import resolve
from mergekit_symalign.graph import activations, readers
from mergekit_symalign.graph.activations import EmbedPrompts, Part, RunLayer, SolveActivations
from mergekit_symalign.graph.load import LoadFinite
from mergekit_symalign.symmetry import solve as kernel
from mergekit_symalign.symmetry.by_activations import attention, neurons, orders
from mergekit_symalign.symmetry.by_activations import experts as expert_covariance
from mergekit_symalign.symmetry.heads.match import MatchedHeads

# Not CUDA: transformers indexes with None, which fake CUDA cannot in a CPU build of torch.
_setup_privateuseone_for_python_backend("fakegpu")
GPU = torch.device("fakegpu:0")


class FakeGpuMode(FakeTensorMode):
    """Nothing is ever made on the device, which has no memory; nor moved there because its numbers are known."""

    avoid_device_init = True

    def may_turn_const(self, t: torch.Tensor) -> bool:
        return False


FAMILIES = ["llama", "gemma3", "deberta-v3", "mixtral"]


@pytest.mark.parametrize("family", FAMILIES)
def test_the_run_on_prompts_stays_on_a_fake_gpu(family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Embedding, layers and solves. Any tensor made on the CPU would raise: FakeTensorMode refuses to mix devices."""
    paths = [save(make_model(family, i, num_hidden_layers=1), tmp_path / str(i)) for i in range(2)]
    for path in paths:
        word_tokenizer(97).save_pretrained(path)
    monkeypatch.setattr(readers, "AutoTokenizer", PreTrainedTokenizerFast)
    file = prompts(tmp_path / "p.jsonl", tokens=60)
    scales = family not in ("gpt2", "deberta-v3")
    settings = {"objective": "activations", "calibration": str(file), "neuron_scaling": scales}
    config = merge_config("rotation_match", paths[0], paths[1:], parameters=settings)
    merge, options = MergeConfiguration.model_validate(config), MergeOptions()
    LoaderCache().setup(options)
    planner = MergePlanner(merge, get_architecture_info(merge, options), options, merge.base_model.config())
    schedule = Executor(planner.plan_to_disk(str(tmp_path / "out"))).schedule
    tasks = [handle.task() for handle in schedule.tasks]
    # The assignment runs on the CPU, and some questions are asked of the device: not here.
    flipped = lambda score: torch.arange(score.shape[0], device=score.device).flip(0)  # noqa: E731
    monkeypatch.setattr(neurons, "best_assignment", flipped)
    monkeypatch.setattr(attention, "match_heads", lambda problem: MatchedHeads(None, None))
    for module in (attention, orders):
        monkeypatch.setattr(module, "most_likely", _first)
    monkeypatch.setattr(expert_covariance, "_match_experts", lambda *_: [3, 2, 1, 0])
    monkeypatch.setattr(expert_covariance, "_tokens_of", lambda routing, i, j: torch.arange(20, device=GPU))
    monkeypatch.setattr(kernel, "finished", lambda solved, *_: solved)  # identities and plain numbers are asked for
    layout = resolve(make_model(family, 0).config, model="m")
    monkeypatch.setattr(activations, "runner_of", cache(_fake_runner))
    done: dict[Any, Any] = {}
    with FakeGpuMode():
        for task in tasks:
            if isinstance(task, LoadFinite):
                claim = layout.claim(task.tensor)
                if claim is None:  # pieces of experts
                    continue
                shape = [n or 97 for n in layout.shape(claim.spec)]
                done[task] = torch.empty(shape, device=GPU)
            elif isinstance(task, (EmbedPrompts, RunLayer, Part, SolveActivations)):
                assert task.uses_accelerator() or isinstance(task, Part)
                done[task] = task.execute(**{name: done[needed] for name, needed in task.arguments().items()})
                tensors = [x for x in tree_leaves(done[task]) if isinstance(x, torch.Tensor)]
                assert tensors
                assert all(x.device == GPU for x in tensors)
    for kind, count in ((EmbedPrompts, 1), (RunLayer, 1), (SolveActivations, 2)):
        assert sum(isinstance(task, kind) for task in done) == count


def _first(solved: Any, agreement: Any, of: tuple[str, ...]) -> tuple[Any, Any]:
    """One round: how well the models agree is asked of the device."""
    shares = dict.fromkeys(of, 0.5)
    return solved(shares), shares


def _fake_runner(model: Any, digest: str, trust_remote_code: bool) -> LayerRunner:
    """Built where all tensors are fake. Its experts run at once: which of them are reached is asked of the device."""
    runner = LayerRunner(model.config(), resolve(model.config(), model="m"))
    if runner.layout.geometry.experts > 1:
        runner.model.set_experts_implementation("batched_mm")
    return runner
