"""What a user runs, and what lands in the output; test_entry_points.py compares the ways to start a merge."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from click.testing import CliRunner
from conftest import OFFLINE, load, merge_config, merged, squared_distance
from models import make_model, perturbed, save, with_weights, word_tokenizer
from processes import run_command
from transformers import AutoTokenizer

from mergekit_symalign.cli import main
from mergekit_symalign.families.resolve import resolve
from mergekit_symalign.planting import random_elements, transform

Run = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture(scope="module")
def paths(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Anchor, sibling and its planted twin, with tokenizers."""
    folder = tmp_path_factory.mktemp("models")
    anchor = make_model("llama-tied", 0)
    sibling = perturbed(anchor, 0.1, 1)
    layout = resolve(anchor.config, model="m")
    twin = with_weights(sibling, transform(sibling.state_dict(), layout, random_elements(layout, 2)))
    models = {"anchor": anchor, "sibling": sibling, "twin": twin}
    result = {name: save(model, folder / name, torch.bfloat16) for name, model in models.items()}
    for path in result.values():
        word_tokenizer(97).save_pretrained(path)
    return result


def _config(paths: dict[str, Path], model: str = "twin", **rest: Any) -> dict[str, Any]:
    models = [{"model": paths[model], "parameters": {"weight": 0.5}}]
    return merge_config("aligned_task_arithmetic", paths["anchor"], models) | {"dtype": "bfloat16"} | rest


def test_card_names_method_and_paper_and_config_reproduces(paths: dict[str, Path], tmp_path: Path) -> None:
    for config, title, url in (
        (_config(paths), "Leveraging Parameter Space Symmetries for Reasoning Skill Transfer", "2511.10850"),
        (
            merge_config("rotation_match", paths["anchor"], [paths["twin"]]),
            "The Role of Rotation for Model",
            "2502.00264",
        ),
    ):
        out = tmp_path / config["merge_method"]
        first = merged(config, out, write_model_card=True, copy_tokenizer=True)
        card = (out / "README.md").read_text("utf-8")
        assert title in card
        assert f"https://arxiv.org/abs/{url}" in card
        assert AutoTokenizer.from_pretrained(out).get_vocab() == word_tokenizer(97).get_vocab()
        again = merged(yaml.safe_load((out / "mergekit_config.yml").read_text("utf-8")), tmp_path / "again" / out.name)
        assert all(torch.equal(x, again[name]) for name, x in first.items())


def test_refusals_on_the_command_line(paths: dict[str, Path], mergekit_yaml: Run, tmp_path: Path) -> None:
    """One line, no traceback, exit code 1, no output; a bad value in a tensor too."""
    misspelt = mergekit_yaml(_config(paths, parameters={"permutaton": True}), tmp_path / "out")
    assert misspelt.returncode == 1
    assert "Error: parameter permutaton" in misspelt.stderr
    assert "Traceback" not in misspelt.stderr
    assert not (tmp_path / "out").exists()

    bad = with_weights(make_model("llama-tied", 1), make_model("llama-tied", 1).state_dict())
    with torch.no_grad():
        bad.model.layers[1].mlp.up_proj.weight[3, 4] = float("nan")
    spoilt = mergekit_yaml(_config(paths | {"bad": save(bad, tmp_path / "bad")}, "bad"), tmp_path / "out")
    assert spoilt.returncode == 1
    assert "Error: tensor model.layers.1.mlp.up_proj.weight of model" in spoilt.stderr
    assert "Traceback" not in spoilt.stderr
    assert not (tmp_path / "out" / "config.json").exists()


def test_raw_pytorch_command_refuses(paths: dict[str, Path], tmp_path: Path) -> None:
    files = [str(paths[m] / "model.safetensors") for m in ("anchor", "twin")]
    config = {"merge_method": "rotation_match", "base_model": files[0], "models": [{"model": f} for f in files]}
    (tmp_path / "raw.yml").write_text(yaml.safe_dump(config), "utf-8")
    done = run_command("mergekit-pytorch", tmp_path / "raw.yml", tmp_path / "out", cwd=tmp_path, env=OFFLINE)
    assert done.returncode == 1
    assert "needs the whole block" in done.stderr
    assert not (tmp_path / "out").exists()


WITHOUT = """
import sys
from mergekit.scripts.run_yaml import main
for method in sys.argv[1:]:
    main([f"{method}.yml", f"{method}-0", "--quiet"], standalone_mode=False)
assert "mergekit_symalign" not in sys.modules
"""
"""``mergekit-yaml`` for several methods, without the plugin."""


def test_stock_methods_are_untouched(paths: dict[str, Path], mergekit_yaml: Run, tmp_path: Path) -> None:
    """Bit-identical output with the plugin and without."""
    models = [{"model": paths[m], "parameters": {"weight": 0.5, "density": 0.5}} for m in ("sibling", "twin")]
    configs = {
        method: merge_config(method, paths["anchor"], models) | {"dtype": "bfloat16"}
        for method in ("task_arithmetic", "ties")
    }
    for method, config in configs.items():
        (tmp_path / f"{method}.yml").write_text(yaml.safe_dump(config), "utf-8")
        done = mergekit_yaml(config, tmp_path / f"{method}-1")
        assert done.returncode == 0, done.stderr
    env = OFFLINE | {"MERGEKIT_SYMALIGN_AUTOLOAD": "0"}
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT, *configs], text=True, capture_output=True, cwd=tmp_path, env=env
    )
    assert done.returncode == 0, done.stderr
    for method in configs:
        with_plugin, without = (load(tmp_path / f"{method}-{autoload}") for autoload in "10")
        assert with_plugin.keys() == without.keys()
        assert all(torch.equal(x, without[name]) for name, x in with_plugin.items())
        files = [
            {f.name: f.read_bytes() for f in (tmp_path / f"{method}-{a}").iterdir() if f.name != "README.md"}
            for a in "10"
        ]
        assert files[0] == files[1]


@pytest.mark.parametrize("source", ["base", "union"])
def test_tokenizers_are_matched_as_ever(paths: dict[str, Path], source: str, tmp_path: Path) -> None:
    """A model with another vocabulary: MergeKit permutes the embeddings, we align the blocks."""
    other = make_model("llama-tied", 0, vocab_size=101)
    state = other.state_dict() | {k: x for k, x in make_model("llama-tied", 0).state_dict().items() if "layers" in k}
    layout = resolve(other.config, model="m")
    twin = with_weights(other, transform(state, layout, random_elements(layout, 4)))
    save(twin, tmp_path / "other")
    word_tokenizer(101).save_pretrained(tmp_path / "other")
    config = _config(paths | {"other": tmp_path / "other"}, "other")
    config |= {"tokenizer": {"source": source}, "dtype": "float32", "chat_template": "chatml"}
    out = merged(config, tmp_path / "out", copy_tokenizer=True)
    size = {"base": 97, "union": 101}[source]
    assert out["model.embed_tokens.weight"].shape[0] == size
    assert "<|im_start|>" in AutoTokenizer.from_pretrained(tmp_path / "out").chat_template
    assert json.loads((tmp_path / "out" / "config.json").read_text("utf-8"))["vocab_size"] == size
    anchor = load(paths["anchor"])
    blocks = {name: x for name, x in out.items() if ".mlp." in name or ".self_attn." in name}
    norm = sum(float(x.double().square().sum()) for x in blocks.values())
    assert blocks
    # the other model's blocks are the anchor's (before rounding to bf16) in other coordinates
    assert squared_distance(blocks, anchor) < 1e-4 * norm


def test_tied_embeddings_stay_tied(paths: dict[str, Path], tmp_path: Path) -> None:
    out = merged(_config(paths), tmp_path)
    assert "model.embed_tokens.weight" in out
    assert "lm_head.weight" not in out
    assert json.loads((tmp_path / "config.json").read_text("utf-8"))["tie_word_embeddings"] is True


def test_help_of_every_command(tmp_path: Path) -> None:
    done = run_command("mergekit-symalign", "--help", cwd=tmp_path, env=OFFLINE)
    assert done.returncode == 0, done.stderr
    assert "Usage: mergekit-symalign" in done.stdout
    for name in main.commands:
        assert name in done.stdout
        shown = CliRunner().invoke(main, [name, "--help"], prog_name="mergekit-symalign")
        assert shown.exit_code == 0, shown.output
        assert f"Usage: mergekit-symalign {name}" in shown.output
        assert "Example: mergekit-symalign" in shown.output
