"""Models that cannot be opened: merges and commands say which file is at fault and what to do, before any work."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import peft
import pytest
import torch
from checkpoint_edits import command_output, copied, merge_output, refusals
from conftest import load, merge_config, merged
from mergekit.common import ModelReference
from models import make_model, save

from mergekit_symalign.commands.models import StoredModel
from mergekit_symalign.errors import ConfigError

LFS = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 123\n"


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(make_model("llama", 0, num_hidden_layers=1), tmp_path_factory.mktemp("sound") / "anchor")


@pytest.fixture(autouse=True)
def _offline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)


def _text(name: str, text: str) -> Callable[[Path], None]:
    return lambda folder: _written(folder / name, text)


def _written(path: Path, text: str) -> None:
    path.write_text(text, "utf-8")


def _without(name: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).unlink()


def _emptied(folder: Path) -> None:
    for file in folder.iterdir():
        file.unlink()


def _only(name: str, text: str) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        _emptied(folder)
        _written(folder / name, text)

    return change


def _renamed(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "consolidated.safetensors")


def _index_alone(text: str) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        (folder / "model.safetensors").unlink()
        _written(folder / "model.safetensors.index.json", text)

    return change


ADAPTER = json.dumps({"base_model_name_or_path": "some/base", "peft_type": "LORA"})
BROKEN: dict[str, tuple[Callable[[Path], None], tuple[str, ...]]] = {
    "weights in LFS": (_text("model.safetensors", LFS), ("model.safetensors", "Git LFS pointer", "git lfs pull")),
    "config in LFS": (_text("config.json", LFS), ("config.json", "Git LFS pointer")),
    "index in LFS": (_index_alone(LFS), ("model.safetensors.index.json", "Git LFS pointer")),
    "GGUF only": (_only("model.Q4_K_M.gguf", "GGUF"), ("model.Q4_K_M.gguf", "GGUF only", "original checkpoint")),
    "GGUF beside a config": (
        lambda folder: _written((folder / "model.safetensors").rename(folder / "m.gguf"), "GGUF"),
        ("m.gguf", "GGUF only"),
    ),
    "GGUF under another name": (_text("model.safetensors", "GGUF...."), ("model.safetensors", "GGUF")),
    "web page": (_text("model.safetensors", "<!DOCTYPE html><html>"), ("model.safetensors", "web page")),
    "adapter alone": (_only("adapter_config.json", ADAPTER), ("adapter", "some/base+", "--lora-merge-cache")),
    "empty directory": (_emptied, ("the directory is empty",)),
    "no config": (_without("config.json"), ("config.json",)),
    "no weights": (_without("model.safetensors"), ("it has no weights", "model.safetensors")),
    "other weights": (_renamed, ("consolidated.safetensors", "MergeKit does not read")),
    "config cut short": (_text("config.json", '{"model_type": "lla'), ("config.json", "cannot be read as JSON")),
    "config is a list": (_text("config.json", "[]"), ("config.json", "not a JSON object")),
    "unknown model type": (_text("config.json", '{"model_type": "nonsense"}'), ("cannot be opened", "nonsense")),
    "bad value": (_text("config.json", '{"model_type": "llama", "hidden_size": "x"}'), ("cannot be opened",)),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_directory_that_is_no_model(sound: Path, tmp_path: Path, case: str) -> None:
    change, expected = BROKEN[case]
    other = copied(sound, tmp_path / "other")
    change(other)
    before = _contents(other)
    for who, output in refusals(sound, other, tmp_path).items():
        for part in (str(other), *expected):
            assert part in output, (who, output)
    assert _contents(other) == before


def _contents(folder: Path) -> dict[Path, bytes]:
    return {file: file.read_bytes() for file in folder.iterdir()}


@pytest.mark.skipif(os.name == "nt", reason="links need a privilege there")
def test_a_cache_of_the_hub_that_lost_a_file(sound: Path, tmp_path: Path) -> None:
    other = copied(sound, tmp_path / "other")
    (other / "model.safetensors").unlink()
    (other / "model.safetensors").symlink_to(tmp_path / "blobs" / "gone")
    for who, output in refusals(sound, other, tmp_path).items():
        assert "model.safetensors is a link to a file that is not there" in output, (who, output)


@pytest.mark.parametrize("name", ["nobody/nothing-here", "./nowhere", "/no/such/directory"])
def test_a_model_that_is_not_there(sound: Path, tmp_path: Path, name: str) -> None:
    for who, output in refusals(sound, name, tmp_path).items():
        assert name in output, (who, output)
        assert "there is no such directory" in output, (who, output)


def test_a_file_in_place_of_a_directory(sound: Path, tmp_path: Path) -> None:
    gguf = tmp_path / "model.gguf"
    gguf.write_bytes(b"GGUF")
    for file, expected in ((gguf, "GGUF file"), (sound / "model.safetensors", f"Name its directory: {sound}")):
        for who, output in refusals(sound, file, tmp_path).items():
            assert expected in output, (who, output)


@pytest.mark.parametrize("device", ["cud", "cuda:97", "meta"])
def test_a_device_that_is_not_there(sound: Path, tmp_path: Path, device: str) -> None:
    out = tmp_path / "out"
    options = ("--device", device)
    outputs = [
        merge_output(sound, sound.with_name("x"), out, *options),
        command_output("inspect", sound, sound, *options, code=(2,)),
        command_output("verify", sound, sound, "--random", *options, code=(2,)),
        command_output("barrier", sound, sound, "--text", __file__, *options, code=(2,)),
    ]
    for output in outputs:
        assert f"--device {device}" in output


@pytest.mark.skipif(torch.cuda.is_available() or torch.backends.mps.is_available(), reason="this machine has one")
def test_several_accelerators_that_are_not_there(sound: Path, tmp_path: Path) -> None:
    output = merge_output(sound, copied(sound, tmp_path / "other"), tmp_path / "out", "--multi-gpu")
    assert "--multi-gpu" in output
    assert "no accelerator" in output


@pytest.fixture(scope="module")
def adapter(sound: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    model = make_model("llama", 0, num_hidden_layers=1).float()
    tuned = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))
    tuned.save_pretrained(tmp_path_factory.mktemp("adapter"))
    return tmp_path_factory.getbasetemp() / "adapter0"


def test_an_adapter_without_a_cache(sound: Path, adapter: Path, tmp_path: Path) -> None:
    for who, output in refusals(sound, f"{sound}+{adapter}", tmp_path).items():
        assert "--lora-merge-cache" in output, (who, output)


def test_an_adapter_that_is_damaged(sound: Path, adapter: Path, tmp_path: Path) -> None:
    cache = ("--lora-merge-cache", str(tmp_path / "cache"))
    for case, (name, text) in {
        "weights": ("adapter_model.safetensors", LFS),
        "config": ("adapter_config.json", "{"),
    }.items():
        other = copied(adapter, tmp_path / case)
        (other / name).write_text(text, "utf-8")
        assert f"{other / name}" in merge_output(sound, f"{sound}+{other}", tmp_path / "out", *cache)
    assert not (tmp_path / "cache").exists()


def test_an_adapter_that_does_not_fit_leaves_nothing_in_the_cache(sound: Path, adapter: Path, tmp_path: Path) -> None:
    """MergeKit would take the empty directory that it leaves for the merged model the next time."""
    other = save(make_model("llama", 1, num_hidden_layers=1, hidden_size=96), tmp_path / "wide")
    for _ in range(2):
        name = f"{other}+{adapter}"
        output = merge_output(sound, name, tmp_path / "out", "--lora-merge-cache", str(tmp_path / "cache"))
        assert name in output
        assert "size mismatch" in output
    assert not list((tmp_path / "cache").iterdir())


def test_an_adapter_whose_merge_was_broken_off(sound: Path, adapter: Path, tmp_path: Path) -> None:
    reference = ModelReference.parse(f"{sound}+{adapter}")
    assert reference.lora is not None
    left = tmp_path / "cache" / f"{reference.model._unique_id()}_{reference.lora._unique_id()}"
    left.mkdir(parents=True)
    output = merge_output(sound, reference, tmp_path / "out", "--lora-merge-cache", str(tmp_path / "cache"))
    assert str(left) in output
    assert "Delete this directory" in output


def test_commands_open_an_adapter_as_merges_do(sound: Path, adapter: Path, tmp_path: Path) -> None:
    from mergekit.options import MergeOptions

    base = copied(sound, tmp_path / "base")
    (base / "tokenizer_config.json").write_text("{}", "utf-8")
    name, cache = f"{base}+{adapter}", str(tmp_path / "cache")
    options = MergeOptions(lora_merge_cache=cache)
    model = StoredModel.open(name, options)
    out = merged(merge_config("rotation_match", sound, [{"model": name}]), tmp_path / "out", lora_merge_cache=cache)
    assert model.name == name
    assert model.checkpoint.headers.keys() == out.keys()
    applied, alignment, given = (
        tmp_path / "applied",
        tmp_path / "a.safetensors",
        ("--lora-merge-cache", cache, "--quiet"),
    )
    command_output("solve", sound, name, "-o", alignment, *given, code=(0,))
    command_output("apply", alignment, name, "-o", applied, *given, code=(0,))
    assert load(applied).keys() == out.keys()
    assert (applied / "tokenizer_config.json").read_text("utf-8") == "{}", (
        "the adapter's merge has no tokenizer of its own"
    )
    with pytest.raises(ConfigError, match="--lora-merge-cache"):
        StoredModel.open(name, MergeOptions())


def test_a_checkpoint_that_was_written_anew_is_read_anew(sound: Path, tmp_path: Path) -> None:
    """MergeKit keeps every model that a process has opened."""
    other = copied(sound, tmp_path / "other")
    first = merged(merge_config("rotation_match", sound, [other]), tmp_path / "first")
    save(make_model("llama", 1, num_hidden_layers=1), other)
    again = merged(merge_config("rotation_match", sound, [other]), tmp_path / "again")
    assert any(not x.equal(again[name]) for name, x in first.items())


def test_other_methods_are_left_alone(sound: Path, tmp_path: Path) -> None:
    """A stock merge opens its models by itself: what it says of a missing one is MergeKit's and transformers' own."""
    config = merge_config("linear", None, [str(sound), "/no/such/directory"], parameters={"weight": 1.0})
    with pytest.raises(Exception, match="no/such/directory") as caught:
        merged(config, tmp_path / "out")
    assert type(caught.value).__module__.partition(".")[0] != "mergekit_symalign"
