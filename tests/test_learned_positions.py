"""Prompts that are longer than a model's learned positions are refused before anything runs."""

from __future__ import annotations

from pathlib import Path

import pytest
from click.testing import CliRunner
from conftest import merge_config, merged
from models import make_model, save, word_tokenizer
from transformers import PreTrainedTokenizerFast

from mergekit_symalign.cli import main
from mergekit_symalign.errors import CalibrationError
from mergekit_symalign.graph import readers

MODELS = {
    "gpt2": {"max_position_embeddings": 16},
    "bert-classifier": {"max_position_embeddings": 16},
    "roberta": {"max_position_embeddings": 18, "pad_token_id": 1},  # positions begin after the padding's index
}


@pytest.fixture(autouse=True)
def _tokenizers_as_saved(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(readers, "AutoTokenizer", PreTrainedTokenizerFast)


def _models(family: str, folder: Path) -> list[Path]:
    found = [save(make_model(family, i, **MODELS[family]), folder / str(i)) for i in range(2)]
    for path in found:
        word_tokenizer(97).save_pretrained(path)
    return found


@pytest.mark.parametrize("family", MODELS)
def test_a_merge_by_activations(family: str, tmp_path: Path) -> None:
    """17 tokens are one too many for 16 positions; cut to 16 they run."""
    anchor, model = _models(family, tmp_path)
    file = tmp_path / "prompts.txt"
    file.write_text(" ".join(f"w{i}" for i in range(5, 22)), "utf-8")
    settings = {"objective": "activations", "calibration": str(file)}
    with pytest.raises(CalibrationError, match="a prompt has 17 tokens, but the model has learned positions for 16"):
        merged(merge_config("rotation_match", anchor, [model], parameters=settings), tmp_path / "out")
    assert not (tmp_path / "out").exists()
    settings |= {"calibration_sequence_length": 16}
    assert merged(merge_config("rotation_match", anchor, [model], parameters=settings), tmp_path / "out")


def test_measure(tmp_path: Path) -> None:
    model, _ = _models("gpt2", tmp_path)
    (tmp_path / "prompts.txt").write_text(" ".join(f"w{i}" for i in range(5, 22)), "utf-8")
    out = tmp_path / "found.safetensors"
    command = ["measure", str(model), "--calibration", str(tmp_path / "prompts.txt"), "-o", str(out)]
    refused = CliRunner().invoke(main, [*command, "--quiet"])
    assert refused.exit_code == 2
    assert "learned positions for 16 only" in refused.output
    assert not out.exists()
    done = CliRunner().invoke(main, [*command, "--quiet", "--sequence-length", "16"])
    assert done.exit_code == 0, done.output
