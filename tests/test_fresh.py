"""Nothing that was read in an earlier merge of the same process outlives the file it was read from."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner, Result
from conftest import State, load, merge_config, merged, squared_distance
from models import make_model, perturbed, save, with_weights, word_tokenizer
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, PreTrainedModel

from mergekit_symalign.cli import main
from mergekit_symalign.families.resolve import resolve
from mergekit_symalign.planting import random_elements, transform

ACTIVATIONS = {"objective": "activations", "calibration": "default", "calibration_tokens": 300}


def command(*args: Any) -> Result:
    return CliRunner().invoke(main, [str(arg) for arg in args])


def _twin(model: PreTrainedModel, seed: int) -> PreTrainedModel:
    layout = resolve(model.config, model="m")
    return with_weights(model, transform(model.state_dict(), layout, random_elements(layout, seed)))


def _replaced(model: PreTrainedModel, path: Path, **how: Any) -> None:
    shutil.rmtree(path, ignore_errors=True)
    if how.pop("pickled", False):
        path.mkdir()
        model.config.save_pretrained(path)
        torch.save({name: x.float() for name, x in model.state_dict().items()}, path / "pytorch_model.bin")
    else:
        save(model, path, **how)


def _same(one: State, other: State) -> bool:
    return one.keys() == other.keys() and all(torch.equal(x, other[name]) for name, x in one.items())


@pytest.mark.parametrize("how", [{"max_shard_size": "40KB"}, {"pickled": True}])
def test_other_weights_at_the_same_place(how: dict[str, Any], tmp_path: Path) -> None:
    model, path = tmp_path / "model", save(make_model("llama", 0), tmp_path / "anchor")
    first, second = make_model("llama", 1), make_model("llama", 2)
    _replaced(first, model, **dict(how))
    before = merged(merge_config("rotation_match", path, [model]), tmp_path / "before")
    _replaced(second, model, **dict(how))
    after = merged(merge_config("rotation_match", path, [model]), tmp_path / "after")
    shutil.copytree(model, tmp_path / "elsewhere")
    wanted = merged(merge_config("rotation_match", path, [tmp_path / "elsewhere"]), tmp_path / "wanted")
    assert _same(after, wanted)
    assert not _same(after, before)


def test_another_config_at_the_same_place(tmp_path: Path) -> None:
    """RoPE's base decides what a model does on prompts, and so how its heads are matched."""
    vocabulary = {"vocab_size": 97}
    anchor = make_model("llama", 0, **vocabulary)
    sibling = _twin(perturbed(anchor, 0.5, 1), 3)
    paths = [save(anchor, tmp_path / "anchor"), save(sibling, tmp_path / "model")]
    for path in paths:
        word_tokenizer(97).save_pretrained(path)
    prompts = tmp_path / "prompts.txt"
    prompts.write_text(
        "\n".join(" ".join(f"w{3 + (7 * i + j * j) % 94}" for j in range(20)) for i in range(15)), "utf-8"
    )
    settings = ACTIVATIONS | {"calibration": str(prompts)}

    def run(out: str, model: Path = paths[1]) -> State:
        return merged(merge_config("rotation_match", paths[0], [model], parameters=settings), tmp_path / out)

    before = run("before")
    config = sibling.config
    config.rope_parameters = dict(config.rope_parameters, rope_theta=20.0)
    config.save_pretrained(paths[1])
    after = run("after")
    wanted = run("wanted", Path(shutil.copytree(paths[1], tmp_path / "elsewhere")))
    assert _same(after, wanted)
    assert not _same(after, before)


def test_an_inferred_architecture_is_looked_up_again(tmp_path: Path) -> None:
    """MergeKit has no file for SmolLM3 and remembers the names of its tensors by the names of the models."""
    paths = [tmp_path / "anchor", tmp_path / "model"]
    for layers in (3, 2):
        for seed, path in enumerate(paths):
            _replaced(make_model("smollm3", seed, num_hidden_layers=layers, no_rope_layers=[1] * layers), path)
        state = merged(merge_config("rotation_match", paths[0], [paths[1]]), tmp_path / str(layers))
        assert len({name.split(".")[2] for name in state if "layers." in name}) == layers


def test_an_adapter_that_was_trained_again(tmp_path: Path) -> None:
    anchor, base = save(make_model("llama", 0), tmp_path / "anchor"), save(make_model("llama", 1), tmp_path / "base")
    cache = {"lora_merge_cache": str(tmp_path / "cache")}

    def trained(seed: int) -> None:
        torch.manual_seed(seed)
        config = LoraConfig(r=2, target_modules=["down_proj"], init_lora_weights=False)
        get_peft_model(AutoModelForCausalLM.from_pretrained(base), config).save_pretrained(tmp_path / "adapter")

    def run(out: str, reference: str) -> State:
        return merged(merge_config("rotation_match", anchor, [{"model": reference}]), tmp_path / out, **cache)

    trained(0)
    before = run("before", f"{base}+{tmp_path / 'adapter'}")
    kept = {f: f.stat().st_mtime_ns for f in (tmp_path / "cache").rglob("*.safetensors")}
    assert _same(before, run("again", f"{base}+{tmp_path / 'adapter'}"))
    assert kept == {f: f.stat().st_mtime_ns for f in (tmp_path / "cache").rglob("*.safetensors")}  # not made again
    trained(1)
    after = run("after", f"{base}+{tmp_path / 'adapter'}")
    shutil.copytree(tmp_path / "adapter", tmp_path / "elsewhere")
    assert _same(after, run("wanted", f"{base}+{tmp_path / 'elsewhere'}"))
    assert not _same(after, before)


def test_commands_read_again_too(tmp_path: Path) -> None:
    anchor, model = save(make_model("llama", 0), tmp_path / "anchor"), tmp_path / "model"
    original = perturbed(make_model("llama", 0), 0.1, 1)
    file = tmp_path / "alignment.safetensors"
    random = ["--random", "--tokens", 64]
    for seed in (3, 4):
        _replaced(_twin(original, seed), model)
        assert command("solve", anchor, model, "-o", file).exit_code == 0
        out = tmp_path / f"out-{seed}"
        assert command("apply", file, model, "-o", out).exit_code == 0
        assert command("verify", model, out, *random).exit_code == 0
        expected = load(save(original, tmp_path / "original"))
        assert squared_distance(load(out), expected) < 0.5 * squared_distance(load(model), expected)
    _replaced(make_model("llama", 5), model)
    assert command("verify", model, tmp_path / "out-4", *random).exit_code == 1
    assert "distance" in command("inspect", anchor, model, "--layers", 0).output
