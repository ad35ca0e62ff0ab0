"""Optimal transport fusion inside MergeKit: shuffled twins, identical models, several models, refusals."""

from __future__ import annotations

import json
import logging
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from conftest import load, merge_config, merged
from models import FAMILIES, make_model, perturbed, save, word_tokenizer
from transformers import AutoConfig
from transport_twins import shuffled

from mergekit_symalign.errors import ArchitectureError, ConfigError, ParameterError


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
