"""Alignments as files: solved, saved, used in a merge, applied, undone; and refused where they do not belong."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner, Result
from conftest import State, load, merge_config, merged
from models import logits, make_model, perturbed, relative_deviation, rounding, save, with_weights
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig

from mergekit_symalign.alignment_file import AlignmentFile, Origin, save_alignment
from mergekit_symalign.cli import main
from mergekit_symalign.errors import AlignmentFileError, ConfigError, ParameterError
from mergekit_symalign.families.resolve import resolve
from mergekit_symalign.planting import Planted, random_elements, transform
from mergekit_symalign.symmetry.element import BlockElement

FAMILIES = ["llama", "phi4-mini", "olmo2", "cohere2", "gpt2", "bert", "mixtral"]


class Pair:
    """An anchor and a planted twin of a sibling, on disk."""

    def __init__(self, family: str, folder: Path) -> None:
        self.model = make_model(family, 0)
        layout = resolve(self.model.config, model=family)
        planted = random_elements(layout, 3, Planted(neuron_scaling=family == "llama"))
        self.twin = with_weights(self.model, transform(perturbed(self.model, 0.1, 1).state_dict(), layout, planted))
        self.anchor_path, self.twin_path = save(self.model, folder / "anchor"), save(self.twin, folder / "twin")
        self.file = folder / "solved.safetensors"

    def loaded(self, path: Path) -> State:
        """A checkpoint as transformers loads it, whatever its tensors are called."""
        return dict(type(self.model).from_pretrained(path, dtype=torch.float32).state_dict())

    def solve(self, *args: str) -> Result:
        return command("solve", self.anchor_path, self.twin_path, "-o", self.file, "--quiet", *args)


def command(*args: Any) -> Result:
    return CliRunner().invoke(main, [str(arg) for arg in args])


@pytest.fixture(scope="module", params=FAMILIES)
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Pair:
    return Pair(request.param, tmp_path_factory.mktemp(request.param))


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Pair:
    found = Pair("llama", tmp_path_factory.mktemp("refused"))
    done = found.solve("--neuron-scaling")
    assert done.exit_code == 0, done.output
    return found


def _match(pair: Pair, out: Path, **parameters: Any) -> State:
    model = {"model": pair.twin_path, "parameters": parameters}
    return merged(merge_config("rotation_match", pair.anchor_path, [model]), out)


def test_a_merge_saves_what_a_merge_from_the_file_uses(pair: Pair, tmp_path: Path) -> None:
    config = merge_config("rotation_match", pair.anchor_path, [pair.twin_path])
    saving = merged(config | {"parameters": {"save_alignment": str(tmp_path / "saved")}}, tmp_path / "a")
    assert [p.name for p in (tmp_path / "saved").iterdir()] == ["twin.safetensors"]
    from_file = _match(pair, tmp_path / "b", alignment=str(tmp_path / "saved" / "twin.safetensors"))
    assert all(torch.equal(x, from_file[name]) for name, x in saving.items())
    solved, read = (json.loads((tmp_path / out / "symalign_report.json").read_text("utf-8"))["models"] for out in "ab")
    assert solved == read  # the file carries what was known of the solve
    twin = pair.loaded(pair.twin_path)
    assert any(not torch.equal(x, twin[name]) for name, x in pair.loaded(tmp_path / "a").items())


def test_apply_keeps_the_function_and_invert_undoes_it(pair: Pair, tmp_path: Path) -> None:
    done = pair.solve()
    assert done.exit_code == 0, done.output
    assert json.loads(_metadata(pair.file))["origin"]["settings"]["rotation"] == "exact"
    out, back = tmp_path / "out", tmp_path / "back"
    for args in ((pair.file, pair.twin_path, "-o", out), (pair.file, out, "-o", back, "--invert")):
        done = command("apply", *args, "--quiet")
        assert done.exit_code == 0, done.output
    aligned, original, undone = (pair.loaded(path) for path in (out, pair.twin_path, back))
    merge = _match(pair, tmp_path / "merge")
    assert all(torch.equal(merge[name], x) for name, x in load(out).items() if name in merge)
    assert (out / "config.json").read_text("utf-8") == (pair.twin_path / "config.json").read_text("utf-8")
    if hasattr(pair.twin, "lm_head"):
        assert relative_deviation(logits(pair.twin), logits(with_weights(pair.model, aligned))) < rounding(pair.twin)
    eps = torch.finfo(torch.float32).eps
    for name, x in original.items():
        assert (undone[name] - x).abs().max() <= 32 * eps * x.abs().max(), name
    assert any((aligned[name] - x).abs().max() > 0.1 * x.abs().max() for name, x in original.items())


def test_equal_numbers_are_stored_once(llama: Pair) -> None:
    file = AlignmentFile.open(llama.file)
    references = [
        reference
        for axes in file.blocks.values()
        for steps in axes.values()
        for _, numbers in steps
        for reference in numbers
    ]
    assert len(references) > 1.5 * len(load_file(llama.file))
    matrices = [x for x in load_file(llama.file).values() if x.ndim == 3]
    assert all(len(x) == llama.model.config.num_key_value_heads for x in matrices)
    assert all(x.dtype in (torch.int32, torch.float64) for x in load_file(llama.file).values())


def test_a_file_gives_back_what_was_saved(tmp_path: Path) -> None:
    layout = resolve(make_model("llama", 0).config, model="m")
    elements = random_elements(layout, 1, Planted(neuron_scaling=True))
    named = {f"layer {layer} {kind.value}": element for (layer, kind), element in elements.items()}
    save_alignment(tmp_path / "a", Origin("a", "b", "", "", "llama", {}), named)
    file = AlignmentFile.open(tmp_path / "a")
    for block, element in named.items():
        found = file.element(block)
        assert found.actions.keys() == element.actions.keys()
        for axis, action in element.actions.items():
            x = torch.randn(action.size, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
            assert torch.equal(found.actions[axis](x, 0), action(x, 0))


def _metadata(file: Path) -> str:
    with safe_open(file, framework="pt") as opened:
        text: str = opened.metadata()["mergekit_symalign"]
    return text


def _rewritten(source: Path, out: Path, **changes: Any) -> Path:
    content = json.loads(_metadata(source)) | changes
    save_file(load_file(source), out, metadata={"mergekit_symalign": json.dumps(content)})
    return out


def test_a_damaged_file_is_refused(llama: Pair, tmp_path: Path) -> None:
    good = llama.file.read_bytes()
    flipped = bytearray(good)
    flipped[-3] ^= 64
    cases = {
        "cut": (good[:-100], "cannot be read"),
        "flipped": (bytes(flipped), "damaged"),
        "text": (b"no alignment at all", "cannot be read"),
    }
    for name, (content, reason) in cases.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(AlignmentFileError, match=reason):
            AlignmentFile.open(tmp_path / name)
    with pytest.raises(AlignmentFileError, match="cannot be read"):
        AlignmentFile.open(tmp_path / "absent")
    with pytest.raises(AlignmentFileError, match="not an alignment"):
        AlignmentFile.open(llama.anchor_path / "model.safetensors")
    with pytest.raises(AlignmentFileError, match="newer"):
        AlignmentFile.open(_rewritten(llama.file, tmp_path / "newer", format=99))
    with pytest.raises(AlignmentFileError, match="metadata are damaged"):
        AlignmentFile.open(_rewritten(llama.file, tmp_path / "less", origin={"anchor": "x"}))


def test_a_file_of_other_models_is_refused(llama: Pair, tmp_path: Path) -> None:
    def refused(anchor: Path, model: Path, match: str, **parameters: Any) -> None:
        models = [{"model": model, "parameters": {"alignment": str(llama.file)} | parameters}]
        with pytest.raises((AlignmentFileError, ParameterError), match=match):
            merged(merge_config("rotation_match", anchor, models), tmp_path / "out")
        assert not (tmp_path / "out").exists()

    other = save(perturbed(llama.model, 0.01, 9), tmp_path / "other")
    refused(llama.anchor_path, other, "solved for model")
    refused(other, llama.twin_path, "solved for anchor")
    deeper = [save(make_model("llama", i, num_hidden_layers=4), tmp_path / f"deep{i}") for i in range(2)]
    refused(deeper[0], deeper[1], "layers 3 != 4")
    qwen = [save(make_model("qwen2", i), tmp_path / f"qwen{i}") for i in range(2)]
    refused(qwen[0], qwen[1], "family llama, but model")
    refused(llama.anchor_path, llama.twin_path, "align is false", align=False)


def test_a_block_that_the_file_lacks_is_refused(llama: Pair, tmp_path: Path) -> None:
    save_alignment(tmp_path / "part", AlignmentFile.open(llama.file).origin, {"layer 0 mlp": BlockElement({})})
    with pytest.raises(AlignmentFileError, match="nothing for layer 0 attention"):
        _match(llama, tmp_path / "out", alignment=str(tmp_path / "part"))


def test_files_pair_equal_layers_only(llama: Pair, tmp_path: Path) -> None:
    sources = [
        {"model": str(llama.anchor_path), "layer_range": [0, 2], "parameters": {"weight": 0.0}},
        {
            "model": str(llama.twin_path),
            "layer_range": [1, 3],
            "parameters": {"alignment": str(llama.file), "weight": 1.0},
        },
    ]
    config = {"merge_method": "rotation_match", "base_model": str(llama.anchor_path), "slices": [{"sources": sources}]}
    with pytest.raises(ConfigError, match="pairs layer 1 of the model with layer 0"):
        merged(config, tmp_path / "out")


def test_apply_refuses_without_writing(llama: Pair, tmp_path: Path) -> None:
    other = save(perturbed(llama.model, 0.01, 9), tmp_path / "other")
    done = command("apply", llama.file, other, "-o", tmp_path / "out")
    assert done.exit_code == 2
    assert "solved for model" in done.output
    assert "Traceback" not in done.output
    assert not (tmp_path / "out").exists()
    refused = command("apply", llama.file, llama.twin_path, "-o", llama.anchor_path)
    assert refused.exit_code == 2
    assert "not empty" in refused.output
    assert sorted(p.name for p in tmp_path.iterdir()) == ["other"]


@pytest.mark.parametrize("command", ["solve", "apply"])
def test_commands_say_what_they_cannot_find(command: str, tmp_path: Path) -> None:
    config = LlamaConfig(architectures=["LlamaForCausalLM"])
    for name, architecture in (("llama", "LlamaForCausalLM"), ("ctrl", "CTRLLMHeadModel")):
        config.architectures = [architecture]
        config.save_pretrained(tmp_path / name)
    pairs = [("/nowhere/at/all", "cannot be opened"), (tmp_path / "ctrl", "CTRLLMHeadModel is not supported")]
    for model, message in pairs:
        first = [tmp_path / "llama", model] if command == "solve" else ["a.safetensors", model]
        done = CliRunner().invoke(main, [command, *map(str, first), "-o", str(tmp_path / "out")])
        assert done.exit_code == 2, done.output
        assert message in done.output
        assert not (tmp_path / "out").exists()


@contextmanager
def nearly_full_disk() -> Iterator[None]:
    """No file can grow beyond 2000 bytes (nor can pytest's own output): what was written stays, as on a full disk."""
    resource = pytest.importorskip("resource", reason="Windows has no limit for the size of files")
    _, most = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2000, most))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (most, most))


@pytest.mark.parametrize("name", ["solve", "apply", "inspect --json", "inspect --plot"])
def test_a_full_disk_leaves_nothing_half_written(name: str, llama: Pair, tmp_path: Path) -> None:
    out, models = tmp_path / "out.png", (llama.anchor_path, llama.twin_path)
    commands = {
        "solve": ("solve", *models, "-o", out, "--quiet"),
        "apply": ("apply", llama.file, llama.twin_path, "-o", out, "--quiet"),
        "inspect --json": ("inspect", *models, "--json", out, "--quiet"),
        "inspect --plot": ("inspect", *models, "--plot", out, "--quiet"),
    }
    with nearly_full_disk():
        done = command(*commands[name])
    assert done.exit_code == 1
    assert "too large" in done.output  # what the operating system says of it
    assert isinstance(done.exception, SystemExit)  # in one line
    assert not list(tmp_path.iterdir())
