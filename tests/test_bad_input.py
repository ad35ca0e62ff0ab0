"""Bad input: every refusal says what, where and what to do, before any tensor is computed."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import load, merge_config, merged
from mergekit import merge_methods
from mergekit.merge_methods import merge_state_dicts, merge_tensors
from models import make_model, save
from safetensors.torch import save_file
from transformers import BertConfig, BertForMaskedLM, CTRLConfig, CTRLLMHeadModel

from mergekit_symalign.errors import (
    ArchitectureError,
    CheckpointError,
    ConfigError,
    GeometryError,
    ParameterError,
    SymalignError,
    UnalignedCallError,
    ValueInTensorError,
)

Q_PROJ = "model.layers.1.self_attn.q_proj.weight"


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("models")
    variants: dict[str, tuple[str, dict[str, Any]]] = {
        "a": ("llama", {}),
        "b": ("llama", {}),
        "wide": ("llama", {"hidden_size": 96}),
        "heads": ("llama", {"num_attention_heads": 8}),
        "kv_heads": ("llama", {"num_key_value_heads": 6}),
        "head_dim": ("llama", {"head_dim": 8}),
        "neurons": ("llama", {"intermediate_size": 96}),
        "deep": ("llama", {"num_hidden_layers": 4}),
        "vocabulary": ("llama", {"vocab_size": 101}),
        "biased": ("llama", {"attention_bias": True}),
        "biased-b": ("llama", {"attention_bias": True}),
        "qwen2": ("qwen2", {}),
        "qwen3": ("qwen3", {}),
        "qwen3-b": ("qwen3", {}),
        "starcoder2": ("starcoder2", {}),
        "starcoder2-b": ("starcoder2", {}),
        "smollm3": ("smollm3", {}),
        "smollm3-b": ("smollm3", {"no_rope_layers": [0, 1, 1]}),
        "granite": ("granite", {}),
        "granite-b": ("granite", {"mlp_bias": False}),
    }
    return {
        name: save(make_model(family, i, **overrides), folder / name)
        for i, (name, (family, overrides)) in enumerate(variants.items())
    }


@pytest.fixture
def refused(models: dict[str, Path], tmp_path: Path) -> Callable[..., str]:
    """Run a merge that must be refused; return the message. No output directory may be left."""

    def run(error: type[SymalignError], config: dict[str, Any], **options: Any) -> str:
        with pytest.raises(error) as caught:
            merged(config, tmp_path / "out", **options)
        assert not (tmp_path / "out").exists()
        return str(caught.value)

    return run


def _edited(source: Path, out: Path, edit: Callable[[dict[str, torch.Tensor]], None], **config: Any) -> Path:
    """A copy of a checkpoint with some tensors or config entries changed."""
    shutil.copytree(source, out)
    state = load(out)
    edit(state)
    save_file(state, out / "model.safetensors", metadata={"format": "pt"})
    if config:
        file = out / "config.json"
        file.write_text(json.dumps(json.loads(file.read_text("utf-8")) | config), "utf-8")
    return out


def _pair(models: dict[str, Path], other: str | Path = "b", anchor: str = "a", **rest: Any) -> dict[str, Any]:
    model = models[other] if isinstance(other, str) else other
    return merge_config("rotation_match", models[anchor], [model], **rest)


def test_unsupported_architecture(models: dict[str, Path], tmp_path: Path, refused: Callable[..., str]) -> None:
    paths = []
    for name in ("x", "y"):
        paths.append(tmp_path / name)
        config = CTRLConfig(n_layer=1, n_embd=8, n_head=2, dff=8, vocab_size=11)
        CTRLLMHeadModel(config).save_pretrained(paths[-1])
    message = refused(ArchitectureError, merge_config("rotation_match", paths[0], [paths[1]]))
    assert "CTRLLMHeadModel" in message
    assert "MergeKit's own methods merge all its tensors" in message


@pytest.mark.parametrize("other", ["wide", "heads", "kv_heads", "head_dim", "neurons"])
def test_other_sizes(models: dict[str, Path], refused: Callable[..., str], other: str) -> None:
    message = refused(GeometryError, _pair(models, other))
    name, ours, theirs = {
        "wide": ("hidden", 96, 48),
        "heads": ("query_heads", 8, 6),
        "kv_heads": ("kv_heads", 6, 2),
        "head_dim": ("head_dim", 8, 16),
        "neurons": ("neurons", 96, 80),
    }[other]
    assert f"{name} {ours} != {theirs}" in message
    assert str(models[other]) in message


def test_other_depth(models: dict[str, Path], refused: Callable[..., str]) -> None:
    message = refused(GeometryError, _pair(models, "deep"))
    assert "4 layers" in message
    assert "has 3" in message
    assert "slices" in message


def test_other_vocabulary(models: dict[str, Path], refused: Callable[..., str]) -> None:
    message = refused(GeometryError, _pair(models, "vocabulary"))
    assert "model.embed_tokens.weight" in message
    assert "tokenizer: {source: base}" in message


def test_other_family(models: dict[str, Path], refused: Callable[..., str]) -> None:
    message = refused(GeometryError, _pair(models, "qwen2"), allow_crimes=True)
    assert "family qwen2" in message


@pytest.mark.parametrize("method", ["rotation_match", "aligned_task_arithmetic"])
def test_no_base_model(models: dict[str, Path], refused: Callable[..., str], method: str) -> None:
    config = merge_config(method, None, [models["a"], models["b"]], parameters={"weight": 1.0})
    assert "Add base_model" in refused(ConfigError, config)


@pytest.mark.parametrize("method", ["rotation_match", "aligned_task_arithmetic"])
def test_only_the_anchor(models: dict[str, Path], refused: Callable[..., str], method: str) -> None:
    config = merge_config(method, models["a"], [models["a"]], parameters={"weight": 1.0})
    assert "nothing to align" in refused(ConfigError, config)


def test_slices_without_the_anchor(models: dict[str, Path], refused: Callable[..., str]) -> None:
    sources = [{"model": str(models["b"]), "layer_range": [0, 2]}]
    config = {"merge_method": "rotation_match", "base_model": str(models["a"]), "slices": [{"sources": sources}]}
    message = refused(ConfigError, config)
    assert "slices[0]" in message
    assert "weight: 0.0" in message


def test_rotation_full_with_qk_norm(models: dict[str, Path], refused: Callable[..., str]) -> None:
    config = _pair(models, "qwen3-b", "qwen3", parameters={"rotation": "full"})
    message = refused(ConfigError, config)
    assert "QK-norm" in message
    assert "rotation: exact" in message


def test_neuron_scaling_of_a_plain_mlp(models: dict[str, Path], refused: Callable[..., str]) -> None:
    config = _pair(models, "starcoder2-b", "starcoder2", parameters={"neuron_scaling": True})
    assert "plain MLP" in refused(ConfigError, config)


def test_layers_with_other_positions(models: dict[str, Path], refused: Callable[..., str]) -> None:
    message = refused(GeometryError, _pair(models, "smollm3-b", "smollm3"))
    assert "model.layers.0." in message
    assert "RoPE on 0 and 16 coordinates" in message


def test_other_biases(models: dict[str, Path], refused: Callable[..., str]) -> None:
    message = refused(GeometryError, _pair(models, "granite-b", "granite"))
    assert "mlp.gate_proj.bias" in message


def test_unknown_rope_type(models: dict[str, Path], tmp_path: Path, refused: Callable[..., str]) -> None:
    rope = {"rope_type": "default", "rope_theta": 1e4}
    other = _edited(models["b"], tmp_path / "m", lambda s: None, rope_parameters=rope | {"partial_rotary_factor": 0.5})
    assert "partial_rotary_factor is 0.5" in refused(ArchitectureError, _pair(models, other))


@pytest.mark.parametrize(
    ("where", "parameters"),
    [
        ("parameters", {"parameters": {"permutaton": True}}),
        ("models: ", {"model_parameters": {"permutaton": True}}),
    ],
)
def test_misspelt_parameter(
    models: dict[str, Path], refused: Callable[..., str], where: str, parameters: dict[str, Any]
) -> None:
    model = {"model": models["b"], "parameters": parameters.pop("model_parameters", {})}
    message = refused(ParameterError, merge_config("rotation_match", models["a"], [model], **parameters))
    assert "permutaton" in message
    assert where in message
    assert "Did you mean permutation?" in message


@pytest.mark.parametrize("name", ["objective", "calibration", "alignment", "xyzzy"])
def test_parameter_of_another_method(models: dict[str, Path], refused: Callable[..., str], name: str) -> None:
    assert f"parameter {name}" in refused(ParameterError, _pair(models, parameters={name: True}))


def test_unknown_parameter_inside_slices(models: dict[str, Path], refused: Callable[..., str]) -> None:
    sources = [{"model": str(models[m]), "layer_range": [0, 2], "parameters": {"wieght": 1}} for m in "ab"]
    config = {"merge_method": "rotation_match", "base_model": str(models["a"]), "slices": [{"sources": sources}]}
    message = refused(ParameterError, config)
    assert "slices[0]" in message
    assert "Did you mean weight?" in message


def test_stock_methods_still_take_unknown_parameters(models: dict[str, Path], tmp_path: Path) -> None:
    merged(merge_config("linear", None, [models["a"], models["b"]], parameters={"weight": 1, "xyzzy": 2}), tmp_path)


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("rotation", "ful", "'exact', 'full' or 'none'"),
        ("scaling", "perhaps", "boolean"),
        ("weight", ["a", 1.0], "number"),
        ("align", [{"filter": "mlp", "value": "maybe"}], "boolean"),
    ],
)
def test_bad_value(models: dict[str, Path], refused: Callable[..., str], name: str, value: Any, expected: str) -> None:
    message = refused(ParameterError, _pair(models, parameters={name: value}))
    assert f"parameter {name}" in message
    assert expected in message


@pytest.mark.parametrize(
    ("name", "value", "others"),
    [
        ("align", False, ("q_proj", "k_proj")),
        ("rotation", "none", ("q_proj", "k_proj")),
        ("scaling", False, ("q_proj",)),
    ],
)
def test_disagreement_within_a_block(
    models: dict[str, Path], refused: Callable[..., str], name: str, value: Any, others: tuple[str, ...]
) -> None:
    default = {"align": True, "rotation": "exact", "scaling": True}[name]
    setting = [{"filter": "q_proj", "value": value}, {"value": default}]
    message = refused(ParameterError, _pair(models, parameters={name: setting}))
    assert f"parameter {name}" in message
    assert "self_attn.q_proj.weight" in message
    assert message.count("model.layers.0.self_attn") == 2


def test_missing_tensor(models: dict[str, Path], tmp_path: Path, refused: Callable[..., str]) -> None:
    for name in (Q_PROJ, "model.norm.weight"):
        other = _edited(models["b"], tmp_path / name, lambda s, name=name: s.pop(name))
        message = refused(CheckpointError, _pair(models, other))
        assert name in message
        assert str(other) in message


def test_misshapen_tensor(models: dict[str, Path], tmp_path: Path, refused: Callable[..., str]) -> None:
    other = _edited(models["b"], tmp_path / "m", lambda s: s.update({Q_PROJ: s[Q_PROJ][:-1]}))
    message = refused(CheckpointError, _pair(models, other))
    assert Q_PROJ in message
    assert "95 x 48" in message
    assert "96 x 48" in message


def test_biases_that_mergekit_would_drop(models: dict[str, Path], tmp_path: Path) -> None:
    """Its architecture file does not list them, ours does: they are merged."""
    out = merged(_pair(models, models["biased-b"], "biased"), tmp_path / "out")
    biases = {name for name in load(models["biased-b"]) if name.endswith("_proj.bias")}
    assert biases
    assert biases <= out.keys()


def test_a_layer_of_another_kind_than_the_config_says(tmp_path: Path, refused: Callable[..., str]) -> None:
    paths = [save(make_model("qwen3-moe", i), tmp_path / str(i)) for i in range(2)]
    for path in paths:
        file = path / "config.json"
        file.write_text(json.dumps(json.loads(file.read_text("utf-8")) | {"mlp_only_layers": [0]}), "utf-8")
    message = refused(CheckpointError, merge_config("rotation_match", paths[0], [paths[1]]))
    assert "by the model's config this layer does not" in message


def test_surplus_tensor_in_a_layer(models: dict[str, Path], tmp_path: Path, refused: Callable[..., str]) -> None:
    other = _edited(models["b"], tmp_path / "m", lambda s: s.update({"model.layers.0.self_attn.sinks": torch.ones(6)}))
    assert "model.layers.0.self_attn.sinks" in refused(CheckpointError, _pair(models, other))


def test_old_rotary_buffers_are_ignored(models: dict[str, Path], tmp_path: Path) -> None:
    buffer = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8)}
    other = _edited(models["b"], tmp_path / "m", lambda s: s.update(buffer))
    out = merged(_pair(models, other), tmp_path / "out")
    assert not buffer.keys() & out.keys()


@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn])
def test_quantised_tensor(
    models: dict[str, Path], tmp_path: Path, refused: Callable[..., str], dtype: torch.dtype
) -> None:
    other = _edited(models["b"], tmp_path / "m", lambda s: s.update({Q_PROJ: s[Q_PROJ].to(dtype)}))
    message = refused(CheckpointError, _pair(models, other))
    assert Q_PROJ in message
    assert "quantised" in message


def test_quantised_config(models: dict[str, Path], tmp_path: Path, refused: Callable[..., str]) -> None:
    config = {"quantization_config": {"quant_method": "gptq", "bits": 4}}
    other = _edited(models["b"], tmp_path / "m", lambda s: None, **config)
    assert "quantization_config" in refused(CheckpointError, _pair(models, other))


@pytest.mark.parametrize("keep", [-1000, 4])
def test_truncated_shard(models: dict[str, Path], tmp_path: Path, refused: Callable[..., str], keep: int) -> None:
    other = tmp_path / "m"
    make_model("llama", 5).float().save_pretrained(other, max_shard_size="40KB")
    file = sorted(other.glob("*.safetensors"))[-1]
    file.write_bytes(file.read_bytes()[:keep])
    message = refused(CheckpointError, _pair(models, other))
    assert str(file) in message
    assert "Download the file again" in message


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("name", [Q_PROJ, "model.embed_tokens.weight"])
def test_not_finite(models: dict[str, Path], tmp_path: Path, value: float, name: str) -> None:
    def spoil(state: dict[str, torch.Tensor]) -> None:
        state[name][1, 2] = value

    other = _edited(models["b"], tmp_path / "m", spoil)
    with pytest.raises(ValueInTensorError, match="NaN or infinity") as caught:
        merged(_pair(models, other), tmp_path / "out")
    assert name in str(caught.value)
    assert str(other) in str(caught.value)
    assert not (tmp_path / "out" / "config.json").exists()
    assert not list((tmp_path / "out").glob("*.index.json"))


@pytest.mark.parametrize("method", ["rotation_match", "aligned_task_arithmetic"])
def test_single_tensors_of_a_block(method: str) -> None:
    x = {Q_PROJ: torch.ones(2, 2)}
    parameters = {"weight": 1.0}
    with pytest.raises(UnalignedCallError, match=r"q_proj.*mergekit-yaml"):
        merge_state_dicts([x, x], method, base=0, parameters=parameters)
    with pytest.raises(UnalignedCallError, match="without a name"):
        merge_tensors([x[Q_PROJ], x[Q_PROJ]], method, base_index=0, parameters=parameters)
    w = {"w": torch.ones(2, 2)}
    assert torch.equal(merge_state_dicts([w, w], method, base=0, parameters=parameters)["w"], w["w"])
    assert merge_methods.get(method).spec.name == method


def test_raw_pytorch_merge(models: dict[str, Path], tmp_path: Path) -> None:
    from mergekit.options import MergeOptions
    from mergekit.scripts.merge_raw_pytorch import RawPyTorchMergeConfig, plan_flat_merge

    files = [str(models[m] / "model.safetensors") for m in "ab"]
    config = RawPyTorchMergeConfig(
        merge_method="rotation_match", base_model=files[0], models=[{"model": f, "parameters": {}} for f in files]
    )
    with pytest.raises(UnalignedCallError, match="needs the whole block"):
        plan_flat_merge(config, str(tmp_path / "out"), False, False, MergeOptions())
    assert not (tmp_path / "out").exists()


def test_a_task_head_that_mergekit_would_drop(tmp_path: Path, refused: Callable[..., str]) -> None:
    """MergeKit's file for BertForMaskedLM lacks the head's transformation: all models must have it, or none is read."""
    config = BertConfig(vocab_size=31, hidden_size=12, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2)
    for name in "ab":
        BertForMaskedLM(config).save_pretrained(tmp_path / name)
    lacking = _edited(tmp_path / "a", tmp_path / "c", lambda s: s.pop("cls.predictions.transform.dense.weight"))
    message = refused(CheckpointError, merge_config("rotation_match", lacking, [tmp_path / "b"]))
    assert "cls.predictions.transform" in message
    assert "override_architecture" in message


def test_an_expert_that_is_missing(tmp_path: Path, refused: Callable[..., str]) -> None:
    paths = [save(make_model("qwen3-moe", i), tmp_path / str(i)) for i in range(2)]

    def drop(state: dict[str, torch.Tensor]) -> None:
        for part in ("gate_proj", "up_proj", "down_proj"):
            del state[f"model.layers.1.mlp.experts.3.{part}.weight"]

    other = _edited(paths[1], tmp_path / "m", drop)
    message = refused(CheckpointError, merge_config("rotation_match", paths[0], [other]))
    assert "model.layers.1.mlp.experts" in message
    assert "3 x " in message


def test_one_model_without_the_qk_norm_of_the_other(tmp_path: Path, refused: Callable[..., str]) -> None:
    paths = [save(make_model(family, 0), tmp_path / family) for family in ("cohere-qk-norm", "cohere")]
    message = refused(GeometryError, merge_config("rotation_match", paths[0], [paths[1]]))
    assert "q_norm" in message


@pytest.mark.parametrize(
    ("family", "key", "value"),
    [
        ("olmoe", "clip_qkv", 8.0),
        ("deberta-v3", "conv_kernel_size", 3),
        ("bert", "position_embedding_type", "relative_key"),
        ("gpt-neox", "hidden_act", "tanh"),
        ("vit", "hidden_act", "tanh"),
        ("distilbert", "activation", "tanh"),
    ],
)
def test_variants_nobody_checked(
    family: str, key: str, value: object, tmp_path: Path, refused: Callable[..., str]
) -> None:
    paths = [save(make_model(family, i), tmp_path / str(i)) for i in range(2)]
    for path in paths:
        file = path / "config.json"
        file.write_text(json.dumps(json.loads(file.read_text("utf-8")) | {key: value}), "utf-8")
    message = refused(ArchitectureError, merge_config("rotation_match", paths[0], [paths[1]]))
    assert f"config.{key} is {value!r}" in message


def test_neuron_scaling_needs_a_neuron_that_can_be_scaled(tmp_path: Path, refused: Callable[..., str]) -> None:
    paths = [save(make_model("bert", i), tmp_path / str(i)) for i in range(2)]
    config = merge_config("rotation_match", paths[0], [paths[1]], parameters={"neuron_scaling": True})
    assert "BERT has a plain MLP" in refused(ConfigError, config)


def test_anchor_must_be_base_or_consensus(models: dict[str, Path], refused: Callable[..., str]) -> None:
    config = _pair(models, models["b"]) | {"parameters": {"anchor": "median"}}
    message = refused(ParameterError, config)
    assert "parameter anchor" in message
    assert "consensus" in message
