"""Merges with statistics inside MergeKit: slices, gradients, vocabularies, memory, devices, the command."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import OFFLINE, State, load, merge_config, merged
from mergekit.architecture import get_architecture_info
from mergekit.config import MergeConfiguration
from mergekit.graph import Executor, Task, TaskUniverse
from mergekit.io.tasks import LoaderCache
from mergekit.options import MergeOptions
from mergekit.plan import MergePlanner
from models import ROUNDINGS, make_model, off_by, perturbed, save, with_weights, word_tokenizer
from processes import run_command
from transformers import PreTrainedModel, PreTrainedTokenizerFast
from whole_statistics import fishers, grams, inputs_of, measure

from mergekit_symalign.graph import fisher_tasks, fusion_tasks
from mergekit_symalign.graph.fusion_tasks import MergeLinear

FINER = 64
Models = dict[str, PreTrainedModel]


@pytest.fixture(scope="module")
def models() -> Models:
    a = make_model("llama", 0)
    return {"a": a, "b": perturbed(a, 0.1, 1), "c": perturbed(a, 0.1, 2)}


@pytest.fixture(scope="module")
def folder(models: Models, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every model, its Gram matrices (a.safetensors) and its Fisher information (a-fisher.safetensors)."""
    out = tmp_path_factory.mktemp("models")
    for seed, (name, model) in enumerate(models.items()):
        path = save(model, out / name)
        measure(model, path, out / f"{name}.safetensors", seed=seed)
        measure(model, path, out / f"{name}-fisher.safetensors", seed=seed, fisher="empirical")
    return out


def _listed(folder: Path, *names: str, kind: str = "", **parameters: Any) -> list[dict[str, Any]]:
    return [
        {
            "model": folder / name,
            "parameters": {"statistics": str(folder / f"{name}{kind}.safetensors"), **parameters},
        }
        for name in names
    ]


def _layer(weights: list[torch.Tensor], squares: list[torch.Tensor], shares: list[float]) -> torch.Tensor:
    """RegMean as it was published, with 0.9 beside the diagonals."""
    squares = [0.9 * g + 0.1 * torch.diag(g.diag()) for g in squares]
    total = sum(s * g for s, g in zip(shares, squares, strict=True))
    right = sum(s * w @ g for s, w, g in zip(shares, weights, squares, strict=True))
    return right @ torch.linalg.inv(total)  # type: ignore[no-any-return, arg-type]


def _wanted(models: Models, names: dict[str, str], shares: list[float]) -> torch.Tensor:
    """One layer of several models, each from its own tensor."""
    seeds = {name: i for i, name in enumerate(models)}
    squares = [grams(models[m], inputs_of(models[m], seeds[m]))[0][tensor]["gram"] for m, tensor in names.items()]
    return _layer([models[m].state_dict()[tensor].double() for m, tensor in names.items()], squares, shares)


PROJECTIONS = ["self_attn.q_proj", "self_attn.o_proj", "mlp.down_proj"]


def test_slices_use_the_statistics_of_the_layers_they_take(models: Models, folder: Path, tmp_path: Path) -> None:
    a, b = _listed(folder, "a", "b", weight=0.5)
    sources = [a | {"layer_range": [0, 2]}, b | {"layer_range": [1, 3]}]
    config: dict[str, Any] = {"merge_method": "regmean", "dtype": "float32", "slices": [{"sources": sources}]}
    for source in sources:
        source["model"] = str(source["model"])
    out = merged(config, tmp_path / "out")
    for part in PROJECTIONS:
        for layer in (0, 1):
            names = {"a": f"model.layers.{layer}.{part}.weight", "b": f"model.layers.{layer + 1}.{part}.weight"}
            wanted = _wanted(models, names, [0.5, 0.5])
            assert off_by({"x": out[names["a"]]}, {"x": wanted}) < ROUNDINGS * FINER


def test_weights_by_filter_and_gradient(models: Models, folder: Path, tmp_path: Path) -> None:
    """The weight of b grows over the layers in MLPs, and is 3 elsewhere; the head has b's and a's own statistics."""
    a, b = _listed(folder, "a", "b")
    b["parameters"]["weight"] = [{"filter": "mlp", "value": [1.0, 2.0]}, {"value": 3.0}]
    out = merged(merge_config("regmean", None, [a, b]), tmp_path / "out")
    for name, weight in (
        ("model.layers.0.mlp.down_proj.weight", 1.0),
        ("model.layers.1.mlp.up_proj.weight", 1.5),
        ("model.layers.2.mlp.down_proj.weight", 2.0),
        ("model.layers.1.self_attn.o_proj.weight", 3.0),
        ("lm_head.weight", 3.0),
    ):
        wanted = _wanted(models, {"a": name, "b": name}, [1.0, weight])
        assert off_by({"x": out[name]}, {"x": wanted}) < ROUNDINGS * FINER, name
    norm = "model.norm.weight"
    average = (models["a"].state_dict()[norm] + 3 * models["b"].state_dict()[norm]) / 4
    assert off_by({norm: out[norm]}, {norm: average}) < ROUNDINGS


def test_fisher_weights_every_tensor(models: Models, folder: Path, tmp_path: Path) -> None:
    parameters = {"normalize_fisher": "tensor", "epsilon": 0.0}
    listed = _listed(folder, "a", "b", kind="-fisher")
    out = merged(merge_config("fisher", None, listed, parameters=parameters), tmp_path / "out")
    information = [fishers(models[n], inputs_of(models[n], i))[0] for i, n in enumerate("ab")]
    for name in ("model.norm.weight", "model.layers.1.mlp.down_proj.weight", "lm_head.weight"):
        f, g = (x[name]["fisher"] / x[name]["fisher"].mean() for x in information)
        one, other = (models[n].state_dict()[name] for n in "ab")
        assert off_by({name: out[name]}, {name: (f * one + g * other) / (f + g)}) < ROUNDINGS * FINER


def test_a_mean_over_the_model_normalises_all_tensors_alike(models: Models, folder: Path, tmp_path: Path) -> None:
    listed = _listed(folder, "a", "b", kind="-fisher")
    parameters = {"normalize_fisher": "model", "epsilon": 0.0}
    out = merged(merge_config("fisher", None, listed, parameters=parameters), tmp_path / "out")
    name = "model.layers.0.self_attn.k_proj.weight"
    found = []
    for i, n in enumerate("ab"):
        every = fishers(models[n], inputs_of(models[n], i))[0]
        mean = torch.cat([x["fisher"].flatten() for x in every.values()]).mean()
        found.append((every[name]["fisher"] / mean, models[n].state_dict()[name]))
    wanted = sum(f * w for f, w in found) / sum(f for f, _ in found)
    assert off_by({name: out[name]}, {name: wanted}) < ROUNDINGS * FINER


@pytest.mark.parametrize("method", ["regmean", "fisher"])
def test_base_model_takes_no_part_unless_it_is_listed(method: str, folder: Path, tmp_path: Path) -> None:
    listed = _listed(folder, "a", "b", kind="" if method == "regmean" else "-fisher")
    without = merged(merge_config(method, None, listed), tmp_path / "without")
    unlisted = merged(merge_config(method, folder / "c", listed), tmp_path / "unlisted")
    is_listed = merged(merge_config(method, folder / "b", listed), tmp_path / "listed")
    for other in (unlisted, is_listed):
        assert all(torch.equal(x, other[name]) for name, x in without.items())


def _renumbered(model: PreTrainedModel, seed: int) -> tuple[PreTrainedModel, PreTrainedTokenizerFast, torch.Tensor]:
    """The same model with its tokens in another order, its tokenizer, and the new number of each token."""
    order = torch.cat([torch.arange(3), torch.randperm(94, generator=torch.Generator().manual_seed(seed)) + 3])
    state = dict(model.state_dict())
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        state[name] = state[name][order]
    tokenizer = word_tokenizer(97)
    words = {number: word for word, number in tokenizer.get_vocab().items()}
    raw = tokenizer.backend_tokenizer.to_str()
    numbers = {words[int(old)]: new for new, old in enumerate(order)}
    for word, number in numbers.items():
        raw = re.sub(rf'"{re.escape(word)}":\d+', f'"{word}":{number}', raw, count=1)
    renumbered = PreTrainedTokenizerFast(
        tokenizer_object=type(tokenizer.backend_tokenizer).from_str(raw),
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
    )
    return with_weights(model, state), renumbered, torch.argsort(order)


@pytest.mark.parametrize("method", ["regmean", "fisher"])
def test_vocabularies_that_mergekit_matches(method: str, models: Models, folder: Path, tmp_path: Path) -> None:
    """A model with its tokens in another order merges like the original: Fisher information is reordered too."""
    how = {"fisher": "empirical"} if method == "fisher" else {}
    other, tokenizer, number = _renumbered(models["b"], 5)
    word_tokenizer(97).save_pretrained(save(models["a"], tmp_path / "a"))
    tokenizer.save_pretrained(save(other, tmp_path / "b"))
    kind = "-fisher" if method == "fisher" else ""
    inputs = number[inputs_of(models["b"], 1)]
    one = measure(models["a"], tmp_path / "a", tmp_path / "a.safetensors", **how)  # type: ignore[arg-type]
    file = measure(other, tmp_path / "b", tmp_path / "b.safetensors", inputs=inputs, **how)  # type: ignore[arg-type]
    listed = [
        {"model": tmp_path / name, "parameters": {"statistics": str(path)}} for name, path in (("a", one), ("b", file))
    ]
    got = merged(
        merge_config(method, tmp_path / "a", listed, tokenizer={"source": "base"}),
        tmp_path / "out",
        copy_tokenizer=True,
    )
    wanted = merged(merge_config(method, None, _listed(folder, "a", "b", kind=kind)), tmp_path / "wanted")
    assert off_by(got, wanted) < ROUNDINGS * FINER


def _planner(config: dict[str, Any], models: Models) -> MergePlanner:
    parsed, options = MergeConfiguration.model_validate(config), MergeOptions()
    LoaderCache().setup(options)
    return MergePlanner(parsed, get_architecture_info(parsed, options), options, out_model_config=models["a"].config)


@pytest.mark.parametrize(
    ("method", "kind"),
    [("regmean", ""), ("fisher", "-fisher"), ("aligned_regmean", ""), ("regmean_task_arithmetic", "")],
)
def test_merge_in_memory_is_the_merge_on_disk(
    method: str, kind: str, models: Models, folder: Path, tmp_path: Path
) -> None:
    """As mergekit-evolve plans it."""
    base = folder / "a" if method not in ("regmean", "fisher") else None
    config = merge_config(method, base, _listed(folder, "b", "c", kind=kind))
    plan = _planner(config, models).plan_in_memory()
    out: State = {task.weight_info.name: x for task, x in Executor(plan).run(quiet=True)}
    on_disk = merged(config, tmp_path / "out")
    assert out.keys() == on_disk.keys()
    assert all(torch.equal(x, out[name]) for name, x in on_disk.items())


def test_the_written_dtype_is_the_one_that_is_asked_for(folder: Path, tmp_path: Path) -> None:
    config = merge_config("regmean", None, _listed(folder, "a", "b")) | {"dtype": "bfloat16"}
    assert {x.dtype for x in merged(config, tmp_path / "one").values()} == {torch.bfloat16}
    del config["dtype"]
    assert {x.dtype for x in merged(config, tmp_path / "two").values()} == {torch.float32}


def test_large_tensors_are_merged_a_few_rows_at_a_time(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A head as large as a vocabulary in float64 would be larger than the model."""
    for method, kind in (("regmean", ""), ("fisher", "-fisher")):
        config = merge_config(method, None, _listed(folder, "a", "b", kind=kind))
        whole = merged(config, tmp_path / f"{method}-whole")
        with monkeypatch.context() as patch:
            patch.setattr(fusion_tasks, "_ROWS", 20)
            patch.setattr(fisher_tasks, "PIECE", 500)
            patch.setattr(fisher_tasks, "is_large", lambda x: x.ndim > 1)
            divided = merged(config, tmp_path / f"{method}-divided")
        assert off_by(divided, whole) < ROUNDINGS


def test_the_command(
    folder: Path, tmp_path: Path, mergekit_yaml: Callable[..., subprocess.CompletedProcess[str]]
) -> None:
    """A good merge through mergekit-yaml, and one with the statistics of another model: no output, no traceback."""
    good = merge_config("regmean", None, _listed(folder, "a", "b"))
    done = mergekit_yaml(good, tmp_path / "good", "--no-copy-tokenizer")
    assert done.returncode == 0, done.stderr
    assert load(tmp_path / "good").keys() == load(folder / "a").keys()
    bad = merge_config("regmean", None, _listed(folder, "a", "b"))
    bad["models"][1]["parameters"]["statistics"] = str(folder / "c.safetensors")
    done = mergekit_yaml(bad, tmp_path / "bad", "--no-copy-tokenizer")
    assert done.returncode != 0
    assert "Traceback" not in done.stderr
    assert f"but {folder / 'b'} has other weights" in done.stderr
    assert not list((tmp_path / "bad").glob("*.safetensors"))


# Devices


@pytest.mark.skipif(
    not hasattr(torch.utils.backend_registration, "_setup_privateuseone_for_python_backend"),
    reason="this torch cannot pretend to have a GPU",
)
def test_merges_with_statistics_stay_on_a_fake_gpu() -> None:
    script = Path(__file__).with_name("fake_gpu_data.py")
    done = run_command("pytest", "-q", "-p", "no:cacheprovider", script, cwd=script.parent, env=OFFLINE)
    assert done.returncode == 0, done.stdout
    assert "3 passed" in done.stdout


def _tasks(config: dict[str, Any], models: Models, tmp_path: Path) -> list[Task]:
    return list(TaskUniverse(_planner(config, models).plan_to_disk(str(tmp_path / "out"))).tasks)


def test_statistics_of_one_layer_are_held_at_a_time(models: Models, folder: Path, tmp_path: Path) -> None:
    """No task hands statistics on to another: each reads those of its own layer, and lets them go."""
    tasks = _tasks(merge_config("regmean", None, _listed(folder, "b", "c")), models, tmp_path)
    merges = [t for t in tasks if isinstance(t, MergeLinear)]
    assert len(merges) == 22
    for task in merges:
        assert set(task.arguments()) == {"weights"}
