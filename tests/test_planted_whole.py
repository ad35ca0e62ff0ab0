"""Every symmetry at once, in every family: residual stream, heads, planes, scales, values and neurons, through
``mergekit-yaml``."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from click.testing import CliRunner
from conftest import load, merge_config
from mergekit.scripts.run_yaml import main as mergekit_yaml
from models import logits, perturbed, relative_deviation, save
from streams import State, case, in_other_coordinates, split, stored
from transformers import PreTrainedModel

from mergekit_symalign.families.resolve import ModelLayout, resolve
from mergekit_symalign.families.stream import residual_group, residual_kind, ties_embeddings
from mergekit_symalign.planting import Planted
from mergekit_symalign.symmetry.residual.cross import standing_distance
from mergekit_symalign.symmetry.residual.kinds import Residual, ResidualKind
from mergekit_symalign.symmetry.residual.move import comparable

FAMILIES = ["llama", "mistral", "qwen2", "qwen3", "gemma2", "olmo2", "phi3", "gpt2", "gpt2-untied", "bert-classifier"]
FAMILIES += ["modernbert", "vit-classifier", "mixtral"]
PERMUTED = ["llama", "mistral", "phi3", "vit-classifier"]  # those that may turn, with an order of their stream instead
CASES = [(name, "largest") for name in FAMILIES] + [(name, "permutation") for name in PERMUTED]
NOISE = 0.05
CONDITION = 20.0  # of the matrices that values are multiplied by


@dataclass(frozen=True)
class Family:
    """An anchor, what its stream admits, and models of its own kind."""

    name: str
    anchor: PreTrainedModel
    layout: ModelLayout
    wanted: Residual
    kind: ResidualKind

    @staticmethod
    def of(name: str, wanted: str) -> Family:
        anchor = _model(name, 0)
        layout = resolve(anchor.config, model="m")
        tied = ties_embeddings(anchor.config, layout)
        turns = wanted == "largest" and residual_group(layout, tied).rotation is not None
        residual = Residual.rotation if turns else Residual.permutation
        return Family(name, anchor, layout, residual, residual_kind(layout, tied, residual))

    def twin(self, model: PreTrainedModel) -> PreTrainedModel:
        """A model in other coordinates: everything that its architecture admits, drawn at random.

        Where the stream turns, its norms are those of a third model.
        """
        norms, what = stored(_model(self.name, 5)), Planted(condition=CONDITION)
        return self.holding(in_other_coordinates(self.layout, stored(model), self.kind, norms, what))

    def holding(self, state: State) -> PreTrainedModel:
        copy = perturbed(self.anchor, 0.0, 0)
        copy.load_state_dict(state, strict=False)
        copy.tie_weights()
        return copy

    def distance(self, state: State) -> float:
        """Squared distance to the anchor, in the form in which models are compared."""
        scopes, parts = split(self.layout, stored(self.anchor))
        _, others = split(self.layout, state)
        both = ((comparable(s, x, self.kind) for x in (a, b)) for s, a, b in zip(scopes, parts, others, strict=True))
        return sum(standing_distance(a, b) for a, b in both)


def _model(name: str, seed: int) -> PreTrainedModel:
    return case(name, seed, num_hidden_layers=1)


def _run(config: dict[str, Any], out: Path) -> None:
    file = out.with_suffix(".yml")
    file.write_text(yaml.safe_dump(config), "utf-8")
    result = CliRunner().invoke(mergekit_yaml, [str(file), str(out), "--quiet", "--no-copy-tokenizer"])
    assert result.exit_code == 0, result.output


@pytest.mark.parametrize(("name", "wanted"), CASES)
def test_a_twin_in_other_coordinates_of_everything_comes_back(name: str, wanted: str, tmp_path: Path) -> None:
    """As close to the anchor as the model that it is a twin of, and the same function; the anchor's own twin on it."""
    family = Family.of(name, wanted)
    sibling = perturbed(family.anchor, NOISE, 7)
    twin, own = family.twin(sibling), family.twin(family.anchor)
    for folder, model in (("anchor", family.anchor), ("twin", twin), ("own", own)):
        save(model, tmp_path / folder, torch.float64)
    assert relative_deviation(logits(sibling), logits(twin)) < 1e-9

    models = [{"model": tmp_path / "twin", "parameters": {"weight": 1.0}}]
    models.append({"model": tmp_path / "own", "parameters": {"weight": 0.0}})
    parameters = {"residual": family.wanted.value, "residual_rounds": 4, "value_output": "general"}
    config = merge_config("aligned_linear", tmp_path / "anchor", models, parameters=parameters, dtype="float64")
    _run(config, tmp_path / "out")

    out = family.holding(load(tmp_path / "out"))
    assert relative_deviation(logits(sibling), logits(out)) < 1e-9
    far, near, found = (family.distance(stored(model)) for model in (twin, sibling, out))
    assert near < 0.01 * far
    assert found < 1.005 * near
    entries = json.loads((tmp_path / "out" / "symalign_report.json").read_text("utf-8"))["models"]
    of_twin, of_own = (entries[str(tmp_path / folder)]["residual"] for folder in ("twin", "own"))
    assert of_twin["distance_after"] == pytest.approx(found)
    assert of_own["distance_after"] < 1e-12 * of_own["distance_before"]
