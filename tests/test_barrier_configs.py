"""barrier: models whose configs say something else of the same weights, each under its own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner, Result
from models import make_model, save, with_weights, word_tokenizer
from transformers import AutoModelForCausalLM, PreTrainedModel

from mergekit_symalign.cli import main

WORDS = word_tokenizer(97)


def command(*args: Any) -> Result:
    return CliRunner().invoke(main, ["barrier", *map(str, args)])


def _saved(model: PreTrainedModel, path: Path) -> Path:
    WORDS.save_pretrained(save(model, path))
    return path


def _loss(model: PreTrainedModel, text: Path) -> float:
    ids = [WORDS(line, return_tensors="pt")["input_ids"] for line in text.read_text("utf-8").splitlines()]
    with torch.no_grad():
        return sum(float(model.eval()(x, labels=x).loss) for x in ids) / len(ids)


def _rows(output: str) -> list[list[float]]:
    return [[float(x) for x in line.split()] for line in output.splitlines() if line.strip()[:1].isdigit()]


@pytest.fixture
def text(tmp_path: Path) -> Path:
    file = tmp_path / "text.txt"
    file.write_text("\n".join(" ".join(f"w{3 + (i * i + 5 * j) % 90}" for j in range(16)) for i in range(3)), "utf-8")
    return file


@pytest.mark.parametrize(
    ("a", "b", "own", "said"),
    [
        ("llama", "llama", {"rope_theta": 50.0}, "rope_theta is 10000.0 in A and 50.0 in B"),
        ("llama", "mistral", {"sliding_window": 3}, "sliding_window is None in A and 3 in B"),
        ("granite", "granite", {"logits_scaling": 5.0}, "logits_scaling is 2.0 in A and 5.0 in B"),
        ("llama", "llama", {"tie_word_embeddings": True}, ""),
        ("llama-tied", "llama-tied", {"tie_word_embeddings": False}, "tie_word_embeddings is True in A and False in B"),
    ],
)
def test_each_end_is_what_the_model_gives(
    a: str, b: str, own: dict[str, Any], said: str, text: Path, tmp_path: Path
) -> None:
    paths = [_saved(make_model(a, 0), tmp_path / "a"), _saved(make_model(b, 1, **own), tmp_path / "b")]
    done = command(*paths, "--text", text, "--points", 3, "--quiet")
    assert done.exit_code == 0, done.output
    assert said in done.stdout
    assert ("configs differ" in done.stdout) is bool(said)
    one, other = (AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32) for path in paths)
    first, middle, last = _rows(done.stdout)
    for column in (1, 2):
        assert first[column] == pytest.approx(_loss(one, text), abs=2e-4)
        assert last[column] == pytest.approx(_loss(other, text), abs=2e-4)
    between = {name: (x + other.state_dict()[name]) / 2 for name, x in one.state_dict().items()}
    if one.config.tie_word_embeddings:
        between["lm_head.weight"] = between["model.embed_tokens.weight"]
    half = with_weights(one, between)
    assert middle[1] == pytest.approx(_loss(half, text), abs=2e-4)


def test_text_without_a_next_token(text: Path, tmp_path: Path) -> None:
    paths = [_saved(make_model("llama", seed), tmp_path / str(seed)) for seed in range(2)]
    text.write_text("w5\nw6\n", "utf-8")
    done = command(*paths, "--text", text)
    assert done.exit_code == 2
    assert "there is no next token to predict" in " ".join(done.output.split())
