"""Every command takes what a merge takes: model+adapter, model@revision."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner, Result
from conftest import load, squared_distance
from models import make_model, save, with_weights, word_tokenizer
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from mergekit_symalign.cli import main
from mergekit_symalign.families.resolve import resolve
from mergekit_symalign.planting import random_elements, transform


def command(*args: Any) -> Result:
    done = CliRunner().invoke(main, [str(arg) for arg in args])
    assert done.exit_code == 0, done.output
    return done


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """An anchor, a model with an adapter, the same two merged, and that one in other coordinates."""
    folder = tmp_path_factory.mktemp("models")
    anchor, base = save(make_model("llama", 0), folder / "anchor"), save(make_model("llama", 1), folder / "base")
    torch.manual_seed(0)
    tuned = get_peft_model(
        AutoModelForCausalLM.from_pretrained(base),
        LoraConfig(r=2, target_modules=["q_proj", "down_proj"], init_lora_weights=False),
    )
    tuned.save_pretrained(folder / "adapter")
    whole = tuned.merge_and_unload()
    whole.save_pretrained(folder / "merged")
    layout = resolve(whole.config, model="m")
    twin = with_weights(whole, transform(whole.state_dict(), layout, random_elements(layout, 3)))
    paths = {"anchor": anchor, "base": base, "merged": folder / "merged", "twin": save(twin, folder / "twin")}
    for path in paths.values():
        word_tokenizer(97).save_pretrained(path)
    (folder / "text.txt").write_text(
        "\n".join(" ".join(f"w{3 + (5 * i + j) % 94}" for j in range(9)) for i in range(4)), "utf-8"
    )
    adapted = f"{base}+{folder / 'adapter'}"
    return paths | {"adapted": adapted, "text": folder / "text.txt", "cache": ["--lora-merge-cache", folder / "cache"]}


def test_verify_and_barrier(models: dict[str, Any]) -> None:
    for one, other in ((models["adapted"], models["twin"]), (models["merged"], models["adapted"])):
        assert "The same function" in command("verify", one, other, "--random", "--tokens", 64, *models["cache"]).output
    line = ["--text", models["text"], "--points", 2, "--quiet", *models["cache"]]
    first, second = (
        command("barrier", models["anchor"], b, *line).stdout for b in (models["adapted"], models["merged"])
    )
    assert first == second
    assert "barrier" in first


def test_inspect_solve_and_apply(models: dict[str, Any], tmp_path: Path) -> None:
    anchor, adapted, cache = models["anchor"], models["adapted"], models["cache"]
    shown = command("inspect", anchor, adapted, "--layers", 0, *cache).stdout
    assert shown.startswith("base+adapter\nagainst anchor\n")
    file = tmp_path / "alignment.safetensors"
    command("solve", anchor, adapted, "-o", file, *cache)
    for name, model in (("adapted", adapted), ("merged", models["merged"])):
        command("apply", file, model, "-o", tmp_path / name, *cache)
    assert squared_distance(load(tmp_path / "adapted"), load(tmp_path / "merged")) == 0
    assert (tmp_path / "adapted" / "tokenizer.json").read_bytes() == (models["base"] / "tokenizer.json").read_bytes()
    done = command("verify", adapted, tmp_path / "adapted", "--random", "--tokens", 64, *cache)
    assert "The same function" in done.output


def test_revisions(models: dict[str, Any], tmp_path: Path) -> None:
    anchor, twin = f"{models['anchor']}@main", f"{models['twin']}@main"
    assert "NOT" not in command("verify", f"{models['merged']}@main", twin, "--random", "--tokens", 64).output
    command("inspect", anchor, twin, "--layers", 0)
    command("barrier", anchor, twin, "--text", models["text"], "--points", 2)
    command("solve", anchor, twin, "-o", tmp_path / "file.safetensors")
    command("apply", tmp_path / "file.safetensors", twin, "-o", tmp_path / "out")
