"""Merges with statistics on a device that has no memory.

Run by tests/test_data_configs.py in a process of its own, as tests/fake_gpu.py is by tests/test_devices.py.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import merge_config
from mergekit.architecture import get_architecture_info
from mergekit.common import ModelReference
from mergekit.config import MergeConfiguration
from mergekit.graph import TaskUniverse
from mergekit.io.tasks import LoaderCache
from mergekit.options import MergeOptions
from mergekit.plan import MergePlanner
from models import make_model, perturbed, save
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend
from whole_statistics import measure

from mergekit_symalign.fusion import kronecker, regmean
from mergekit_symalign.fusion.outcome import Merged, Route
from mergekit_symalign.graph import fisher_tasks
from mergekit_symalign.graph.fisher_tasks import MergeFisher
from mergekit_symalign.graph.fusion_tasks import MergeLinear
from mergekit_symalign.graph.statistics import Lookup

_setup_privateuseone_for_python_backend("fakegpu")
GPU = torch.device("fakegpu:0")


class FakeGpuMode(FakeTensorMode):
    """Nothing is ever made on the device, nor moved there because its numbers are known."""

    avoid_device_init = True

    def may_turn_const(self, t: torch.Tensor) -> bool:
        return False


@pytest.mark.parametrize(
    ("method", "how"),
    [
        ("regmean", {"gram": "full"}),
        ("fisher", {"fisher": "empirical"}),
        ("fisher", {"fisher": "kronecker"}),
    ],
)
def test_merges_stay_on_a_fake_gpu(
    method: str, how: dict[str, str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Statistics come from the CPU. Any other tensor made there would raise: FakeTensorMode mixes no devices."""
    a = make_model("qwen2", 0, num_hidden_layers=1)
    models = {"a": a, "b": perturbed(a, 0.1, 1), "c": perturbed(a, 0.1, 2)}
    listed = []
    for name, model in models.items():
        path = save(model, tmp_path / name)
        file = measure(model, path, tmp_path / f"{name}.safetensors", **how)  # type: ignore[arg-type]
        listed.append({"model": path, "parameters": {"statistics": str(file)}})
    config = MergeConfiguration.model_validate(merge_config(method, None, listed[1:]))
    LoaderCache().setup(MergeOptions())
    planner = MergePlanner(config, get_architecture_info(config, MergeOptions()), MergeOptions(), a.config)
    tasks = list(TaskUniverse(planner.plan_to_disk(str(tmp_path / "out"))).tasks)
    merges = [t for t in tasks if isinstance(t, (MergeLinear, MergeFisher))]
    assert len(merges) >= 7
    lookups = [part.lookup for task in merges for part in task.parts if part.lookup is not None]
    shapes = {(x.name, kind): x.file.shape(x.name, kind) for x in lookups for kind in x.file.kinds(x.name)}
    monkeypatch.setattr(Lookup, "read", lambda self, kind: torch.empty(shapes[self.name, kind]))
    # What asks the device for numbers.
    monkeypatch.setattr(regmean, "_solved", lambda right, total, _: (right @ total, Route.exact))
    monkeypatch.setattr(kronecker, "_whitening", lambda total: total)
    monkeypatch.setattr(kronecker, "_of_two", lambda a, b, right, _: (b[0] @ right @ a[0], Route.exact))
    monkeypatch.setattr(fisher_tasks, "fisher_mean", _fisher_mean)
    monkeypatch.setattr(fisher_tasks, "float", lambda _: 1.0, raising=False)
    monkeypatch.setattr(fisher_tasks, "mean_of_factors", lambda _: (1.0, 1))
    state = a.state_dict()
    names = [ModelReference.parse(str(tmp_path / name)) for name in models]
    with FakeGpuMode():
        for task in merges:
            assert task.uses_accelerator()
            given: dict[str, Any] = {"weights": {m: torch.empty(state[task.name].shape, device=GPU) for m in names}}
            if isinstance(task, MergeFisher):
                given["fishers"] = task.fishers.execute()
            elif task.biases is not None:
                shape = state[task.name.removesuffix("weight") + "bias"].shape
                given["biases"] = {m: torch.empty(shape, device=GPU) for m in names}
            found = task.execute(**given)
            del found["facts"]
            assert found
            assert all(x.device == GPU for x in found.values())


def _fisher_mean(weights: Any, shares: Any, fishers: Any, *, floor: float) -> Merged:
    del floor
    return Merged(sum(w * f for w, f in zip(weights, fishers, strict=True)) / sum(shares), Route.exact)
