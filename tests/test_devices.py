"""Device handling without a GPU: fake CUDA tensors through every task, and the plan of a two-GPU merge."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import OFFLINE, merge_config
from mergekit.architecture import get_architecture_info
from mergekit.common import ModelReference
from mergekit.config import MergeConfiguration
from mergekit.graph import Task, TaskUniverse
from mergekit.io.tasks import LoaderCache
from mergekit.multigpu_executor import MultiGPUExecutor
from mergekit.options import MergeOptions
from mergekit.plan import MergePlanner
from models import make_model, save
from processes import run_command
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_leaves

import mergekit_symalign
from mergekit_symalign.families.resolve import resolve
from mergekit_symalign.graph.apply import ApplyBlock
from mergekit_symalign.graph.load import LoadFinite
from mergekit_symalign.graph.solve import OneOf, SolveTogether
from mergekit_symalign.symmetry import blocks, devices
from mergekit_symalign.symmetry import solve as kernel
from mergekit_symalign.symmetry.heads.match import MatchedHeads
from mergekit_symalign.symmetry.heads.order import HeadOrder
from mergekit_symalign.symmetry.neurons import experts
from mergekit_symalign.symmetry.neurons import match as assignment
from mergekit_symalign.symmetry.neurons.costs import NeuronCosts, NeuronPairs
from mergekit_symalign.symmetry.neurons.match import Assignment
from mergekit_symalign.symmetry.options import HeadShape, NeuronScale

CUDA = torch.device("cuda:0")
SETTINGS: list[dict[str, Any]] = [
    {},
    {"scaling": False},
    {"rotation": "none"},
    {"rotation": "full"},
    {"neuron_scaling": True},
    {"permutation": False, "neuron_scaling": True},
]


def _plan(config: dict[str, Any], out: str, **options: Any) -> list[Task]:
    """MergeKit's plan of a merge, with our hook."""
    merge, settings = MergeConfiguration.model_validate(config), MergeOptions(**options)
    LoaderCache().setup(settings)
    arch = get_architecture_info(merge, settings)
    assert merge.base_model is not None
    planner = MergePlanner(merge, arch, settings, merge.base_model.config())
    return planner.plan_to_disk(out)


def _tasks(targets: list[Task]) -> Iterator[Task]:
    yield from TaskUniverse(targets).tasks


@pytest.fixture(scope="module", params=["llama", "qwen2", "qwen3"])
def paths(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp(request.param)
    return [save(make_model(request.param, i, num_hidden_layers=1), folder / str(i)) for i in range(3)]


OTHERS = [
    "gemma3",
    "phi4-mini",
    "olmo2",
    "smollm3",
    "starcoder2",
    "cohere2",
    "glm4",
    "cohere-qk-norm",
    "gpt-neox",
    "mixtral",
]
MIXED = ("gemma3", "smollm3", "cohere2")  # their layers are of several kinds


@pytest.mark.parametrize("family", OTHERS)
def test_other_layouts_stay_on_fake_cuda(family: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    layers = {} if family in MIXED else {"num_hidden_layers": 1}
    paths = [save(make_model(family, i, **layers), tmp_path / str(i)) for i in range(3)]
    test_solve_and_apply_stay_on_fake_cuda(paths, {}, True, monkeypatch, tmp_path)


@pytest.mark.parametrize("setting", SETTINGS, ids=str)
@pytest.mark.parametrize("found", [True, False])
def test_solve_and_apply_stay_on_fake_cuda(
    paths: list[Path], setting: dict[str, Any], found: bool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Any tensor made on the CPU on the way would raise: FakeTensorMode refuses to mix devices."""
    if "qwen3" in str(paths[0]) and setting.get("rotation") == "full":
        setting = {}  # refused with QK-norm
    config = merge_config("rotation_match", paths[0], paths[1:], parameters=setting)
    tasks = list(_tasks(_plan(config, str(tmp_path))))
    # The assignment runs on the CPU, and whether an element is the identity is asked of the device: not here.
    monkeypatch.setattr(assignment, "best_permutation", _reversed_neurons)
    order = lambda problem: MatchedHeads(_reversed_heads(problem.source.shape) if found else None, None)  # noqa: E731
    monkeypatch.setattr(blocks, "match_heads", order)
    monkeypatch.setattr(experts, "match_experts", lambda problem, _: list(range(problem.experts))[::-1])
    monkeypatch.setattr(devices, "are_all", lambda _: True)  # asked of the device
    identities = (lambda element: element) if found else (lambda element: type(element)({}))
    for name in ("heads_distance", "neurons_distance"):
        monkeypatch.setattr(blocks, name, lambda *_: 0.0)  # plain numbers: asked of the device
    monkeypatch.setattr(kernel, "finished", lambda solved, *_: replace(solved, element=identities(solved.element)))
    with FakeTensorMode():
        values: dict[Task, Any] = {
            t: torch.empty(_shape(t), device=CUDA, dtype=torch.bfloat16) for t in tasks if isinstance(t, LoadFinite)
        }
        for kind in (SolveTogether, OneOf, ApplyBlock):
            for task in (t for t in tasks if isinstance(t, kind)):
                assert task.uses_accelerator() is (kind is not OneOf)
                values[task] = task.execute(**{k: values[v] for k, v in task.arguments().items()})
                for one in values[task].values() if kind is SolveTogether else ():
                    assert all(isinstance(x, (int, float, str)) for x in one.pop("facts").values())
                leaves = tree_leaves(values[task])
                assert all(isinstance(x, torch.Tensor) and x.device == CUDA for x in leaves)
                assert leaves or not found
    applied = [t for t in tasks if isinstance(t, ApplyBlock)]
    assert len(applied) == 2 * len({t.load.tensor for t in applied})


def _reversed_neurons(pairs: NeuronPairs, *, scale: NeuronScale) -> Assignment:
    scores = NeuronCosts(pairs, scale).scores()
    return Assignment(torch.arange(len(scores), device=scores.device).flip(0), {"neurons_full": len(scores)}, 0.0)


def _reversed_heads(shape: HeadShape) -> HeadOrder:
    kv, query = (torch.arange(n, device=CUDA).flip(0) for n in (shape.kv_heads, shape.query_heads))
    return HeadOrder(kv, query)


def _shape(load: LoadFinite) -> tuple[int, ...]:
    layout = resolve(load.model.config(), model="m")
    claim = layout.claim(load.tensor)
    assert claim is not None
    return tuple(n or 97 for n in layout.shape(claim.spec))


@pytest.mark.skipif(
    not hasattr(torch.utils.backend_registration, "_setup_privateuseone_for_python_backend"),
    reason="this torch cannot pretend to have a GPU",
)
def test_the_run_on_prompts_stays_on_a_fake_gpu() -> None:
    script = Path(__file__).with_name("fake_gpu.py")
    done = run_command("pytest", "-q", "-p", "no:cacheprovider", script, cwd=script.parent, env=OFFLINE)
    assert done.returncode == 0, done.stdout
    assert "4 passed" in done.stdout


def test_fake_cuda_would_catch_a_mixed_device() -> None:
    with FakeTensorMode():
        x = torch.empty(4, 4, device=CUDA)
        with pytest.raises(RuntimeError, match="device"):
            x @ torch.eye(4)


def test_only_the_assignment_moves_to_the_cpu() -> None:
    package = Path(mergekit_symalign.__file__).parent
    loops = package / "symmetry" / "compiled.py"  # of the CPU, where nothing moves
    moves = 0
    for file in (*(package / "symmetry").rglob("*.py"), *(package / "graph").rglob("*.py")):
        calls = [
            n.func.attr
            for n in ast.walk(ast.parse(file.read_text("utf-8")))
            if isinstance(n, ast.Call) and isinstance(n.func, ast.Attribute)
        ]
        count = calls.count("cpu") + calls.count("numpy")
        assert count == 0 or file in (loops, package / "symmetry" / "assignment" / "linear.py"), file
        moves += count if file != loops else 0
    assert moves > 0


def test_two_gpus_share_the_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from mergekit import multigpu_executor

    paths = [save(make_model("llama", i, num_hidden_layers=6), tmp_path / str(i)) for i in range(3)]
    monkeypatch.setattr(multigpu_executor, "get_torch_accelerator_type", lambda: "cuda")
    config = merge_config("aligned_task_arithmetic", paths[0], paths[1:], parameters={"weight": 1.0})
    executor = MultiGPUExecutor(_plan(config, str(tmp_path / "out")), num_gpus=2)
    counts = [len(tasks) for tasks in executor.gpu_assignments.values()]
    solved = [sum(isinstance(t.task(), SolveTogether) for t in tasks) for tasks in executor.gpu_assignments.values()]
    assert len(counts) == 2
    assert max(counts) <= 0.6 * sum(counts)
    assert max(solved) <= 0.6 * sum(solved)
    assert sum(solved) == 2 * 6  # attention and MLP, six layers; two models each


def test_every_tensor_is_loaded_once(paths: list[Path], tmp_path: Path) -> None:
    config = merge_config("aligned_task_arithmetic", paths[0], paths[1:], parameters={"weight": 1.0})
    loads = [(t.model, t.tensor) for t in _tasks(_plan(config, str(tmp_path))) if hasattr(t, "tied_names")]
    assert len(loads) == len(set(loads))
    assert {model for model, _ in loads} == {ModelReference.parse(str(p)) for p in paths}


def test_at_most_one_layer_of_each_model_is_held(tmp_path: Path) -> None:
    """Replay the executor's schedule and count the layers whose tensors are alive at any step."""
    from mergekit.graph import Executor

    models = [save(make_model("llama", i, num_hidden_layers=12), tmp_path / str(i)) for i in range(2)]
    config = merge_config("aligned_task_arithmetic", models[0], models[1:], parameters={"weight": 1.0})
    executor = Executor(_plan(config, str(tmp_path / "out")))
    last_use, alive = executor.schedule.last_use_index, {}
    for step, handle in enumerate(executor.schedule.tasks):
        task = handle.task()
        if isinstance(task, (LoadFinite, ApplyBlock)):
            name = task.tensor if isinstance(task, LoadFinite) else task.load.tensor
            alive[handle] = name.split(".")[2] if ".layers." in name else None
        layers = {layer for layer in alive.values() if layer is not None}
        assert len(layers) <= 1, (step, layers)
        alive = {h: layer for h, layer in alive.items() if last_use[h] > step}
