"""Optimal transport fusion inside MergeKit: shuffled twins, identical models, several models, refusals."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from conftest import load, merge_config, merged
from models import make_model, perturbed, save, with_weights, word_tokenizer
from PIL import Image
from tokenizers.models import WordLevel
from transformers import AutoConfig, ViTImageProcessorPil
from transport_twins import shuffled

from mergekit_symalign.errors import ArchitectureError, CalibrationError, ConfigError, ParameterError, SymalignError
from mergekit_symalign.families.resolve import resolve
from mergekit_symalign.planting import random_elements, transform


def _in_memory(path: Path) -> dict[str, torch.Tensor]:
    """The tensors of a saved model under the names that transformers has for them."""
    config = AutoConfig.from_pretrained(path)
    model = getattr(transformers, config.architectures[0]).from_pretrained(path)
    return dict(model.state_dict())


MOE = ("mixtral", "qwen3-moe", "olmoe")
MERGEABLE = ["llama-tied", "qwen2", "gemma3", "phi3", "gpt2", "gpt-neox", "cohere-qk-norm", "bert-classifier"]
MERGEABLE += ["distilbert", "modernbert", "deberta-v3", "vit-classifier"]  # the rest in tests/test_transport_flow.py


def _pair(tmp_path: Path, family: str, **overrides: Any) -> tuple[Path, Path]:
    anchor = make_model(family, 0, **overrides)
    return save(anchor, tmp_path / "anchor"), save(shuffled(anchor, 1), tmp_path / "twin")


@pytest.mark.parametrize("family", MERGEABLE)
def test_shuffled_twin_fuses_to_the_anchor(family: str, tmp_path: Path) -> None:
    anchor, twin = _pair(tmp_path, family)
    merged(merge_config("ot_fusion", anchor, [anchor, twin]), tmp_path / "out", copy_tokenizer=False)
    out = _in_memory(tmp_path / "out")
    assert all(torch.equal(x, out[name]) for name, x in _in_memory(anchor).items())


@pytest.mark.parametrize(
    ("family", "heads"),
    [("llama", "ignore"), ("gpt2", "ignore"), ("phi2", "ignore"), ("deberta-v3", "ignore"), ("qwen3", "respect")],
)
def test_shuffled_twin_fuses_to_the_anchor_by_activations(family: str, heads: str, tmp_path: Path) -> None:
    anchor, twin = _pair(tmp_path, family)
    config = merge_config("ot_fusion", anchor, [anchor, twin], parameters=_by_activations(tmp_path, heads=heads))
    for path in (anchor, twin):
        word_tokenizer(97).save_pretrained(path)
    out = merged(config, tmp_path / "out")
    for name, x in load(anchor).items():
        torch.testing.assert_close(out[name], x, rtol=0, atol=0 if heads == "ignore" else 1e-4, msg=name)


def _by_activations(tmp_path: Path, **rest: Any) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(0)
    rows = torch.randint(3, 97, (16, 24), generator=generator).tolist()
    (tmp_path / "prompts.txt").write_text("\n".join(" ".join(f"w{i}" for i in row) for row in rows), "utf-8")
    return {"cost": "activations", "calibration": str(tmp_path / "prompts.txt")} | rest


def test_identical_models_fuse_to_the_model(tmp_path: Path) -> None:
    path = save(make_model("llama", 0), tmp_path / "model")
    copies = [path, save(make_model("llama", 0), tmp_path / "copy"), save(make_model("llama", 0), tmp_path / "third")]
    out = merged(merge_config("ot_fusion", path, copies), tmp_path / "out")
    assert all(torch.equal(out[name], x) for name, x in load(path).items())


def test_unlisted_anchor_takes_part_with_weight_one(tmp_path: Path) -> None:
    anchor, other = (save(make_model("llama", seed), tmp_path / str(seed)) for seed in (0, 1))
    unlisted = merged(merge_config("ot_fusion", anchor, [other]), tmp_path / "unlisted")
    listed = merged(merge_config("ot_fusion", anchor, [anchor, other]), tmp_path / "listed")
    assert all(torch.equal(unlisted[name], x) for name, x in listed.items())
    assert not torch.equal(listed["lm_head.weight"], load(anchor)["lm_head.weight"])


def test_weights_are_normalised_like_linear_s(tmp_path: Path) -> None:
    """The fused model is the weighted mean of the anchor and of each model transported alone."""
    anchor = save(make_model("llama", 0), tmp_path / "0")
    near = perturbed(make_model("llama", 0), 0.3, 2)
    models = [save(make_model("llama", 1), tmp_path / "1"), save(shuffled(near, 3), tmp_path / "2")]
    alone = []
    for i, model in enumerate(models):
        listed = [{"model": anchor, "parameters": {"weight": 0.0}}, {"model": model, "parameters": {"weight": 5.0}}]
        alone.append(merged(merge_config("ot_fusion", anchor, listed), tmp_path / f"alone{i}"))
    weights = (2.0, 1.0, 3.0)
    listed = [{"model": m, "parameters": {"weight": w}} for m, w in zip((anchor, *models), weights, strict=True)]
    out = merged(merge_config("ot_fusion", anchor, listed), tmp_path / "out")
    for name, x in load(anchor).items():
        mean = (2 * x.double() + alone[0][name].double() + 3 * alone[1][name].double()) / 6
        torch.testing.assert_close(out[name].double(), mean, rtol=0, atol=1e-6, msg=name)
    for name, x in near.state_dict().items():
        torch.testing.assert_close(alone[1][name], x.float(), rtol=0, atol=1e-6, msg=name)


def test_regularised_transport_tends_to_the_exact_one(tmp_path: Path) -> None:
    anchor, twin = _pair(tmp_path, "llama")
    off = []
    for i, regularization in enumerate((0.12, 0.06, 0.03)):
        config = merge_config("ot_fusion", anchor, [twin], parameters={"regularization": regularization})
        out = merged(config, tmp_path / f"out{i}")
        off.append(max(float((out[name] - x).abs().max()) for name, x in load(anchor).items()))
    assert off[0] > off[1] > off[2]

    assert off[2] < 1e-5


@pytest.mark.parametrize("cost", ["weights", "activations"])
def test_aligned_before_it_is_transported(cost: str, tmp_path: Path) -> None:
    """Rotated values, which no transport can undo, are undone by the alignment; the stream stands as it is."""
    anchor = make_model("llama", 0)
    layout = resolve(anchor.config, model="a test")
    twin = transform(anchor.state_dict(), layout, random_elements(layout, seed=5))
    paths = [save(anchor, tmp_path / "anchor"), save(with_weights(anchor, twin), tmp_path / "twin")]
    for path in paths:
        word_tokenizer(97).save_pretrained(path)
    parameters = _by_activations(tmp_path) if cost == "activations" else {}
    plain, aligned = (
        merged(merge_config(method, paths[0], paths, parameters=parameters), tmp_path / method)
        for method in ("ot_fusion", "aligned_ot_fusion")
    )
    name = "model.layers.1.self_attn.v_proj.weight"
    assert float((plain[name] - anchor.state_dict()[name]).abs().max()) > 0.1
    for name, x in anchor.state_dict().items():
        torch.testing.assert_close(aligned[name], x.float(), rtol=0, atol=1e-4, msg=name)


def test_weighted_residual_lies_between_skip_and_branch(tmp_path: Path) -> None:
    anchor, other = (save(make_model("llama", seed), tmp_path / str(seed)) for seed in (0, 1))
    for path in (anchor, other):
        word_tokenizer(97).save_pretrained(path)
    norm = "model.layers.0.post_attention_layernorm.weight"
    found = {}
    for residual in ("skip", "branch", "weighted"):
        parameters = _by_activations(tmp_path, residual=residual)
        listed = [{"model": anchor, "parameters": {"weight": 0}}, other]
        found[residual] = merged(merge_config("ot_fusion", anchor, listed, parameters=parameters), tmp_path / residual)[
            norm
        ]
    share = (found["weighted"] - found["branch"]) / (found["skip"] - found["branch"])
    share = share[(found["skip"] - found["branch"]).abs() > 0.05]
    assert 0 < float(share.mean()) < 1
    assert float(share.std()) < 1e-3


def test_vocabularies_are_matched_first(tmp_path: Path) -> None:
    """The twin's tokens stand in another order: MergeKit reorders them, then the residual stream is matched."""
    anchor = make_model("llama", 0)
    twin = shuffled(anchor, 1)
    ids = torch.cat((torch.arange(3), torch.randperm(94, generator=torch.Generator().manual_seed(2)) + 3))
    state = {
        name: x[ids] if name in ("model.embed_tokens.weight", "lm_head.weight") else x
        for name, x in twin.state_dict().items()
    }
    paths = [save(anchor, tmp_path / "anchor"), save(with_weights(twin, state), tmp_path / "twin")]
    word_tokenizer(97).save_pretrained(paths[0])
    tokenizer = word_tokenizer(97)
    vocabulary = {"<unk>": 0, "<s>": 1, "</s>": 2} | {f"w{int(i)}": at for at, i in enumerate(ids) if at > 2}
    tokenizer.backend_tokenizer.model = WordLevel(vocabulary, unk_token="<unk>")
    tokenizer.save_pretrained(paths[1])
    config = merge_config("ot_fusion", paths[0], paths, tokenizer={"source": "base"})
    out = merged(config, tmp_path / "out", copy_tokenizer=True)
    for name, x in load(paths[0]).items():
        torch.testing.assert_close(out[name], x, rtol=0, atol=1e-6, msg=name)


REFUSED: list[tuple[dict[str, Any], type[SymalignError], str]] = [
    ({"regularization": -0.1}, ParameterError, r"regularization: it cannot be -0.1"),
    ({"regularization": float("inf")}, ParameterError, r"regularization: it cannot be inf"),
    ({"regularization": "much"}, ParameterError, "regularization"),
    ({"residual": "both"}, ParameterError, "residual"),
    ({"residual": "weighted"}, ParameterError, "weighted needs to know how large activations are"),
    ({"cost": "outputs"}, ParameterError, "cost"),
    ({"heads": True}, ParameterError, "heads"),
    ({"cost": "activations"}, CalibrationError, "cost: activations compares what models do on prompts"),
    ({"weight": 0.0}, ParameterError, "weights of all models together are not positive"),
    ({"regularisation": 0.1}, ParameterError, "Did you mean regularization"),
    ({"residual": [{"filter": "q_proj", "value": "skip"}, {"value": "mean"}]}, ParameterError, "transported together"),
    ({"cost": [{"filter": "layers.1", "value": "activations"}, {"value": "weights"}]}, ParameterError, "cost"),
]


@pytest.mark.parametrize(("parameters", "error", "message"), REFUSED, ids=lambda x: str(x)[:30])
def test_bad_parameters_are_refused_by_name(
    parameters: dict[str, Any], error: type[SymalignError], message: str, tmp_path: Path
) -> None:
    paths = [save(make_model("llama", seed), tmp_path / str(seed)) for seed in (0, 1)]
    with pytest.raises(error, match=message):
        merged(merge_config("ot_fusion", paths[0], paths, parameters=parameters), tmp_path / "out")
    assert not list(tmp_path.glob("out/*.safetensors"))


@pytest.mark.parametrize("family", MOE)
def test_experts_are_refused_by_name(family: str, tmp_path: Path) -> None:
    paths = [save(make_model(family, seed), tmp_path / str(seed)) for seed in (0, 1)]
    with pytest.raises(ArchitectureError, match="has experts, and optimal transport fusion knows no routers"):
        merged(merge_config("ot_fusion", paths[0], paths), tmp_path / "out")


def test_vision_models_are_compared_on_images(tmp_path: Path) -> None:
    anchor, twin = _pair(tmp_path, "vit-classifier")
    generator = torch.Generator().manual_seed(0)
    (tmp_path / "images").mkdir()
    for i in range(16):
        pixels = torch.randint(256, (16, 16, 3), generator=generator, dtype=torch.uint8)
        Image.fromarray(pixels.numpy()).save(tmp_path / "images" / f"{i}.png")
    for path in (anchor, twin):
        ViTImageProcessorPil(size={"height": 16, "width": 16}).save_pretrained(path)
    parameters = {"cost": "activations", "calibration": str(tmp_path / "images")}
    merged(merge_config("ot_fusion", anchor, [anchor, twin], parameters=parameters), tmp_path / "out")
    out = _in_memory(tmp_path / "out")
    assert all(torch.equal(x, out[name]) for name, x in _in_memory(anchor).items())
    with pytest.raises(CalibrationError, match=r"cost: activations compares what models do, and .* reads images"):
        merged(merge_config("ot_fusion", anchor, [twin], parameters={"cost": "activations"}), tmp_path / "none")


def test_no_anchor_is_refused(tmp_path: Path) -> None:
    paths = [save(make_model("llama", seed), tmp_path / str(seed)) for seed in (0, 1)]
    with pytest.raises(ConfigError, match="ot_fusion transports every model to base_model, but none is given"):
        merged(merge_config("ot_fusion", None, paths), tmp_path / "out")


def test_slices_out_of_order_are_refused(tmp_path: Path) -> None:
    paths = [save(make_model("llama", seed), tmp_path / str(seed)) for seed in (0, 1)]
    slices = []
    for ranges in (((0, 2), (0, 2)), ((2, 3), (1, 2))):
        sources = [{"model": str(p), "layer_range": list(r)} for p, r in zip(paths, ranges, strict=True)]
        slices.append({"sources": sources})
    config = {"merge_method": "ot_fusion", "base_model": str(paths[0]), "slices": slices, "dtype": "float32"}
    with pytest.raises(ConfigError, match="optimal transport flows through all layers of whole models"):
        merged(config, tmp_path / "out")


def test_without_pot_it_is_refused_before_any_model_is_opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mergekit_symalign.graph.config_checks.find_spec", lambda name: None)
    for method in ("ot_fusion", "aligned_ot_fusion"):
        config = merge_config(method, tmp_path / "no such model", [tmp_path / "nor this one"])
        with pytest.raises(ConfigError, match=r"pip install 'mergekit-symalign\[ot\]'"):
            merged(config, tmp_path / "out")


def test_report_card_and_log_say_that_the_function_is_not_kept(
    tmp_path: Path, mergekit_yaml: Callable[..., subprocess.CompletedProcess[str]]
) -> None:
    paths = [save(make_model("llama", seed), tmp_path / str(seed)) for seed in (0, 1)]
    config = merge_config("ot_fusion", paths[0], paths, parameters={"regularization": 0.06})
    done = mergekit_yaml(config, tmp_path / "out", "--no-copy-tokenizer")
    assert done.returncode == 0, done.stderr
    said = "optimal transport mixes and reorders units without keeping what a model computes"
    assert said in done.stdout + done.stderr
    report = json.loads((tmp_path / "out" / "symalign_report.json").read_text("utf-8"))
    assert report["exact"] is False
    assert report["inexact_because"] == [said]
    assert report["settings"]["regularization"] == 0.06
    told = report["tensors"][f"layer 1 of {paths[1]}"]
    assert 0 < told["mlp_neurons_cost_after"] < told["mlp_neurons_cost_before"] < 1
    card = (tmp_path / "out" / "README.md").read_text("utf-8")
    assert said in card
    assert "2310.05719" in card
