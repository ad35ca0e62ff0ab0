"""A real trained model: SmolLM2-135M, its two adapters, and a planted twin of the target."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from conftest import State, load, merged

from mergekit_symalign.demo import evaluate
from mergekit_symalign.demo.data import arithmetic_problems
from mergekit_symalign.demo.run import adapted, write_twin

PROBLEMS = arithmetic_problems(60, seed=5)


@pytest.fixture(scope="module")
def models(smollm2: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    out = tmp_path_factory.mktemp("smollm2")
    adapters = {"target": "style", "skill": "arithmetic"}
    folders = {"anchor": smollm2} | {name: adapted(smollm2, adapter, out) for name, adapter in adapters.items()}
    return folders | {"twin": write_twin(folders["target"], out / "twin", seed=7)}


def _merge(models: dict[str, Path], method: str, target: str, out: Path) -> State:
    align = {"align": False} if method.startswith("aligned") else {}
    config = {
        "merge_method": method,
        "base_model": str(models["anchor"]),
        "models": [
            {"model": str(models[target]), "parameters": {"weight": 1.0}},
            {"model": str(models["skill"]), "parameters": {"weight": 1.0} | align},
        ],
        "dtype": "float32",
    }
    return merged(config, out, copy_tokenizer=True)


def test_twin_merges_like_the_original(models: dict[str, Path], tmp_path: Path) -> None:
    twin = _merge(models, "aligned_task_arithmetic", "twin", tmp_path / "twin")
    original = _merge(models, "aligned_task_arithmetic", "target", tmp_path / "original")
    assert twin.keys() == original.keys()
    for name, x in original.items():
        rounding = 4 * torch.finfo(torch.float32).eps * x.shape[-1] ** 0.5
        assert (twin[name] - x).abs().max() <= rounding * x.abs().max() * 4, name

    plain = _merge(models, "task_arithmetic", "twin", tmp_path / "plain")
    assert (
        plain["model.layers.0.mlp.up_proj.weight"] - original["model.layers.0.mlp.up_proj.weight"]
    ).abs().max() > 0.1
    skill = evaluate.exact_match(models["skill"], PROBLEMS)
    aligned, lost = (evaluate.exact_match(tmp_path / name, PROBLEMS) for name in ("twin", "plain"))
    assert skill > 0.5
    assert aligned > 0.5 * skill
    assert lost < 0.1 * skill


def test_permutations_are_recovered_exactly(models: dict[str, Path], tmp_path: Path) -> None:
    config = {
        "merge_method": "rotation_match",
        "base_model": str(models["anchor"]),
        "models": [{"model": str(models["twin"])}],
        "dtype": "float32",
    }
    out, target = merged(config, tmp_path), load(models["target"])
    neurons = [name for name in target if ".mlp." in name]
    assert len(neurons) == 3 * 30
    assert all(torch.equal(out[name], target[name]) for name in neurons)
