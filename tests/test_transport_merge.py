"""Optimal transport fusion inside MergeKit: shuffled twins, identical models, several models, refusals."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from conftest import load, merge_config, merged
from models import FAMILIES, make_model, perturbed, save, with_weights, word_tokenizer
from transformers import AutoConfig
from transport_twins import shuffled

from mergekit_symalign.families.resolve import resolve
from mergekit_symalign.planting import random_elements, transform


def _in_memory(path: Path) -> dict[str, torch.Tensor]:
    """The tensors of a saved model under the names that transformers has for them."""
    config = AutoConfig.from_pretrained(path)
    model = getattr(transformers, config.architectures[0]).from_pretrained(path)
    return dict(model.state_dict())


MOE = ("mixtral", "qwen3-moe", "olmoe")
MERGEABLE = [family for family in FAMILIES if family not in MOE]


def _pair(tmp_path: Path, family: str, **overrides: Any) -> tuple[Path, Path]:
    anchor = make_model(family, 0, **overrides)
    return save(anchor, tmp_path / "anchor"), save(shuffled(anchor, 1), tmp_path / "twin")


@pytest.mark.parametrize("family", MERGEABLE)
def test_shuffled_twin_fuses_to_the_anchor(family: str, tmp_path: Path) -> None:
    anchor, twin = _pair(tmp_path, family)
    merged(merge_config("ot_fusion", anchor, [anchor, twin]), tmp_path / "out", copy_tokenizer=False)
    out = _in_memory(tmp_path / "out")
    assert all(torch.equal(x, out[name]) for name, x in _in_memory(anchor).items())


@pytest.mark.parametrize("family", ["llama", "qwen3", "gpt2", "bert", "phi2", "gemma2", "deberta-v3", "cohere-qk-norm"])
@pytest.mark.parametrize("heads", ["ignore", "respect"])
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
