"""A refusal says what MergeKit's own merge would do with the checkpoint, and what is supported; no more than that."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from conftest import merge_config, merged
from mergekit.config import MergeConfiguration
from mergekit.merge import run_merge
from mergekit.options import MergeOptions
from models import SIZES, make_model, save
from transformers import AutoModelForCausalLM

from mergekit_symalign.cli import main
from mergekit_symalign.errors import ArchitectureError
from mergekit_symalign.families.known import OTHERWISE
from mergekit_symalign.families.resolve import resolve, supported_architectures
from mergekit_symalign.trial.models import class_of, randomise

# Class -> its config beyond the sizes, and what is lost if MergeKit merges it.
REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "GemmaForCausalLM": ({}, "drop 1 tensor (lm_head.weight): its output would be incomplete"),
    "PhiForCausalLM": (
        {"qk_layernorm": True, "head_dim": 8},
        "self_attn.k_layernorm.bias",
    ),
    "LagunaForCausalLM": ({"num_experts": 4, "layer_types": ["full_attention"] * 2}, "mlp.experts.0.down_proj.weight"),
    "BitNetForCausalLM": ({}, "merge all its tensors"),
}


def _saved(name: str, settings: dict[str, Any], folder: Path) -> Path:
    kind, known = class_of(name), {"num_hidden_layers": 2, "pad_token_id": 0}
    model = kind._from_config(kind.config_class(**SIZES | known | settings, architectures=[name]))
    return save(randomise(model.double(), 0), folder)


def _plainly(path: Path, out: Path) -> None:
    config = {"merge_method": "linear", "models": [{"model": str(path), "parameters": {"weight": 1.0}}]}
    options = MergeOptions(copy_tokenizer=False, quiet=True, write_model_card=False)
    run_merge(MergeConfiguration.model_validate(config), str(out), options)


def _lost(path: Path, out: Path) -> bool:
    """Whether a model differs from MergeKit's own merge of it alone."""
    _plainly(path, out)
    one, other = (AutoModelForCausalLM.from_pretrained(folder).state_dict() for folder in (path, out))
    return not all(torch.equal(x, other[name]) for name, x in one.items())


@pytest.mark.parametrize("name", REFUSED)
def test_a_refusal_knows_what_a_plain_merge_would_lose(tmp_path: Path, name: str) -> None:
    settings, message = REFUSED[name]
    path = _saved(name, settings, tmp_path / "a")
    with pytest.raises(ArchitectureError) as refused:
        merged(merge_config("rotation_match", path, [path]), tmp_path / "out")
    assert message in str(refused.value)
    assert not (tmp_path / "out").exists()
    assert _lost(path, tmp_path / "plain") == ("would drop" in refused.value.remedy)


def test_commands_refuse_in_the_same_words(tmp_path: Path) -> None:
    path = _saved("GemmaForCausalLM", {}, tmp_path / "a")
    for command in ("inspect", "verify", "barrier", "solve"):
        (tmp_path / "text").write_text("a", "utf-8")
        more = {"solve": ["-o", str(tmp_path / "x.safetensors")], "barrier": ["--text", str(tmp_path / "text")]}
        done = CliRunner().invoke(main, [command, str(path), str(path), *more.get(command, ())])
        assert done.exit_code == 2, done.output
        assert "drop 1 tensor (lm_head.weight)" in " ".join(done.output.split())


def test_without_files_a_refusal_says_that_nothing_is_known() -> None:
    config = make_model("llama", 0).config
    config.architectures = ["LlamaForMagic"]
    with pytest.raises(ArchitectureError) as refused:
        resolve(config, model="m")
    assert refused.value.remedy.endswith(OTHERWISE)


def test_an_unsupported_architecture_is_refused_in_a_few_words() -> None:
    config = make_model("llama", 0).config
    config.architectures = ["LlamaForCausalLMs"]
    with pytest.raises(
        ArchitectureError, match=r"nearest by name LlamaForCausalLM or .*mergekit-symalign families"
    ) as e:
        resolve(config, model="m")
    assert len(str(e.value)) < 500
    assert f"{len(supported_architectures())} classes" in str(e.value)


def test_the_supported_classes_are_listed() -> None:
    every = CliRunner().invoke(main, ["families"]).output.splitlines()
    assert [line.split()[0] for line in every] == list(supported_architectures())
    some = CliRunner().invoke(main, ["families", "LLAVA"]).output.splitlines()
    assert 1 < len(some) < len(every)
    assert any(line.startswith("LlavaForConditionalGeneration ") for line in some)
