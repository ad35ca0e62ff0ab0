"""gpt-oss through MergeKit: by activations, from a saved alignment, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from conftest import load, merge_config, merged
from models import word_tokenizer
from test_more_families import Twins
from transformers import PreTrainedTokenizerFast

from mergekit_symalign.errors import CheckpointError, ConfigError
from mergekit_symalign.graph import readers


@pytest.fixture(scope="module")
def twins(tmp_path_factory: pytest.TempPathFactory) -> Twins:
    made = Twins("gpt-oss", tmp_path_factory.mktemp("gpt-oss"))
    for path in made.paths:
        word_tokenizer(97).save_pretrained(path)
    return made


def test_by_activations(twins: Twins, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Experts are told by the router with its bias, neurons by what the clamped experts make of gate and up."""
    monkeypatch.setattr(readers, "AutoTokenizer", PreTrainedTokenizerFast)
    words = torch.randint(3, 97, (40, 16), generator=torch.Generator().manual_seed(0)).tolist()
    texts = "\n".join(json.dumps({"text": " ".join(f"w{i}" for i in line)}) for line in words)
    (tmp_path / "p.jsonl").write_text(texts, "utf-8")
    settings = {"objective": "activations", "calibration": str(tmp_path / "p.jsonl")}
    config = merge_config("rotation_match", twins.paths[0], [twins.paths[1]], parameters=settings)
    merged(config, tmp_path / "out")
    twins.require_recovered(tmp_path / "out", spread=1.3)


def test_a_saved_alignment_is_used_again(twins: Twins, tmp_path: Path) -> None:
    config = merge_config("rotation_match", twins.paths[0], [twins.paths[1]])
    first = merged(config | {"parameters": {"save_alignment": str(tmp_path / "saved")}}, tmp_path / "a")
    file = next((tmp_path / "saved").glob("*.safetensors"))
    again = merged(config | {"parameters": {"alignment": str(file)}}, tmp_path / "b")
    assert all(torch.equal(x, again[name]) for name, x in first.items())
    assert not torch.equal(
        first["model.layers.0.self_attn.sinks"], load(twins.paths[1])["model.layers.0.self_attn.sinks"]
    )


def test_a_scale_of_clamped_neurons_is_refused(twins: Twins, tmp_path: Path) -> None:
    config = merge_config("rotation_match", twins.paths[0], [twins.paths[1]], parameters={"neuron_scaling": True})
    with pytest.raises(ConfigError, match="a gated MLP that clamps its up projection, and a scale would change"):
        merged(config, tmp_path / "out")


def test_quantised_checkpoints_are_refused(twins: Twins, tmp_path: Path) -> None:
    """The published ones are in MXFP4."""
    packed = tmp_path / "packed"
    packed.mkdir()
    for file in twins.paths[1].iterdir():
        (packed / file.name).write_bytes(file.read_bytes())
    config = json.loads((packed / "config.json").read_text("utf-8"))
    config["quantization_config"] = {"quant_method": "mxfp4", "modules_to_not_convert": []}
    (packed / "config.json").write_text(json.dumps(config), "utf-8")
    with pytest.raises(CheckpointError, match="the checkpoint is quantised"):
        merged(merge_config("rotation_match", twins.paths[0], [packed]), tmp_path / "out")
    assert not (tmp_path / "out").exists()
