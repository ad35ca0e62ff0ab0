"""Statistics and parameters that do not fit are refused by name, before anything is written."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import merge_config, merged
from mergekit import merge_methods
from models import ROUNDINGS, make_model, off_by, perturbed, save, word_tokenizer
from safetensors.torch import save_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Split
from transformers import PreTrainedModel, PreTrainedTokenizerFast
from whole_statistics import measure, origin

from mergekit_symalign.errors import (
    ConfigError,
    OtherStatisticsError,
    ParameterError,
    StatisticsFileError,
    SymalignError,
    SymmetryError,
    UnalignedCallError,
)

DOWN = "model.layers.0.mlp.down_proj.weight"
Edit = Callable[[dict[str, Any], dict[str, Any]], None]


@pytest.fixture(scope="module")
def models() -> dict[str, PreTrainedModel]:
    a = make_model("llama", 0, num_hidden_layers=1)
    wide = make_model("llama", 0, num_hidden_layers=1, intermediate_size=64)
    return {"a": a, "b": perturbed(a, 0.1, 1), "wide": wide, "qwen": make_model("qwen2", 0, num_hidden_layers=1)}


@pytest.fixture(scope="module")
def folder(models: dict[str, PreTrainedModel], tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("models")
    for name, model in models.items():
        save(model, out / name)
        measure(model, out / name, out / f"{name}.safetensors")
    for name in "ab":
        measure(models[name], out / name, out / f"{name}-fisher.safetensors", fisher="empirical")
        measure(models[name], out / name, out / f"{name}-kronecker.safetensors", fisher="kronecker")
        measure(models[name], out / name, out / f"{name}-diagonal.safetensors", gram="diagonal")
    return out


def _config(folder: Path, method: str, one: str | None, other: str | None, **parameters: Any) -> dict[str, Any]:
    """The models a and b with these files."""
    given = {"a": one, "b": other}
    listed = [
        {"model": folder / name, "parameters": {"statistics": str(folder / file)} if file else {}}
        for name, file in given.items()
    ]
    base = folder / "a" if method.startswith("aligned") or method == "regmean_task_arithmetic" else None
    return merge_config(method, base, listed, parameters=parameters)


def _refused(config: dict[str, Any], tmp_path: Path, kind: type[SymalignError] = SymalignError) -> str:
    with pytest.raises(kind) as caught:
        merged(config, tmp_path / "out")
    assert not list((tmp_path / "out").glob("*.safetensors"))
    return str(caught.value)


def _edited(models: dict[str, PreTrainedModel], folder: Path, tmp_path: Path, edit: Edit, **how: Any) -> str:
    """Statistics of b, changed before they are written."""
    return str(measure(models["b"], folder / "b", tmp_path / "edited.safetensors", edit=edit, **how))


# Which file


@pytest.mark.parametrize("method", ["regmean", "fisher", "aligned_regmean"])
def test_missing_statistics(method: str, folder: Path, tmp_path: Path) -> None:
    file = "a.safetensors" if "regmean" in method else "a-fisher.safetensors"
    message = _refused(_config(folder, method, file, None), tmp_path, ParameterError)
    assert f"parameter statistics of model {folder / 'b'}" in message
    assert "mergekit-symalign measure" in message


def test_a_model_of_weight_0_needs_none(folder: Path, tmp_path: Path) -> None:
    config = _config(folder, "regmean", "a.safetensors", None)
    config["models"][1]["parameters"]["weight"] = 0.0
    out = merged(config, tmp_path / "out")
    alone = merged(
        merge_config("linear", None, [{"model": folder / "a", "parameters": {"weight": 1.0}}]), tmp_path / "a"
    )
    assert off_by(out, alone) < ROUNDINGS


@pytest.mark.parametrize(
    ("file", "reason"),
    [
        ("a.safetensors", "but .*/b has other weights"),
        ("wide.safetensors", "another size .* neurons 64 != 80"),
        ("qwen.safetensors", "of family qwen2, but model .*/b is of family llama"),
        ("nothing.safetensors", "no such file"),
        ("b/model.safetensors", "not one of statistics"),
    ],
)
def test_statistics_of_something_else(file: str, reason: str, folder: Path, tmp_path: Path) -> None:
    with pytest.raises(StatisticsFileError, match=reason):
        merged(_config(folder, "regmean", "a.safetensors", file), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_statistics_with_another_tokenizer(models: dict[str, PreTrainedModel], folder: Path, tmp_path: Path) -> None:
    other = origin(models["b"], folder / "b", tokenizer="another")
    file = measure(models["b"], folder / "b", tmp_path / "b.safetensors", origin=other)
    config = _config(folder, "regmean", "a.safetensors", str(file))
    assert "measured with another tokenizer" in _refused(config, tmp_path, OtherStatisticsError)


def test_statistics_of_a_model_whose_tokenizer_was_replaced(
    models: dict[str, PreTrainedModel], folder: Path, tmp_path: Path
) -> None:
    """The weights are the same, but they were measured on other numbers for the same texts."""
    path = save(models["b"], tmp_path / "b")
    word_tokenizer(97).save_pretrained(path)
    file = measure(models["b"], path, tmp_path / "b.safetensors")
    PreTrainedTokenizerFast(tokenizer_object=_by_letters(), unk_token="<unk>").save_pretrained(path)
    listed = [{"model": path, "parameters": {"statistics": str(file)}}]
    message = _refused(merge_config("regmean", None, listed), tmp_path, OtherStatisticsError)
    assert "another tokenizer than the one of" in message


def _by_letters() -> Tokenizer:
    tokenizer = Tokenizer(WordLevel({"<unk>": 0, **{chr(97 + i): i + 1 for i in range(26)}}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = Split("", "isolated")
    return tokenizer


@pytest.mark.parametrize(
    ("method", "one", "other", "reason"),
    [
        ("regmean", "a.safetensors", "b-fisher.safetensors", "it has no gram of tensor"),
        ("fisher", "a-fisher.safetensors", "b.safetensors", "it has no Fisher information of model"),
        ("fisher", "a-fisher.safetensors", "b-kronecker.safetensors", "Measure all models with the same --fisher"),
        ("regmean_task_arithmetic", None, "b-fisher.safetensors", "it has no gram of tensor"),
    ],
)
def test_statistics_of_another_kind(
    method: str, one: str | None, other: str, reason: str, folder: Path, tmp_path: Path
) -> None:
    assert reason in _refused(_config(folder, method, one, other), tmp_path)


# What is in it


def _drop(statistics: dict[str, Any], tokens: dict[str, Any]) -> None:
    del statistics[DOWN], tokens[DOWN]


def test_a_missing_layer(models: dict[str, PreTrainedModel], folder: Path, tmp_path: Path) -> None:
    file = _edited(models, folder, tmp_path, _drop)
    message = _refused(_config(folder, "regmean", "a.safetensors", file), tmp_path, OtherStatisticsError)
    assert f"nothing of tensor {DOWN}" in message


def test_what_the_measurement_left_out_is_averaged(
    models: dict[str, PreTrainedModel], folder: Path, tmp_path: Path
) -> None:
    file = _edited(models, folder, tmp_path, _drop, only="self_attn|mlp.up|mlp.gate|lm_head")
    out = merged(_config(folder, "regmean", "a.safetensors", file), tmp_path / "out")
    average = (models["a"].state_dict()[DOWN] + models["b"].state_dict()[DOWN]) / 2
    assert off_by({DOWN: out[DOWN]}, {DOWN: average}) < ROUNDINGS


def _put(value: float) -> Edit:
    def edit(statistics: dict[str, Any], tokens: dict[str, Any]) -> None:
        statistics[DOWN]["gram"][3, 3] = value

    return edit


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -1.0])
def test_numbers_that_are_none(value: float, models: dict[str, PreTrainedModel], folder: Path, tmp_path: Path) -> None:
    file = _edited(models, folder, tmp_path, _put(value))
    message = _refused(_config(folder, "regmean", "a.safetensors", file), tmp_path, StatisticsFileError)
    assert f"gram of {DOWN}" in message


def test_a_matrix_of_another_size(models: dict[str, PreTrainedModel], folder: Path, tmp_path: Path) -> None:
    def edit(statistics: dict[str, Any], tokens: dict[str, Any]) -> None:
        statistics[DOWN]["gram"] = torch.eye(7)

    file = _edited(models, folder, tmp_path, edit)
    message = _refused(_config(folder, "regmean", "a.safetensors", file), tmp_path, OtherStatisticsError)
    assert f"gram of tensor {DOWN} is 7 x 7, but the model's tensor needs 80 x 80" in message


def test_a_replaced_number_is_found(folder: Path, tmp_path: Path, models: dict[str, PreTrainedModel]) -> None:
    file = tmp_path / "b.safetensors"
    measure(models["b"], folder / "b", file)
    from safetensors import safe_open

    with safe_open(file, "pt") as opened:
        numbers, metadata = {k: opened.get_tensor(k) for k in opened.keys()}, opened.metadata()  # noqa: SIM118
    name = next(k for k in numbers if DOWN in k and k.startswith("gram"))
    save_file(numbers | {name: numbers[name] * 2}, file, metadata)
    assert "its numbers are damaged" in _refused(_config(folder, "regmean", "a.safetensors", str(file)), tmp_path)


# Too few tokens


def _only_one_row(statistics: dict[str, Any], tokens: dict[str, Any]) -> None:
    row = torch.randn(80, generator=torch.Generator().manual_seed(3))
    statistics[DOWN] |= {"gram": row[:, None] * row, "mean": row}
    tokens[DOWN] = 1


def _nothing(statistics: dict[str, Any], tokens: dict[str, Any]) -> None:
    statistics[DOWN] |= {"gram": torch.zeros(80, 80), "mean": torch.zeros(80)}
    tokens[DOWN] = 0


@pytest.mark.parametrize(
    ("edit", "by", "words"), [(_only_one_row, "ridge", "are singular"), (_nothing, "average", "no token reached it")]
)
def test_too_few_tokens_are_named_and_give_finite_numbers(
    edit: Edit,
    by: str,
    words: str,
    models: dict[str, PreTrainedModel],
    folder: Path,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    files = [str(measure(models[n], folder / n, tmp_path / f"{n}.safetensors", edit=edit)) for n in "ab"]
    with caplog.at_level(logging.WARNING):
        out = merged(_config(folder, "regmean", *files, off_diagonal=1.0), tmp_path / "out")
    assert all(bool(torch.isfinite(x).all()) for x in out.values())
    assert any(f"tensor {DOWN}" in m and words in m for m in caplog.messages)
    assert any("fewer than" in m and DOWN in m for m in caplog.messages)
    report = json.loads((tmp_path / "out" / "symalign_report.json").read_text("utf-8"))
    assert report["tensors"] == {DOWN: {"merged_by": by}}
    if by == "average":
        average = (models["a"].state_dict()[DOWN] + models["b"].state_dict()[DOWN]) / 2
        assert off_by({DOWN: out[DOWN]}, {DOWN: average}) < ROUNDINGS


# Parameters


@pytest.mark.parametrize(
    ("method", "parameters", "name"),
    [
        ("regmean", {"off_diagonal": 1.5}, "off_diagonal"),
        ("regmean", {"off_diagonal": -0.1}, "off_diagonal"),
        ("regmean", {"ridge": -1.0}, "ridge"),
        ("regmean", {"ridge": float("nan")}, "ridge"),
        ("fisher", {"epsilon": -1.0}, "epsilon"),
        ("fisher", {"normalize_fisher": "both"}, "normalize_fisher"),
        ("regmean", {"weight": -1.0}, "weight"),
        ("regmean", {"weight": 0.0}, "weight"),
        ("regmean", {"offdiagonal": 0.5}, "offdiagonal"),
    ],
)
def test_parameters_that_make_no_sense(
    method: str, parameters: dict[str, Any], name: str, folder: Path, tmp_path: Path
) -> None:
    kind = "-fisher" if method == "fisher" else ""
    config = _config(folder, method, f"a{kind}.safetensors", f"b{kind}.safetensors", **parameters)
    assert _refused(config, tmp_path, ParameterError).startswith(f"parameter {name}")


def test_task_vectors_need_a_base(folder: Path, tmp_path: Path) -> None:
    message = _refused(
        merge_config("regmean_task_arithmetic", None, [folder / "a", folder / "b"]), tmp_path, ConfigError
    )
    assert message.startswith("base_model (models): regmean_task_arithmetic")


def test_task_vectors_and_files_are_not_mixed(models: dict[str, PreTrainedModel], folder: Path, tmp_path: Path) -> None:
    c = save(perturbed(models["a"], 0.1, 2), tmp_path / "c")
    listed = [{"model": c}, {"model": folder / "b", "parameters": {"statistics": str(folder / "b.safetensors")}}]
    message = _refused(merge_config("regmean_task_arithmetic", folder / "a", listed), tmp_path, ParameterError)
    assert "task_vectors" in message


def test_weight_and_bias_are_asked_for_together(tmp_path: Path) -> None:
    model = make_model("qwen2", 0, num_hidden_layers=1)
    path = save(model, tmp_path / "m")
    file = measure(model, path, tmp_path / "m.safetensors")
    weights = [{"filter": "q_proj.bias", "value": 0.5}, {"value": 1.0}]
    listed = [{"model": path, "parameters": {"statistics": str(file), "weight": weights}}]
    assert "a layer's weight and bias are found together" in _refused(merge_config("regmean", None, listed), tmp_path)


# Squares under an alignment


@pytest.mark.parametrize(
    ("method", "kind", "parameters", "name"),
    [
        ("aligned_fisher", "-fisher", {}, "rotation"),
        ("aligned_fisher", "-fisher", {"rotation": "none"}, "scaling"),
        ("aligned_fisher", "-fisher", {"rotation": "none", "scaling": False, "neuron_scaling": True}, "neuron_scaling"),
        ("aligned_regmean", "-diagonal", {}, "rotation"),
    ],
)
def test_squares_do_not_follow_a_rotation(
    method: str, kind: str, parameters: dict[str, Any], name: str, folder: Path, tmp_path: Path
) -> None:
    config = _config(folder, method, f"a{kind}.safetensors", f"b{kind}.safetensors", **parameters)
    message = _refused(config, tmp_path, ParameterError)
    assert message.startswith(f"parameter {name}")
    assert "measure the aligned model" in message


def test_squares_do_not_follow_a_file_that_turns(
    models: dict[str, PreTrainedModel], folder: Path, tmp_path: Path
) -> None:
    saved = tmp_path / "saved"
    merged(
        merge_config("rotation_match", folder / "a", [folder / "b"], parameters={"save_alignment": str(saved)}),
        tmp_path / "x",
    )
    config = _config(folder, "aligned_fisher", "a-fisher.safetensors", "b-fisher.safetensors")
    config["models"][1]["parameters"]["alignment"] = str(next(saved.glob("*.safetensors")))
    assert "it turns or scales" in _refused(config, tmp_path, SymmetryError)


# Called on a single tensor


@pytest.mark.parametrize("method", ["regmean", "fisher", "regmean_task_arithmetic", "aligned_regmean"])
def test_a_single_tensor_of_a_block_is_refused(method: str) -> None:
    states = [{DOWN: torch.ones(2, 2)}, {DOWN: torch.zeros(2, 2)}]
    base = 0 if "aligned" in method or "task" in method else None
    with pytest.raises(UnalignedCallError, match=f"{method} was called on it alone"):
        merge_methods.merge_state_dicts(states, merge_methods.get(method), base=base)


def test_a_single_tensor_outside_the_blocks_is_averaged() -> None:
    states = [{"w": torch.ones(2)}, {"w": torch.zeros(2)}]
    out = merge_methods.merge_state_dicts(states, merge_methods.get("regmean"), parameters={"weight": [1.0, 3.0]})
    assert torch.equal(out["w"], torch.full((2,), 0.25))
