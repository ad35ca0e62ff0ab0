"""Models of one architecture whose configs say something else of the same weights: told, recorded, kept or refused."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from click.testing import CliRunner
from conftest import merge_config, merged
from models import FAMILIES, SIZES, logits, make_model, perturbed, relative_deviation, save, with_weights
from transformers import AutoModelForCausalLM, PreTrainedModel

from mergekit_symalign.cli import main
from mergekit_symalign.errors import CheckpointError, ConfigError, GeometryError
from mergekit_symalign.families.function import config_differences
from mergekit_symalign.families.resolve import resolve
from mergekit_symalign.planting import random_elements, transform

LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
LLAMA3 |= {"original_max_position_embeddings": 16}
ROPE = "rope_parameters."
TOLERANCE = 1000 * torch.finfo(torch.float32).eps  # weights are rounded once; three sharp layers enlarge that
DYNAMIC = {"rope_type": "dynamic", "factor": 2.0}


def config(family: str, **own: Any) -> Any:
    name, of_family = FAMILIES[family]
    sizes = {key: value for key, value in (SIZES | of_family).items() if value is not None}
    return getattr(transformers, name).config_class(**sizes | own, architectures=[name])


def differences(family: str, anchor: dict[str, Any], model: dict[str, Any], other: str | None = None) -> set[str]:
    one, two = config(family, **anchor), config(other or family, **model)
    return set(config_differences(one, two, resolve(one, model="m")))


@pytest.mark.parametrize(
    ("family", "own", "keys"),
    [
        ("llama", {"rope_theta": 5e5}, {"rope_parameters.rope_theta"}),
        ("llama", {"rope_scaling": DYNAMIC, "rope_theta": 1e4}, {ROPE + "rope_type", ROPE + "factor"}),
        ("llama", {"rms_norm_eps": 1e-3}, {"rms_norm_eps"}),
        ("gemma2", {"attn_logit_softcapping": 9.0}, {"attn_logit_softcapping"}),
        ("gemma2", {"final_logit_softcapping": 9.0}, {"final_logit_softcapping"}),
        ("gemma2", {"query_pre_attn_scalar": 4}, {"query_pre_attn_scalar"}),
        ("gemma3", {"sliding_window_pattern": 3}, {"layer_types"}),
        ("granite", {"logits_scaling": 3.0, "attention_multiplier": 2.0}, {"logits_scaling", "attention_multiplier"}),
        ("granite", {"embedding_multiplier": 3.0}, {"embedding_multiplier"}),
        ("granite", {"residual_multiplier": 2.0}, {"residual_multiplier"}),
        ("mistral", {"sliding_window": None}, {"sliding_window"}),
        ("qwen2", {"use_sliding_window": True, "max_window_layers": 1}, {"layer_types", "sliding_window"}),
        ("cohere", {"logit_scale": 2.0, "layer_norm_eps": 1e-3}, {"logit_scale", "layer_norm_eps"}),
        ("mixtral", {"num_experts_per_tok": 1}, {"num_experts_per_tok"}),
        ("qwen3-moe", {"norm_topk_prob": True}, {"norm_topk_prob"}),
        ("gpt2", {"activation_function": "relu"}, {"activation_function"}),
        ("gpt2", {"scale_attn_by_inverse_layer_idx": True}, {"scale_attn_by_inverse_layer_idx"}),
        ("gpt2", {"scale_attn_weights": False}, {"scale_attn_weights"}),
        ("gpt2", {"layer_norm_epsilon": 1e-3}, {"layer_norm_epsilon"}),
        ("gpt-neox", {"use_parallel_residual": False}, {"use_parallel_residual"}),
        ("bert", {"hidden_act": "relu", "layer_norm_eps": 1e-3}, {"hidden_act", "layer_norm_eps"}),
        ("roberta", {"pad_token_id": 3}, {"pad_token_id"}),  # its positions begin behind it
        ("modernbert", {"local_attention": 4}, {"local_attention"}),
        ("deberta-v3", {"position_buckets": 4}, {"position_buckets"}),  # a key that the config class does not declare
        ("smollm3", {"no_rope_layers": [1, 1, 1]}, {"no_rope_layers"}),
    ],
)  # fmt: skip
def test_what_changes_the_function_counts(family: str, own: dict[str, Any], keys: set[str]) -> None:
    found = differences(family, {}, own)
    assert keys <= found
    assert not {key for key in found if key not in keys and not key.startswith("rope_parameters.max")}
    assert differences(family, own, own) == set()


@pytest.mark.parametrize(
    ("family", "own"),
    [
        ("llama", {"rope_theta": 10000, "rope_scaling": None, "pretraining_tp": 2, "partial_rotary_factor": 1.0}),
        ("llama", {"max_position_embeddings": 64, "bos_token_id": 7, "eos_token_id": [2, 3], "use_cache": False}),
        ("llama", {"attention_dropout": 0.5, "initializer_range": 0.5, "dtype": "bfloat16", "unsloth_fixed": True}),
        ("llama", {"vocab_size": 50, "rope_scaling": {"rope_type": "default", "factor": 8.0}, "auto_map": {"a": "b"}}),
        ("llama", {"tie_word_embeddings": True}),  # the merge writes a head of its own
        ("qwen2", {"max_window_layers": 1, "sliding_window": 20}),  # use_sliding_window is false
        ("gemma3", {"layer_types": ["sliding_attention", "full_attention", "sliding_attention"]}),  # as by default
        ("gemma", {"use_bidirectional_attention": False}),
        ("gpt2", {"n_ctx": 33, "attn_pdrop": 0.5, "summary_type": "mean", "rope_theta": 5.0}),
        ("bert", {"hidden_dropout_prob": 0.5, "tie_word_embeddings": False, "pad_token_id": 3}),
        ("phi3", {"rope_scaling": {"rope_type": "default"}, "embd_pdrop": 0.5}),
        ("mixtral", {"router_aux_loss_coef": 0.5, "router_jitter_noise": 0.5, "output_router_logits": True}),
        ("vit", {"attention_probs_dropout_prob": 0.5}),
    ],
)  # fmt: skip
def test_what_does_not_change_it_does_not_count(family: str, own: dict[str, Any]) -> None:
    assert differences(family, {}, own) == set()
    assert differences(family, {}, {}) == set()


def test_lengths_count_where_rope_reads_them() -> None:
    scaled = {"rope_scaling": DYNAMIC}
    assert differences("llama", scaled, scaled | {"max_position_embeddings": 64}) == {
        "rope_parameters.max_position_embeddings"
    }
    fixed = {"rope_scaling": LLAMA3}
    assert differences("llama", fixed, fixed | {"max_position_embeddings": 64}) == set()


def test_architectures_of_one_family_are_compared_too() -> None:
    assert differences("llama", {}, {}, "mistral") == {"sliding_window"}
    assert differences("mistral", {}, {}, "llama") == {"sliding_window"}
    assert differences("mistral", {"sliding_window": None}, {}, "llama") == set()


def test_a_tied_anchor_drops_the_models_own_head() -> None:
    assert differences("llama", {"tie_word_embeddings": True}, {}) == {"tie_word_embeddings"}


def pair(family: str, folder: Path, **own: Any) -> tuple[Path, Path, PreTrainedModel]:
    """An anchor, and a twin of its near sibling that has another config; the twin as a model too."""
    anchor = make_model(family, 0)
    relative = perturbed(anchor, 0.1, 1)
    layout = resolve(anchor.config, model="m")
    state = transform(relative.state_dict(), layout, random_elements(layout, 3))
    twin = make_model(family, 0, **own)
    twin.load_state_dict(state | {name: x for name, x in twin.state_dict().items() if name not in state})
    return save(anchor, folder / "anchor"), save(twin, folder / "twin"), twin


OTHER_FUNCTIONS: dict[str, tuple[str, dict[str, Any]]] = {
    "theta": ("llama", {"rope_theta": 100.0}),
    "llama3": ("llama", {"rope_scaling": LLAMA3, "rope_theta": 1e4}),
    "multipliers": ("granite", {"residual_multiplier": 0.9, "logits_scaling": 1.0, "attention_multiplier": 0.3}),
    "soft cap and window": ("gemma2", {"attn_logit_softcapping": 20.0, "sliding_window": 4}),
    "activation": ("gpt2", {"activation_function": "relu"}),
    "padding": ("roberta", {"pad_token_id": 5}),
    "experts": ("mixtral", {"num_experts_per_tok": 1}),
}


@pytest.mark.parametrize("name", OTHER_FUNCTIONS)
def test_one_model_alone_keeps_its_own_config(name: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """What comes out computes what the model computed, and neither the plan nor the report say otherwise."""
    family, own = OTHER_FUNCTIONS[name]
    anchor, twin, model = pair(family, tmp_path, **own)
    with caplog.at_level(logging.WARNING):
        merged(merge_config("rotation_match", anchor, [twin]), tmp_path / "out")
    assert not [r for r in caplog.records if r.name.startswith("mergekit_symalign")]
    report = json.loads((tmp_path / "out" / "symalign_report.json").read_text("utf-8"))
    assert report["exact"] is True
    assert report["config"] == str(twin)
    assert report["config_differences"][str(twin)]
    out = type(model).from_pretrained(tmp_path / "out", dtype=torch.float32, experts_implementation="eager").double()
    before, after = logits(model), logits(out)
    assert relative_deviation(before, after) < TOLERANCE
    with_anchors_config = with_weights(make_model(family, 0), out.state_dict())
    assert relative_deviation(before, logits(with_anchors_config)) > 100 * TOLERANCE  # the test can fail


@pytest.mark.parametrize("name", ["theta", "activation"])
def test_a_merge_with_the_anchor_says_what_differs(name: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    family, own = OTHER_FUNCTIONS[name]
    anchor, twin, _ = pair(family, tmp_path, **own)
    with caplog.at_level(logging.WARNING):
        config = merge_config("rotation_match", anchor, [anchor, twin])
        merged(config, tmp_path / "out", write_model_card=True)
    (said,) = [r.getMessage() for r in caplog.records if r.name.startswith("mergekit_symalign")]
    report = json.loads((tmp_path / "out" / "symalign_report.json").read_text("utf-8"))
    assert report["exact"] is False
    assert report["config"] == str(anchor)
    found = report["config_differences"][str(twin)]
    for key, (a, b) in found.items():
        assert f"{key} is {a!r} in the anchor and {b!r} in the model" in said
        assert key in " ".join(report["inexact_because"])
    assert "runs with the anchor's" in said
    card = (tmp_path / "out" / "README.md").read_text("utf-8")
    assert "**Not exact**" in card
    assert next(iter(found)) in card
    assert "`rotation: full`" not in card
    after, before = (json.loads((path / "config.json").read_text("utf-8")) for path in (tmp_path / "out", anchor))
    assert {key: value for key, value in after.items() if before.get(key) != value} == {
        "dtype": "float32"
    } or after == before


def test_a_weight_of_zero_takes_no_part(tmp_path: Path) -> None:
    anchor, twin, model = pair("llama", tmp_path, rope_theta=100.0)
    models = [{"model": anchor, "parameters": {"weight": 0.0}}, {"model": twin, "parameters": {"weight": 1.0}}]
    merged(merge_config("aligned_linear", anchor, models), tmp_path / "out")
    out = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32).double()
    assert relative_deviation(logits(model), logits(out)) < TOLERANCE


def test_a_head_of_its_own_is_kept_with_its_config(tmp_path: Path) -> None:
    """The anchor's config ties embedding and head: with it the model's own head would be ignored."""
    anchor, twin, model = pair("llama", tmp_path, tie_word_embeddings=False)
    tied = save(make_model("llama", 0, tie_word_embeddings=True), tmp_path / "tied")
    merged(merge_config("rotation_match", tied, [twin]), tmp_path / "out")
    out = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32).double()
    assert relative_deviation(logits(model), logits(out)) < TOLERANCE
    merged(merge_config("rotation_match", tied, [tied, twin]), tmp_path / "both")
    assert json.loads((tmp_path / "both" / "symalign_report.json").read_text("utf-8"))["exact"] is False
    assert anchor.exists()


def test_tokens_stay_the_anchors(tmp_path: Path) -> None:
    """MergeKit copies the anchor's tokenizer; lengths are the model's."""
    anchor, twin, _ = pair("llama", tmp_path, eos_token_id=9, max_position_embeddings=64, rope_theta=100.0)
    merged(merge_config("rotation_match", anchor, [twin]), tmp_path / "out")
    out, before = (json.loads((path / "config.json").read_text("utf-8")) for path in (tmp_path / "out", anchor))
    assert out["eos_token_id"] == before["eos_token_id"]
    assert out["max_position_embeddings"] == 64


def test_other_activations_have_other_symmetries(tmp_path: Path) -> None:
    """A factor passes ReLU and not GELU, whichever of the two is the anchor."""
    relu, gelu = (
        save(make_model("gpt2", seed, activation_function=name), tmp_path / name)
        for seed, name in enumerate(("relu", "gelu_new"))
    )
    for anchor, model in ((relu, gelu), (gelu, relu)):
        with pytest.raises(ConfigError, match="neuron_scaling"):
            merged(
                merge_config("rotation_match", anchor, [model], parameters={"neuron_scaling": True}), tmp_path / "out"
            )
        assert not (tmp_path / "out" / "config.json").exists()
    other = save(make_model("gpt2", 2, activation_function="relu"), tmp_path / "other")
    merged(merge_config("rotation_match", relu, [other], parameters={"neuron_scaling": True}), tmp_path / "out")


@pytest.mark.parametrize(
    ("family", "own"),
    [
        ("smollm3", {"no_rope_layers": [1, 1, 0]}),
        ("gpt-neox", {"rotary_pct": 0.25}),
        ("phi2", {"partial_rotary_factor": 1.0}),
        ("cohere2", {"layer_types": ["full_attention", "sliding_attention", "sliding_attention"]}),
    ],
)
def test_other_positions_are_refused(family: str, own: dict[str, Any], tmp_path: Path) -> None:
    paths = [save(make_model(family, 0, **of), tmp_path / name) for name, of in (("anchor", {}), ("model", own))]
    for anchor, model in (paths, paths[::-1]):
        with pytest.raises(GeometryError, match="RoPE"):
            merged(merge_config("rotation_match", anchor, [model]), tmp_path / "out")
        assert not (tmp_path / "out" / "config.json").exists()


@pytest.mark.parametrize(
    ("family", "own"),
    [("cohere", {"use_qk_norm": True}), ("stablelm", {"use_qkv_bias": False}), ("granite", {"mlp_bias": False})],
)
def test_other_norms_and_biases_are_refused(family: str, own: dict[str, Any], tmp_path: Path) -> None:
    paths = [save(make_model(family, 0, **of), tmp_path / name) for name, of in (("anchor", {}), ("model", own))]
    for anchor, model in (paths, paths[::-1]):
        with pytest.raises((GeometryError, CheckpointError), match=r"norm|bias"):
            merged(merge_config("rotation_match", anchor, [model]), tmp_path / "out")
        assert not (tmp_path / "out" / "config.json").exists()


def test_a_task_vector_of_another_function(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    anchor, twin, _ = pair("llama", tmp_path, rope_theta=100.0)
    merged(
        merge_config("aligned_task_arithmetic", anchor, [{"model": twin, "parameters": {"weight": 1.0}}]),
        tmp_path / "out",
    )
    assert "rope_parameters.rope_theta" in caplog.text
    report = json.loads((tmp_path / "out" / "symalign_report.json").read_text("utf-8"))
    assert (report["exact"], report["config"]) == (False, str(anchor))


def test_the_code_of_every_family_is_found() -> None:
    """Otherwise every key of a config would count, also those that nothing reads."""
    for family in FAMILIES:
        assert differences(family, {}, {"a_note_of_mine": 3}) == set(), family


def test_inspect_says_it_before_the_table(tmp_path: Path) -> None:
    anchor, twin, _ = pair("llama", tmp_path, rope_theta=100.0, rms_norm_eps=1e-3)
    file = tmp_path / "numbers.json"
    done = CliRunner().invoke(main, ["inspect", str(anchor), str(twin), "--layers", "0", "--json", str(file)])
    assert done.exit_code == 0, done.output
    said = done.stdout.index("rope_parameters.rope_theta is 10000.0 in the anchor and 100.0 in the model")
    assert said < done.stdout.index("layer block")
    assert "rms_norm_eps" in done.stdout
    assert json.loads(file.read_text("utf-8"))["config_differences"][str(twin)]["rms_norm_eps"] == [1e-6, 1e-3]
    other = save(make_model("llama", 1), tmp_path / "other")
    plain = CliRunner().invoke(main, ["inspect", str(anchor), str(other), "--layers", "0"])
    assert plain.exit_code == 0, plain.output
    assert "config" not in plain.stdout
