"""Configurations that cannot be merged: each is refused by name before MergeKit plans anything."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from click.testing import CliRunner
from conftest import State, load, merge_config, merged
from mergekit import merge_methods
from mergekit.merge_methods import MergeMethod, TensorGroup, merge_method
from mergekit.merge_methods.base import InputContract, PerInput
from models import make_model, save

from mergekit_symalign.cli import main
from mergekit_symalign.errors import ArchitectureError, ConfigError, ParameterError, SymalignError, UnknownMethodError
from mergekit_symalign.method_names import is_ours, misspelt
from mergekit_symalign.methods import AlignedMethod

LAYERS = 2


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("models")
    found = {
        name: save(make_model("llama", i, num_hidden_layers=LAYERS), folder / name) for i, name in enumerate("abc")
    }
    found["deep"] = save(make_model("llama", 9, num_hidden_layers=LAYERS + 2), folder / "deep")
    return found


@pytest.fixture
def refused(tmp_path: Path) -> Callable[..., str]:
    """Run a merge that must be refused before anything is written; return the message."""

    def run(error: type[SymalignError], config: dict[str, Any]) -> str:
        with pytest.raises(error) as caught:
            merged(config, tmp_path / "out")
        assert not (tmp_path / "out").exists()
        return str(caught.value)

    return run


# The anchor of a method without a base


def _baseless() -> list[MergeMethod]:
    return [
        method.inner
        for method in merge_methods.registered_methods()
        if isinstance(method, AlignedMethod) and not method.anchor_is_base and method.spec.name.startswith("aligned_")
    ]


def _weighted(models: list[Path], **parameters: Any) -> list[dict[str, Any]]:
    return [{"model": path, "parameters": parameters} for path in models]


@pytest.mark.parametrize("inner", ["linear", "multislerp", "nuslerp", "karcher"])
def test_an_unlisted_anchor_is_asked_for_nothing(inner: str, models: dict[str, Path], tmp_path: Path) -> None:
    """Not aligned, its merge is MergeKit's own merge of the listed models, bit for bit."""
    listed = [models["b"], models["c"]]
    asked = {p.name for p in merge_methods.get(inner).spec.parameters if p.required}
    given = dict.fromkeys(asked, 0.3)
    plain = merged(merge_config(inner, None, _weighted(listed, **given)), tmp_path / "plain")
    ours = merged(
        merge_config(f"aligned_{inner}", models["a"], _weighted(listed, **given, align=False)), tmp_path / "ours"
    )
    assert plain.keys() == ours.keys()
    assert all(torch.equal(x, ours[name]) for name, x in plain.items())


def test_all_methods_without_a_base_are_tried() -> None:
    assert {method.spec.name for method in _baseless()} >= {"linear", "multislerp", "nuslerp", "karcher"}


def test_a_listed_model_is_still_asked(models: dict[str, Path], refused: Callable[..., str]) -> None:
    some = [*_weighted([models["b"]], weight=1.0), models["c"]]
    message = refused(ParameterError, merge_config("aligned_linear", models["a"], some))
    assert f"parameter weight of model {models['c']}" in message
    listed = [models["a"], *_weighted([models["b"], models["c"]], weight=1.0)]
    assert f"of model {models['a']}" in refused(ParameterError, merge_config("aligned_linear", models["a"], listed))
    assert "parameter t (models)" in refused(
        ParameterError, merge_config("aligned_slerp", models["a"], [models["a"], models["b"]])
    )


def test_a_weight_may_stand_at_any_level(models: dict[str, Path], tmp_path: Path) -> None:
    listed = [models["b"], models["c"]]
    at_top = merged(merge_config("aligned_linear", models["a"], listed, parameters={"weight": 0.3}), tmp_path / "top")
    module = {"default": {"models": [{"model": str(m)} for m in listed], "parameters": {"weight": 0.3}}}
    config = {"merge_method": "aligned_linear", "base_model": str(models["a"]), "modules": module, "dtype": "float32"}
    in_module = merged(config, tmp_path / "module")
    assert all(torch.equal(x, in_module[name]) for name, x in at_top.items())


def test_only_listed_models_are_counted(models: dict[str, Path], tmp_path: Path, refused: Callable[..., str]) -> None:
    """A method that takes two models takes two and an anchor that is none of them."""

    @merge_method(name="halfway", contract=InputContract(min_inputs=2, max_inputs=2))
    def halfway(group: TensorGroup, share: PerInput[float]) -> torch.Tensor:
        return sum(share[entry.id] * entry.tensor for entry in group.entries)  # type: ignore[return-value]

    if "halfway" not in {method.spec.name for method in merge_methods.registered_methods()}:
        merge_methods.register(halfway)
    two = _weighted([models["b"], models["c"]], share=0.5, align=False)
    out = merged(merge_config("aligned_halfway", models["a"], two), tmp_path / "two")
    b, c = load(models["b"]), load(models["c"])
    assert all(torch.equal(x, 0.5 * b[name] + 0.5 * c[name]) for name, x in out.items())
    three = _weighted([models["a"], models["b"], models["c"]], share=0.5)
    assert "exactly 2 inputs" in refused(ConfigError, merge_config("aligned_halfway", models["a"], three))


def test_a_method_that_takes_two_models_says_so(models: dict[str, Path], refused: Callable[..., str]) -> None:
    listed = [models[m] for m in "abc"]
    config = merge_config("aligned_slerp", models["a"], listed, parameters={"t": 0.5})
    assert "aligned_slerp cannot take these models" in refused(ConfigError, config)


# Layers


def _sliced(models: dict[str, Path], *ranges: list[int], other: str = "b", module: bool = False) -> dict[str, Any]:
    names = ["a", other]
    sources = [
        {"model": str(models[name]), "layer_range": layers, "parameters": {"weight": 1.0}}
        for name, layers in zip(names, ranges, strict=True)
    ]
    slices: dict[str, Any] = {"slices": [{"sources": sources}]}
    where = {"modules": {"default": slices}} if module else slices
    return {"merge_method": "rotation_match", "base_model": str(models["a"]), "dtype": "float32", **where}


@pytest.mark.parametrize("module", [False, True])
@pytest.mark.parametrize("layers", [[0, 3], [2, 4], [-1, 1], [-2, 0], [1, 0], [1, 1], [0, 0], [7, 9]])
def test_layer_ranges_that_do_not_exist(
    layers: list[int], module: bool, models: dict[str, Path], refused: Callable[..., str]
) -> None:
    where = "modules.default.slices[0]" if module else "slices[0]"
    for name, ranges in (("a", [layers, layers]), ("b", [[0, 1], layers])):
        message = refused(ConfigError, _sliced(models, *ranges, module=module))
        assert message.startswith(f"{where}: layer_range [{layers[0]}, {layers[1]}] of model {models[name]}")
        assert f"the model has {LAYERS} layers" in message


def test_each_model_has_its_own_depth(models: dict[str, Path], tmp_path: Path, refused: Callable[..., str]) -> None:
    merged(_sliced(models, [0, 2], [2, 4], other="deep"), tmp_path / "fine")
    assert f"the model has {LAYERS + 2} layers" in refused(ConfigError, _sliced(models, [0, 2], [3, 5], other="deep"))


def test_slices_of_different_lengths(models: dict[str, Path], refused: Callable[..., str]) -> None:
    message = refused(ConfigError, _sliced(models, [0, 2], [0, 1]))
    assert "slices[0]: its sources differ in their number of layers" in message


def test_a_module_that_there_is_not(models: dict[str, Path], refused: Callable[..., str]) -> None:
    config = _sliced(models, [0, 2], [0, 2], module=True)
    config["modules"]["vision"] = config["modules"].pop("default")
    assert "modules.vision: the architecture has no such module. It has: default" in refused(ConfigError, config)


# Architectures


def _renamed(source: Path, out: Path, architectures: Any) -> Path:
    """A checkpoint whose config names other architectures; none at all for `...`."""
    shutil.copytree(source, out)
    config = json.loads((out / "config.json").read_text("utf-8")) | {"architectures": architectures}
    if architectures is ...:
        del config["architectures"]
    (out / "config.json").write_text(json.dumps(config), "utf-8")
    return out


BAD = {"missing": ..., "null": None, "empty": [], "two": ["LlamaForCausalLM", "LlamaModel"], "nameless": [""]}


@pytest.mark.parametrize("kind", sorted(BAD))
@pytest.mark.parametrize("role", ["anchor", "model"])
def test_a_config_must_name_one_architecture(
    kind: str, role: str, models: dict[str, Path], tmp_path: Path, refused: Callable[..., str]
) -> None:
    bad = _renamed(models["b"], tmp_path / "bad", BAD[kind])
    pair = (bad, models["a"]) if role == "anchor" else (models["a"], bad)
    message = refused(ArchitectureError, merge_config("rotation_match", pair[0], [pair[1]]))
    assert message.startswith(f"model {bad}: its config.json names {'2' if kind == 'two' else 'no'} architecture")
    assert '"architectures": ["LlamaForCausalLM"]' in message


@pytest.mark.parametrize("command", ["inspect", "solve", "apply", "verify", "barrier"])
def test_commands_ask_for_the_architecture_too(command: str, models: dict[str, Path], tmp_path: Path) -> None:
    bad, good = str(_renamed(models["b"], tmp_path / "bad", ...)), str(models["a"])
    rest = {
        "inspect": [good, bad],
        "solve": [good, bad, "-o", str(tmp_path / "out")],
        "apply": [str(tmp_path / "a.safetensors"), bad, "-o", str(tmp_path / "out")],
        "verify": [good, bad, "--random"],
        "barrier": [good, bad, "--text", str(tmp_path / "t.txt")],
    }[command]
    done = CliRunner().invoke(main, [command, *rest])
    assert done.exit_code == 2, done.output
    assert '"architectures": ["LlamaForCausalLM"]' in done.output
    assert not (tmp_path / "out").exists()


def test_an_override_names_the_architecture(models: dict[str, Path], tmp_path: Path) -> None:
    def overridden(path: Path) -> dict[str, Any]:
        return {"model": {"path": str(path)}, "override_architecture": "LlamaForCausalLM"}

    bare = {name: _renamed(models[name], tmp_path / name, ...) for name in "ab"}
    config: dict[str, Any] = {"merge_method": "rotation_match", "dtype": "float32"}
    models_of = lambda paths: {"base_model": overridden(paths["a"]), "models": [{"model": overridden(paths["b"])}]}  # noqa: E731
    out = merged(config | models_of(bare), tmp_path / "out", write_model_card=True)
    assert same(out, merged(config | models_of(models), tmp_path / "named"))
    assert json.loads((tmp_path / "out" / "config.json").read_text("utf-8"))["architectures"] == ["LlamaForCausalLM"]


def same(one: State, other: State) -> bool:
    return one.keys() == other.keys() and all(torch.equal(x, other[name]) for name, x in one.items())


# Names of methods


@pytest.mark.parametrize(
    ("name", "near"),
    [
        ("aligned_dare", "aligned_dare_ties"),
        ("aligned_task_arithmatic", "aligned_task_arithmetic"),
        ("alinged_task_arithmetic", "aligned_task_arithmetic"),
        ("align_ties", "aligned_ties"),
        ("Aligned-TIES", "aligned_ties"),
        ("rotation_mach", "rotation_match"),
        ("rotationmatch", "rotation_match"),
        ("Rotation Match", "rotation_match"),
    ],
)
def test_a_misspelt_method_is_told_the_nearest(
    name: str, near: str, models: dict[str, Path], refused: Callable[..., str]
) -> None:
    message = refused(UnknownMethodError, merge_config(name, models["a"], [models["b"]], parameters={"weight": 1.0}))
    assert message.startswith(f"merge_method {name}: there is no merge method of this name. Did you mean {near}")


@pytest.mark.parametrize("name", ["task_arithmatic", "tise", "dare", "linaer", "something", "rotate", ""])
def test_other_unknown_names_are_left_to_mergekit(name: str, models: dict[str, Path], tmp_path: Path) -> None:
    known = [method.spec.name for method in merge_methods.registered_methods()]
    assert misspelt(name, known) is None
    with pytest.raises(RuntimeError, match=f"Unimplemented merge method {name}") as error:
        merged(merge_config(name, models["a"], [models["b"]]), tmp_path / "out")
    assert not isinstance(error.value, SymalignError)


def test_methods_that_have_no_aligned_form_are_named() -> None:
    with pytest.raises(UnknownMethodError, match="Use passthrough itself, which has no aligned form"):
        merge_methods.get("aligned_passthrough")


def test_nothing_near_lists_all_of_ours() -> None:
    with pytest.raises(UnknownMethodError, match=r"Known: aligned_.*rotation_match") as error:
        merge_methods.get("aligned_xyzzyxyzzyxyzzyxyzzyxyzzy")
    ours = {method.spec.name for method in merge_methods.registered_methods() if is_ours(method.spec.name)}
    assert all(name in str(error.value) for name in ours)


def test_a_misspelt_method_on_the_command_line(models: dict[str, Path], tmp_path: Path) -> None:
    (tmp_path / "m.yml").write_text(yaml.safe_dump(merge_config("aligned_dare", models["a"], [models["b"]])), "utf-8")
    done = CliRunner().invoke(main, ["yaml", str(tmp_path / "m.yml"), str(tmp_path / "out")])
    assert done.exit_code == 1
    assert done.output.strip().splitlines()[-1].startswith("Error: merge_method aligned_dare")
    assert "Traceback" not in done.output
