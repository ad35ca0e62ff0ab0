"""Tensors that a merge does not read are named: in a warning, in the report and in the card."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest
import torch
from checkpoint_edits import edited, pickled
from conftest import State, load, merge_config, merged
from models import make_model, save
from more_models import more_model

from mergekit_symalign.graph.leftovers import shortened

VALUE_HEAD = {"v_head.summary.weight": torch.ones(1, 48), "v_head.summary.bias": torch.ones(1)}


@pytest.fixture(scope="module")
def paths(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("models")
    return [save(make_model("llama", i, num_hidden_layers=2), folder / str(i)) for i in range(2)]


def _report(out: Path) -> dict[str, object]:
    unused: dict[str, object] = json.loads((out / "symalign_report.json").read_text("utf-8"))["unused_tensors"]
    return unused


def _with_value_head(state: State) -> State:
    return state | VALUE_HEAD


@pytest.mark.parametrize("as_anchor", [False, True])
def test_a_value_head(paths: list[Path], tmp_path: Path, caplog: pytest.LogCaptureFixture, as_anchor: bool) -> None:
    other = edited(paths[1], tmp_path / "trl", _with_value_head)
    anchor, model = (other, paths[0]) if as_anchor else (paths[0], other)
    with caplog.at_level(logging.WARNING):
        out = merged(merge_config("rotation_match", anchor, [model]), tmp_path / "out", write_model_card=True)
    assert not out.keys() & VALUE_HEAD.keys()
    warnings = [record.getMessage() for record in caplog.records if "does not read" in record.getMessage()]
    assert len(warnings) == 1
    card = (tmp_path / "out" / "README.md").read_text("utf-8")
    for text in (warnings[0], card):
        assert str(other) in text
        assert all(name in text for name in VALUE_HEAD)
    assert _report(tmp_path / "out") == {str(other): sorted(VALUE_HEAD)}


def test_a_value_head_in_a_pickle(paths: list[Path], tmp_path: Path) -> None:
    other = pickled(paths[1], tmp_path / "trl", lambda state: {**_with_value_head(state), "epoch": 3})
    merged(merge_config("rotation_match", paths[0], [other]), tmp_path / "out")
    assert _report(tmp_path / "out") == {str(other): sorted(VALUE_HEAD)}


def test_layers_beyond_the_config(paths: list[Path], tmp_path: Path) -> None:
    other = edited(paths[1], tmp_path / "short", lambda state: None, num_hidden_layers=1)
    first = edited(paths[0], tmp_path / "first", lambda state: None, num_hidden_layers=1)
    out = merged(merge_config("rotation_match", first, [other]), tmp_path / "out")
    beyond = [name for name in load(other) if name.startswith("model.layers.1.")]
    assert not out.keys() & set(beyond)
    assert _report(tmp_path / "out") == {str(path): sorted(beyond) for path in (other, first)}


def test_what_is_left_out_on_purpose_is_not_listed(
    paths: list[Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Layers that no slice takes, and the buffers of older versions."""
    buffer = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8)}
    other = edited(paths[1], tmp_path / "old", lambda state: state | buffer)
    sources = [{"model": str(path), "layer_range": [0, 1]} for path in (paths[0], other)]
    config = {"merge_method": "rotation_match", "base_model": str(paths[0]), "slices": [{"sources": sources}]}
    with caplog.at_level(logging.WARNING):
        merged(config | {"dtype": "float32"}, tmp_path / "out")
    assert _report(tmp_path / "out") == {}
    assert "does not read" not in caplog.text


def test_names_are_shortened() -> None:
    assert shortened(["a", "b"]) == "a, b"
    assert shortened(["a", "b", "c", "d", "e"]) == "a, b, c and 2 more"


def test_layers_that_predict_further_tokens(tmp_path: Path) -> None:
    """GLM-4.5's checkpoints end with such a layer; transformers drops it in silence, a merge names it."""
    glm = save(more_model("glm4-moe"), tmp_path / "glm")
    further = {"model.layers.46.eh_proj.weight": torch.ones(48, 96), "model.layers.46.mlp.gate.bias": torch.ones(4)}
    other = edited(glm, tmp_path / "further", lambda state: state | further)
    merged(merge_config("rotation_match", glm, [other]), tmp_path / "out")
    assert _report(tmp_path / "out") == {str(other): sorted(further)}
