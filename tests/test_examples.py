"""Every configuration in examples/ runs, with tiny local models in place of the hub names."""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml
from click.testing import CliRunner
from conftest import OFFLINE, load, merged
from mergekit.config import MergeConfiguration
from models import make_model, save, word_tokenizer
from more_models import more_model
from processes import run_command
from text_models import text_model
from transformers import PreTrainedModel
from whole_statistics import measure

from mergekit_symalign.cli import main

FOLDER = Path(__file__).parent.parent / "examples"
EXAMPLES = sorted(FOLDER.glob("*.yml"))
STAGED = sorted(FOLDER.glob("multi/*.yml"))

LLAMAS = ("llama", "mistral", "qwen2", "qwen3")
FAMILY_OF = {"minilm": "bert", "mixtral": "mixtral"} | {name: name for name in LLAMAS}


def _localised(text: str, folder: Path) -> str:
    """The same configuration on tiny models of the same families, one for each hub name or directory."""
    documents = list(yaml.safe_load_all(text))
    stages = {document.pop("name", None) for document in documents}
    configs = [MergeConfiguration.model_validate(document) for document in documents]
    names = {str(m) for config in configs for m in config.referenced_models()} - stages
    sees = any("-vl-" in name.lower() for name in names)
    for seed, name in enumerate(sorted(names, key=len, reverse=True)):  # longest first: some are prefixes of others
        if sees:
            model = more_model("qwen2.5-vl", seed)
            model = model if "-vl-" in name.lower() else text_model(model)
            text = text.replace(name, str(save(model, folder / name.replace("/", "-"), torch.bfloat16)))
            continue
        family = next(f for key, f in FAMILY_OF.items() if key in name.lower().replace("-", ""))
        tiny = {"hidden_size": 24, "intermediate_size": 16, "vocab_size": 11}
        tiny |= {"num_hidden_layers": 32 if "layer_range" in text else 4}
        tied = {"tie_word_embeddings": True} if "tied" in name else {}
        model = make_model(family, seed, **(tiny | tied if family in LLAMAS else {}))
        path = save(model, folder / name.replace("/", "-"), torch.bfloat16)
        if any(x in text for x in (": activations", "alignment: ", "tokenizer_source")):  # what learns reads texts
            word_tokenizer(11, f"w{seed}" if "tokenizer_source" in text else "w").save_pretrained(path)
        text = text.replace(name, str(path))
        _measure(text, folder, {str(path): model})
    _learn(text, folder)
    return text


def _learn(text: str, folder: Path) -> None:
    """Write the alignment that a configuration names for a model, by one step of learning."""
    for document in yaml.safe_load_all(text):
        for listed in document.get("models", []):
            file = (listed.get("parameters") or {}).get("alignment")
            if file is not None:
                texts = folder / "texts.txt"
                texts.write_text("w3 w4 w5\nw6 w7 w8 w9\nw10 w3\n", "utf-8")
                models, files = (document["base_model"], listed["model"]), ("--data", texts, "-o", folder / file)
                done = CliRunner().invoke(main, ["learn", *map(str, (*models, *files)), "--steps", "1"])
                assert done.exit_code == 0, done.output


def _measure(text: str, folder: Path, models: dict[str, PreTrainedModel]) -> None:
    """Write the files of statistics that a configuration names for these models."""
    for document in yaml.safe_load_all(text):
        fisher = "empirical" if document["merge_method"].endswith("fisher") else "none"
        for listed in document.get("models", []):
            file = (listed.get("parameters") or {}).get("statistics")
            if file is not None and listed["model"] in models:
                measure(models[listed["model"]], Path(listed["model"]), folder / file, fisher=fisher)


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda p: p.stem)
def test_example_runs(example: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)  # some write beside their output
    config = yaml.safe_load(_localised(example.read_text("utf-8"), tmp_path))
    out = merged(config, tmp_path / "out")
    assert all(x.dtype is getattr(torch, config["dtype"]) and torch.isfinite(x).all() for x in out.values())
    assert any(".self_attn." in name or ".attention." in name for name in out)


@pytest.mark.parametrize("example", STAGED, ids=lambda p: p.stem)
def test_stages_run(example: Path, tmp_path: Path) -> None:
    (tmp_path / "stages.yml").write_text(_localised(example.read_text("utf-8"), tmp_path), "utf-8")
    options = ["-I", tmp_path / "stages", "--out-path", "out", "--no-copy-tokenizer"]
    done = run_command("mergekit-multi", "stages.yml", *options, cwd=tmp_path, env=OFFLINE)
    assert done.returncode == 0, done.stderr
    assert load(tmp_path / "out")


def test_reasoning_vector_recipes_agree(tmp_path: Path) -> None:
    """Adding the vector as a task vector or from its own checkpoint is the same; taking it away again undoes it."""
    added = yaml.safe_load(_localised((FOLDER / "reasoning_vector.yml").read_text("utf-8"), tmp_path)) | {
        "dtype": "float32"
    }
    taken = yaml.safe_load(_localised((FOLDER / "reasoning_vector_subtracted.yml").read_text("utf-8"), tmp_path))
    instruct, grpo = added["models"]
    sft = added["base_model"]
    with_vector = merged(added, tmp_path / "added")
    vector = {"merge_method": "linear", "parameters": {"normalize": False}, "dtype": "float32"}
    vector |= {"models": [{"model": grpo["model"], "parameters": {"weight": 1.0}}]}
    vector["models"].append({"model": sft, "parameters": {"weight": -1.0}})
    merged(vector, tmp_path / "vector")
    stored = {"model": str(tmp_path / "vector"), "parameters": {"weight": 1.0, "align": False}}
    summed = {"merge_method": "rotation_match", "base_model": sft, "models": [instruct, stored]}
    summed |= {"parameters": {"normalize": False}, "dtype": "float32"}
    from_checkpoint = merged(summed, tmp_path / "summed")
    first = {"model": str(tmp_path / "added"), "parameters": {"weight": 1.0, "align": False}}
    back = merged(taken | {"models": [first, taken["models"][1]], "dtype": "float32"}, tmp_path / "back")
    target = merged(summed | {"models": [instruct]}, tmp_path / "target")
    for name, x in with_vector.items():
        torch.testing.assert_close(from_checkpoint[name], x, rtol=0, atol=1e-5 * float(x.abs().max()))
        torch.testing.assert_close(back[name], target[name], rtol=0, atol=1e-5 * float(x.abs().max()))
    assert any(not torch.allclose(x, target[name], atol=0.1) for name, x in with_vector.items())


def test_first_example_through_the_command(
    tmp_path: Path, mergekit_yaml: Callable[..., subprocess.CompletedProcess[str]]
) -> None:
    text = _localised((EXAMPLES[0].parent / "aligned_task_arithmetic.yml").read_text("utf-8"), tmp_path)
    done = mergekit_yaml(text, tmp_path / "out", "--no-copy-tokenizer")
    assert done.returncode == 0, done.stderr
    assert load(tmp_path / "out")


def test_there_are_examples_with_two_lines_on_when_to_use_them() -> None:
    assert len(EXAMPLES) >= 16
    assert STAGED
    for example in (*EXAMPLES, *STAGED):
        lines = example.read_text("utf-8").splitlines()
        assert [line.startswith("#") for line in lines[:3]] == [True, True, False], example
