"""Merges with statistics through MergeKit: what RegMean gains, and that aligned forms give what the plain ones give."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import State, load, merge_config, merged
from models import ROUNDINGS, EverythingInFloat64, make_model, off_by, perturbed, save, with_weights
from transformers import PreTrainedModel
from whole_statistics import grams, inputs_of, measure

from mergekit_symalign.families.resolve import resolve
from mergekit_symalign.planting import Planted, random_elements, transform

FAMILIES = ["llama", "gpt2", "mixtral", "phi3", "bert-classifier", "qwen2"]
ONLY_ORDER = {"rotation": "none", "scaling": False}
EVERY_LAYOUT = ["gpt2", "mixtral"]  # fused and transposed tensors, biases, experts, tied embeddings
FINER = 64  # what the solves may magnify: statistics are stored in float32


@dataclass(frozen=True)
class Twins:
    """Two models, and the second one once more in other coordinates. Statistics are of each model's own inputs."""

    model: PreTrainedModel
    folder: Path
    inputs: dict[str, torch.Tensor]
    models: dict[str, PreTrainedModel]

    def path(self, name: str) -> Path:
        return self.folder / name

    def statistics(self, name: str, **how: Any) -> str:
        """The file of one model; measured when asked for."""
        out = self.folder / f"{name}-{'-'.join(map(str, how.values()))}.safetensors"
        if not out.exists():
            measure(self.models[name], self.path(name), out, inputs=self.inputs[name], **how)
        return str(out)

    def listed(self, *names: str, weight: float = 0.7, **how: Any) -> list[dict[str, Any]]:
        weights = [1.0, weight]
        return [
            {"model": self.path(n), "parameters": {"weight": w, "statistics": self.statistics(n, **how)}}
            for n, w in zip(names, weights, strict=True)
        ]


def _twins(family: str, folder: Path, planted: Planted) -> Twins:
    a = make_model(family, 0)
    layout = resolve(a.config, model="m")
    raw = save(perturbed(a, 0.1, 1), folder / "raw")
    settings = {} if planted.rotation else ONLY_ORDER
    state = merged(merge_config("rotation_match", save(a, folder / "a"), [raw], parameters=settings), folder / "out-b")
    b = with_weights(a, {k: x.double() for k, x in (a.state_dict() | state).items()})
    b.tie_weights()
    twin = with_weights(a, transform(b.state_dict(), layout, random_elements(layout, 10, planted)))
    twin.tie_weights()
    for name, model in (("b", b), ("twin", twin)):
        save(model, folder / name)
    models = {n: _as_saved(m, folder / n) for n, m in (("a", a), ("b", b), ("twin", twin))}
    one, other = (inputs_of(a, seed) for seed in (1, 2))
    return Twins(a, folder, {"a": one, "b": other, "twin": other}, models)


def _as_saved(model: PreTrainedModel, folder: Path) -> PreTrainedModel:
    """The model with the weights that were written, in float64."""
    state = {name: x.double() for name, x in type(model).from_pretrained(folder).state_dict().items()}
    return with_weights(model, state)


@pytest.fixture(scope="module")
def reordered(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Twins]:
    """By family; made once."""
    planted = Planted(rotation=False, scaling=False)
    return cache(lambda family: _twins(family, tmp_path_factory.mktemp(family), planted))


def _difference(got: State, wanted: State, plain: State) -> tuple[float, float]:
    assert got.keys() == wanted.keys()
    return off_by(got, wanted), off_by(plain, wanted)


CASES = [
    *((family, "regmean", {"gram": "full"}) for family in FAMILIES),
    *((family, "fisher", {"fisher": "empirical"}) for family in FAMILIES),
    *((family, "regmean", {"gram": "diagonal"}) for family in EVERY_LAYOUT),
    *((family, "fisher", {"fisher": "kronecker"}) for family in EVERY_LAYOUT),
]


@pytest.mark.parametrize(("family", "method", "how"), CASES)
def test_reordered_twins_merge_like_the_original(
    family: str, method: str, how: dict[str, str], reordered: Callable[[str], Twins], tmp_path: Path
) -> None:
    t = reordered(family)
    wanted = merged(merge_config(method, None, t.listed("a", "b", **how)), tmp_path / "wanted")
    got = merged(
        merge_config(f"aligned_{method}", t.path("a"), t.listed("a", "twin", **how), parameters=ONLY_ORDER),
        tmp_path / "got",
    )
    plain = merged(merge_config(method, None, t.listed("a", "twin", **how)), tmp_path / "plain")
    off, unaligned = _difference(_felt(got), _felt(wanted), _felt(plain))
    assert off < ROUNDINGS * FINER
    assert unaligned > 1000 * ROUNDINGS * FINER


def _felt(state: State) -> State:
    """Without the biases of BERT's keys: a softmax does not feel them, so their gradients are rounding."""
    return {name: x for name, x in state.items() if not name.endswith("attention.self.key.bias")}


@pytest.mark.parametrize(
    ("family", "method", "how"),
    [
        ("llama", "regmean", {"gram": "full"}),
        ("gpt2", "regmean", {"gram": "full"}),
        ("bert-classifier", "regmean", {"gram": "full"}),
        ("llama", "fisher", {"fisher": "kronecker"}),
    ],
)
def test_turned_twins_merge_like_the_original(
    family: str, method: str, how: dict[str, str], tmp_path_factory: pytest.TempPathFactory, tmp_path: Path
) -> None:
    """Gram matrices and Kronecker factors follow every symmetry, rotations and scales too."""
    t = _twins(family, tmp_path_factory.mktemp(family), Planted())
    wanted = merged(merge_config(method, None, t.listed("a", "b", **how)), tmp_path / "wanted")
    got = merged(merge_config(f"aligned_{method}", t.path("a"), t.listed("a", "twin", **how)), tmp_path / "got")
    plain = merged(merge_config(method, None, t.listed("a", "twin", **how)), tmp_path / "plain")
    off, unaligned = _difference(got, wanted, plain)
    assert off < ROUNDINGS * FINER
    assert unaligned > 100 * ROUNDINGS * FINER


@pytest.mark.parametrize("statistics", ["task_vectors", "files"])
def test_task_vectors_of_a_turned_twin(statistics: str, tmp_path: Path) -> None:
    t = _twins("llama", tmp_path, Planted())

    def listed(name: str) -> list[dict[str, Any]]:
        given = {"statistics": t.statistics(name, gram="full")} if statistics == "files" else {}
        return [{"model": t.path(name), "parameters": {"weight": 1.0, **given}}]

    wanted = merged(merge_config("regmean_task_arithmetic", t.path("a"), listed("b")), tmp_path / "wanted")
    got = merged(merge_config("aligned_regmean_task_arithmetic", t.path("a"), listed("twin")), tmp_path / "got")
    assert off_by(got, wanted) < ROUNDINGS * FINER
    plain = merged(merge_config("regmean_task_arithmetic", t.path("a"), listed("twin")), tmp_path / "plain")
    assert off_by(plain, wanted) > 1000 * ROUNDINGS * FINER


@torch.no_grad()
def _output(model: PreTrainedModel, inputs: torch.Tensor) -> torch.Tensor:
    with EverythingInFloat64():
        return model(inputs)[0]  # type: ignore[no-any-return]


@pytest.mark.parametrize("changed", ["model.layers.2.mlp.down_proj.weight", "lm_head.weight"])
def test_regmean_is_nearer_to_both_models_than_any_fixed_weight(changed: str, tmp_path: Path) -> None:
    """Two models that differ in one linear layer, on the inputs that each was measured on."""
    a = make_model("llama", 0)
    other = perturbed(a, 1.0, 1).state_dict()
    b = with_weights(a, {name: other[name] if name == changed else x for name, x in a.state_dict().items()})
    paths = {name: save(model, tmp_path / name) for name, model in (("a", a), ("b", b))}
    models = {name: _as_saved(model, paths[name]) for name, model in (("a", a), ("b", b))}
    inputs = {"a": inputs_of(a, 1, 4), "b": inputs_of(a, 2, 4)}
    files = {n: measure(models[n], paths[n], tmp_path / f"{n}.safetensors", inputs=inputs[n]) for n in "ab"}
    listed = [{"model": paths[n], "parameters": {"statistics": str(files[n])}} for n in "ab"]
    out = merged(merge_config("regmean", None, listed, parameters={"off_diagonal": 1.0}), tmp_path / "out")

    seen = {name: grams(model, inputs[name])[0][changed]["gram"] for name, model in models.items()}

    def error(weight: torch.Tensor) -> float:
        """Of the changed layer's outputs, on both models' inputs."""
        total = 0.0
        for name, model in models.items():
            gram = seen[name]
            off = weight.double() - model.state_dict()[changed]
            total += float((off @ gram * off).sum())
        return total

    one, two = (models[n].state_dict()[changed] for n in "ab")
    fixed = min(error((1 - s) * one + s * two) for s in torch.linspace(-1, 2, 301).tolist())
    assert error(out[changed]) < 0.9 * fixed
    untouched = {name: x for name, x in out.items() if name != changed}
    assert off_by(untouched, {name: load(paths["a"])[name] for name in untouched}) < 4 * ROUNDINGS * FINER


def test_a_merge_of_one_model_is_that_model(tmp_path: Path) -> None:
    a = make_model("llama", 0)
    path = save(a, tmp_path / "a")
    file = measure(a, path, tmp_path / "a.safetensors")
    listed = [{"model": path, "parameters": {"statistics": str(file)}}]
    assert off_by(merged(merge_config("regmean", None, listed), tmp_path / "out"), load(path)) < ROUNDINGS


def test_the_report_says_which_statistics(tmp_path: Path) -> None:
    t = _twins("llama", tmp_path, Planted(rotation=False, scaling=False))
    merged(merge_config("regmean", None, t.listed("a", "b", gram="full")), tmp_path / "out", write_model_card=True)
    report = json.loads((tmp_path / "out" / "symalign_report.json").read_text("utf-8"))
    assert report["method"] == "regmean"
    assert report["anchor"] == []
    told = report["data"]["statistics"][str(t.path("a"))]
    assert (told["file"], told["tokens"], told["gram"]) == ("a-full.safetensors", 120, "full")
    assert report["data"]["papers"][0]["url"] == "https://arxiv.org/abs/2212.09849"
    card = (tmp_path / "out" / "README.md").read_text("utf-8")
    assert "https://arxiv.org/abs/2212.09849" in card
    assert "a-full.safetensors" in card
    assert "120 tokens" in card
    assert t.statistics("a", gram="full") not in card
