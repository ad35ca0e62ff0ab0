"""Every configuration in examples/ runs, with tiny local models in place of the hub names."""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml
from conftest import load, merged
from mergekit.config import MergeConfiguration
from models import make_model, save, word_tokenizer

EXAMPLES = sorted((Path(__file__).parent.parent / "examples").glob("*.yml"))

LLAMAS = ("llama", "mistral", "qwen2", "qwen3")
FAMILY_OF = {"minilm": "bert", "mixtral": "mixtral"} | {name: name for name in LLAMAS}


def _localised(text: str, folder: Path) -> str:
    """The same configuration on tiny models of the same families, one for each hub name."""
    names = {str(m) for m in MergeConfiguration.model_validate(yaml.safe_load(text)).referenced_models()}
    for seed, name in enumerate(sorted(names, key=len, reverse=True)):  # longest first: some are prefixes of others
        family = next(f for key, f in FAMILY_OF.items() if key in name.lower().replace("-", ""))
        tiny = {"hidden_size": 24, "intermediate_size": 16, "vocab_size": 11}
        model = make_model(family, seed, **({"num_hidden_layers": 32} | tiny if family in LLAMAS else {}))
        path = save(model, folder / name.replace("/", "-"), torch.bfloat16)
        if "objective: activations" in text:
            word_tokenizer(11).save_pretrained(path)
        text = text.replace(name, str(path))
    return text


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda p: p.stem)
def test_example_runs(example: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)  # some write beside their output
    config = yaml.safe_load(_localised(example.read_text(), tmp_path))
    out = merged(config, tmp_path / "out")
    assert all(x.dtype is getattr(torch, config["dtype"]) and torch.isfinite(x).all() for x in out.values())
    assert any(".self_attn." in name or ".attention." in name for name in out)


def test_first_example_through_the_command(
    tmp_path: Path, mergekit_yaml: Callable[..., subprocess.CompletedProcess[str]]
) -> None:
    text = _localised((EXAMPLES[0].parent / "aligned_task_arithmetic.yml").read_text(), tmp_path)
    done = mergekit_yaml(text, tmp_path / "out", "--no-copy-tokenizer")
    assert done.returncode == 0, done.stderr
    assert load(tmp_path / "out")


def test_there_are_examples() -> None:
    assert len(EXAMPLES) >= 6
