"""Text models merged into the text part of a vision-language model: found by other names, the tower left alone."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from conftest import State, merge_config, merged
from models import make_model, save
from more_models import more_model
from safetensors.torch import save_file
from test_more_families import perturbed_copy
from text_models import inside, text_model
from transformers import PreTrainedModel

from mergekit_symalign.cli import main
from mergekit_symalign.errors import ConfigError, GeometryError, SymalignError
from mergekit_symalign.families.resolve import resolve
from mergekit_symalign.planting import random_elements, transform
from mergekit_symalign.trial.models import outputs, relative_deviation, with_weights


class Pair:
    """A vision-language model, and another text model in other coordinates than its text part."""

    def __init__(self, name: str, folder: Path) -> None:
        self.outer = more_model(name)
        self.text = perturbed_copy(text_model(self.outer))
        layout = resolve(self.text.config, model="text")
        twin = with_weights(self.text, transform(self.text.state_dict(), layout, random_elements(layout, 3)))
        self.paths = (
            save(with_weights(self.outer, self.outer.state_dict()), folder / "outer"),
            save(twin, folder / "text"),
        )

    def with_text(self) -> PreTrainedModel:
        """The outer model with the text model for its text part."""
        weights = {inside(self.outer, name): x for name, x in self.text.state_dict().items()}
        return with_weights(self.outer, self.outer.state_dict() | weights)

    def stored_as_in_memory(self) -> None:
        """Give the outer model's file the names that transformers' model has."""
        model = type(self.outer).from_pretrained(self.paths[0], dtype=torch.float32)
        tied = set(getattr(model, "all_tied_weights_keys", None) or {})
        state = {name: x.contiguous() for name, x in model.state_dict().items() if name not in tied}
        save_file(state, self.paths[0] / "model.safetensors")

    def require_text_inside(self, out: Path) -> None:
        """The output sees as the outer model, and speaks as the text model; its report knows no difference."""
        found = type(self.outer).from_pretrained(out, dtype=torch.float32).state_dict()
        self.require_tower(found)
        result = with_weights(self.outer, {name: x.double() for name, x in found.items()})
        assert relative_deviation(outputs(self.with_text()), outputs(result)) < 1e-4
        report = json.loads((out / "symalign_report.json").read_text("utf-8"))
        assert (report["exact"], report["unused_tensors"], report["config_differences"]) == (True, {}, {})

    def require_tower(self, found: State) -> None:
        own = {inside(self.outer, name) for name in self.text.state_dict()}
        before = type(self.outer).from_pretrained(self.paths[0], dtype=torch.float32).state_dict()
        assert found.keys() == before.keys()
        assert found.keys() - own
        assert all(torch.equal(found[name], before[name]) for name in found.keys() - own)


@pytest.fixture(scope="module", params=["llava", "qwen2.5-vl"])
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Pair:
    return Pair(request.param, tmp_path_factory.mktemp("pair"))


@pytest.fixture(scope="module")
def llava(tmp_path_factory: pytest.TempPathFactory) -> Pair:
    return Pair("llava", tmp_path_factory.mktemp("llava"))


def test_a_text_model_takes_the_place_of_the_text_part(pair: Pair, tmp_path: Path) -> None:
    outer, text = pair.paths
    merged(merge_config("rotation_match", outer, [text]), tmp_path / "out")
    pair.require_text_inside(tmp_path / "out")


def test_task_arithmetic_and_names_as_in_memory(pair: Pair, tmp_path: Path) -> None:
    outer, text = pair.paths
    models = [{"model": text, "parameters": {"weight": 1.0}}]
    merged(merge_config("aligned_task_arithmetic", outer, models), tmp_path / "out")
    pair.require_text_inside(tmp_path / "out")
    pair.stored_as_in_memory()
    merged(merge_config("aligned_task_arithmetic", outer, models), tmp_path / "again")
    pair.require_text_inside(tmp_path / "again")


def test_packed_experts(tmp_path: Path) -> None:
    """The text model stores each expert by itself, and they are joined for the packed tensor of the outer model."""
    pair = Pair("qwen3-vl-moe", tmp_path)
    merged(merge_config("rotation_match", pair.paths[0], [pair.paths[1]]), tmp_path / "out")
    pair.require_text_inside(tmp_path / "out")


def test_the_residual_stream_of_a_text_model(llava: Pair, tmp_path: Path) -> None:
    parameters = {"residual": "rotation"}
    merged(merge_config("rotation_match", llava.paths[0], [llava.paths[1]], parameters=parameters), tmp_path / "out")
    llava.require_text_inside(tmp_path / "out")


def test_weights_of_an_average_leave_the_tower_alone(llava: Pair, tmp_path: Path) -> None:
    """Also in a method that takes two models, and with modules that MergeKit's users write."""
    outer, text = llava.paths
    models = [{"model": outer, "parameters": {"weight": 0.5}}, {"model": text, "parameters": {"weight": 0.1}}]
    merged(merge_config("rotation_match", outer, models, parameters={"normalize": False}), tmp_path / "out")
    merged(merge_config("aligned_slerp", outer, [outer, text], parameters={"t": 0.5}), tmp_path / "slerp")
    for name in ("out", "slerp"):
        llava.require_tower(type(llava.outer).from_pretrained(tmp_path / name, dtype=torch.float32).state_dict())


def test_a_module_with_slices(tmp_path: Path) -> None:
    pair = Pair("qwen2.5-vl", tmp_path)
    outer, text = map(str, pair.paths)
    sources = [{"model": model, "layer_range": [0, 2]} for model in (outer, text)]
    sources[0]["parameters"] = {"weight": 0.0}
    alone = {"models": [{"model": outer}, {"model": text}]}
    modules = {
        "text_decoder": {"slices": [{"sources": sources}]},
        "multi_modal_projector": alone,
        "vision_tower": alone,
    }
    config = {"merge_method": "rotation_match", "base_model": outer, "modules": modules, "dtype": "float32"}
    merged(config, tmp_path / "out")
    pair.require_text_inside(tmp_path / "out")


def test_a_saved_alignment(llava: Pair, tmp_path: Path) -> None:
    """Solved once for the pair, used in a merge; and applied to the text model alone, whose function it keeps."""
    outer, text = map(str, llava.paths)
    file = tmp_path / "found.safetensors"
    assert "coordinates differ" in _run("inspect", outer, text)
    _run("solve", outer, text, "-o", str(file))
    models = [{"model": text, "parameters": {"alignment": str(file)}}]
    merged(merge_config("rotation_match", outer, models), tmp_path / "out")
    llava.require_text_inside(tmp_path / "out")
    _run("apply", str(file), text, "-o", str(tmp_path / "applied"))
    found = type(llava.text).from_pretrained(tmp_path / "applied", dtype=torch.float32).state_dict()
    moved = with_weights(llava.text, {name: x.double() for name, x in found.items()})
    assert relative_deviation(outputs(llava.text), outputs(moved)) < 1e-4


def _run(*arguments: str) -> str:
    done = CliRunner().invoke(main, list(arguments))
    assert done.exit_code == 0, done.output
    return done.output


def _other(folder: Path, name: str, **settings: Any) -> Path:
    sizes = {"num_hidden_layers": 2, "head_dim": 8, "intermediate_size": 80}
    return save(make_model(name, 1, **sizes | settings), folder / "other")


REFUSED: dict[str, tuple[str, dict[str, Any], type[SymalignError], str]] = {
    "another architecture": ("qwen3", {}, GeometryError, "of another architecture than the text model inside"),
    "another depth": ("llama", {"num_hidden_layers": 3}, GeometryError, "has 3 layers, the text model inside .* has 2"),
    "another width": ("llama", {"intermediate_size": 40}, GeometryError, "neurons 40 != 80"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_text_model_of_another_kind(llava: Pair, tmp_path: Path, case: str) -> None:
    name, settings, kind, message = REFUSED[case]
    other = _other(tmp_path, name, **settings)
    with pytest.raises(kind, match=message):
        merged(merge_config("rotation_match", llava.paths[0], [other]), tmp_path / "out")


def test_the_outer_model_has_to_be_the_anchor(llava: Pair, tmp_path: Path) -> None:
    outer, text = llava.paths
    with pytest.raises(ConfigError, match="Make it the base_model"):
        merged(merge_config("rotation_match", text, [outer]), tmp_path / "out")
    with pytest.raises(ConfigError, match="reads data of whole models"):
        merged(merge_config("aligned_fisher", outer, [outer, text]), tmp_path / "out")
