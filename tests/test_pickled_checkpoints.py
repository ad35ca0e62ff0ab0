"""Checkpoints in PyTorch's own files: everything that MergeKit reads is merged, everything else is refused by name."""

from __future__ import annotations

import random
from argparse import Namespace
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoint_edits import command_output, copied, merge_output, pickled
from conftest import State, load, merge_config, merged
from models import make_model, save
from torch import nn

from mergekit_symalign.errors import CheckpointError
from mergekit_symalign.graph.pickles import read_pickle

ORDINARY: dict[str, tuple[Callable[[State], Any], dict[str, Any]]] = {
    "tensors": (dict, {}),
    "parameters": (lambda state: {name: nn.Parameter(x) for name, x in state.items()}, {}),
    "ordered, with an epoch": (lambda state: OrderedDict(state) | {"epoch": 3, "lr": 0.1, "name": "run"}, {}),
    "with the optimizer's state": (lambda state: state | {"optimizer": {"step": torch.ones(1)}, "args": None}, {}),
    "old format": (dict, {"_use_new_zipfile_serialization": False}),
}
BIN = "pytorch_model.bin"


@pytest.fixture(scope="module")
def paths(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("pickled")
    return {name: save(make_model("llama", i, num_hidden_layers=1), folder / name) for i, name in enumerate("ab")}


@pytest.fixture(scope="module")
def expected(paths: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> State:
    return merged(merge_config("rotation_match", paths["a"], [paths["b"]]), tmp_path_factory.mktemp("merged"))


@pytest.mark.parametrize("case", ORDINARY)
def test_the_same_merge_as_from_safetensors(paths: dict[str, Path], expected: State, tmp_path: Path, case: str) -> None:
    edit, options = ORDINARY[case]
    a, b = (pickled(paths[name], tmp_path / name, edit, **options) for name in "ab")
    out = merged(merge_config("rotation_match", a, [b]), tmp_path / "out")
    assert out.keys() == expected.keys()
    assert all(x.equal(out[name]) for name, x in expected.items())
    command_output("verify", a, paths["a"], "--random", "--quiet", code=(0,))
    command_output("solve", a, b, "-o", tmp_path / "a.safetensors", "--quiet", code=(0,))
    command_output("apply", tmp_path / "a.safetensors", b, "-o", tmp_path / "applied", "--quiet", code=(0,))
    applied = load(tmp_path / "applied")
    assert applied.keys() == expected.keys()
    assert all(torch.allclose(x, applied[name], atol=1e-5) for name, x in expected.items())


def test_the_lazy_unpickler(paths: dict[str, Path], expected: State, tmp_path: Path) -> None:
    """MergeKit's own reader of pickles knows fewer of them."""
    b = pickled(paths["b"], tmp_path / "b")
    out = merged(merge_config("rotation_match", paths["a"], [b]), tmp_path / "out", lazy_unpickle=True)
    assert all(x.equal(out[name]) for name, x in expected.items())
    for case in ("parameters", "old format"):
        edit, options = ORDINARY[case]
        other = pickled(paths["b"], tmp_path / case, edit, **options)
        message = merge_output(paths["a"], other, tmp_path / "none", "--lazy-unpickle")
        assert str(other / BIN) in message
        assert "Leave out --lazy-unpickle" in message


REFUSED: dict[str, tuple[Callable[[State], Any], str]] = {
    "foreign object": (lambda state: state | {"args": Namespace(lr=1)}, "argparse.Namespace"),
    "whole module": (lambda state: nn.Linear(2, 2), "torch.nn.modules.linear.Linear"),
    "nested": (lambda state: {"state_dict": state, "epoch": 3}, "inside the entry 'state_dict'"),
    "nested under another name": (lambda state: {"model": state}, "inside the entry 'model'"),
    "list": (lambda state: list(state.values()), "it holds a list"),
    "no tensor": (lambda state: {"epoch": 3}, "it holds no tensors"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_mergekit_does_not_read(paths: dict[str, Path], tmp_path: Path, case: str) -> None:
    edit, expected = REFUSED[case]
    other = pickled(paths["b"], tmp_path / "b", edit)
    for message in (
        merge_output(paths["a"], other, tmp_path / "out"),
        command_output("verify", paths["a"], other, "--random", code=(1,)),
    ):
        assert str(other / BIN) in message
        assert expected in message


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_damaged_pickles(paths: dict[str, Path], tmp_path: Path, zipped: bool) -> None:
    """Cut short or with bytes changed, they are read or refused by name, and end in no other error."""
    rng = random.Random(0)
    whole = pickled(paths["b"], tmp_path / "b", _use_new_zipfile_serialization=zipped) / BIN
    data, file = whole.read_bytes(), tmp_path / BIN
    messages = []
    for i in range(60):
        file.write_bytes(data[: rng.randrange(len(data))] if i % 3 == 0 else _with_other_bytes(data, rng))
        messages.append(_refusal(file))
    refused = [message for message in messages if message is not None]
    assert len(refused) >= 20
    assert all(str(file) in message for message in refused)


def _refusal(file: Path) -> str | None:
    try:
        read_pickle(file)
    except CheckpointError as error:
        return str(error)
    return None


def _with_other_bytes(data: bytes, rng: random.Random) -> bytes:
    changed = bytearray(data)
    for _ in range(20):
        changed[rng.randrange(2000)] = rng.randrange(256)
    return bytes(changed)


@pytest.mark.parametrize("keep", [0, 1, 50, -1000])
def test_a_truncated_pickle_in_a_merge(paths: dict[str, Path], tmp_path: Path, keep: int) -> None:
    other = pickled(paths["b"], tmp_path / "b")
    (other / BIN).write_bytes((other / BIN).read_bytes()[:keep])
    message = merge_output(paths["a"], other, tmp_path / "out")
    assert str(other / BIN) in message
    assert "Download the file again" in message


def test_an_index_of_pickles_that_promises_too_much(paths: dict[str, Path], tmp_path: Path) -> None:
    other = copied(paths["b"], tmp_path / "b")
    state = load(other)
    (other / "model.safetensors").unlink()
    torch.save({name: x for name, x in state.items() if name != "lm_head.weight"}, other / "pytorch_model-1.bin")
    index = '{"weight_map": {' + ", ".join(f'"{name}": "pytorch_model-1.bin"' for name in state) + "}}"
    (other / "pytorch_model.bin.index.json").write_text(index, "utf-8")
    message = merge_output(paths["a"], other, tmp_path / "out")
    assert str(other / "pytorch_model-1.bin") in message
    assert "lm_head.weight" in message
