"""``residual`` in merges: planted twins come back through MergeKit, files repeat it, and what is not exact is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import State, merge_config, merged, squared_distance
from models import logits, perturbed, relative_deviation, save
from streams import case, joined, split, stored
from transformers import PreTrainedModel

from mergekit_symalign.families.resolve import resolve
from mergekit_symalign.families.stream import residual_group, residual_kind, ties_embeddings
from mergekit_symalign.planting import random_elements, random_stream
from mergekit_symalign.symmetry.residual.kinds import Residual
from mergekit_symalign.symmetry.residual.move import Elements, move_scope
from mergekit_symalign.symmetry.residual.scope import norms_of

SIZE = {"num_hidden_layers": 2}
FAMILIES = ["llama", "qwen2", "qwen3", "gemma2", "olmo2", "phi3", "gpt2", "bert-classifier", "modernbert", "mixtral"]
FAMILIES += ["vit-classifier", "phi2"]
CASES = [(name, wanted) for name in FAMILIES for wanted in ("permutation", "rotation")]


class Twins:
    """An anchor, a sibling, and the sibling in other coordinates of its residual stream and of all its blocks."""

    def __init__(self, family: str, wanted: str, folder: Path) -> None:
        self.anchor = case(family, **SIZE)
        self.sibling = perturbed(self.anchor, 0.1, 7)
        self.layout = resolve(self.anchor.config, model="m")
        tied = ties_embeddings(self.anchor.config, self.layout)
        self.kind = residual_kind(self.layout, tied, Residual(wanted))
        other = stored(case(family, 5, **SIZE))
        self.twin = perturbed(self.anchor, 0.0, 0)
        self.twin.load_state_dict(self._planted(stored(self.sibling), other), strict=False)
        self.twin.tie_weights()
        for name, model in (("anchor", self.anchor), ("sibling", self.sibling), ("twin", self.twin)):
            save(model, folder / name)
        self.folder = folder

    def _planted(self, state: State, norms: State) -> State:
        planted = random_elements(self.layout, 2)
        blocks: list[Elements] = [{}]
        for layer in range(self.layout.layers):
            blocks.append({kind.value: g for (i, kind), g in planted.items() if i == layer})
        stream = random_stream(self.kind, self.layout.geometry.hidden, 1)
        scopes, parts = split(self.layout, state)
        _, others = split(self.layout, norms)
        everything = zip(scopes, parts, others, blocks, strict=True)
        return joined(
            self.layout, [move_scope(s, x, self.kind, stream, b, norms_of(s, o)) for s, x, o, b in everything]
        )

    def merge(self, name: str, out: Path, method: str = "rotation_match", **parameters: Any) -> State:
        config = merge_config(method, self.folder / "anchor", [self.folder / name], parameters=parameters)
        return merged(config, out)

    def at(self, path: Path) -> PreTrainedModel:
        return type(self.anchor).from_pretrained(path, dtype=torch.float32).eval()


def _is_admitted(family: str, wanted: str) -> bool:
    config = case(family, **SIZE).config
    layout = resolve(config, model="m")
    return wanted == "permutation" or residual_group(layout, ties_embeddings(config, layout)).rotation is not None


@pytest.fixture(scope="module", params=[c for c in CASES if _is_admitted(*c)], ids=lambda c: "-".join(c))
def twins(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Twins, str]:
    family, wanted = request.param
    return Twins(family, wanted, tmp_path_factory.mktemp(f"{family}-{wanted}")), wanted


def test_a_planted_twin_comes_back(twins: tuple[Twins, str], tmp_path: Path) -> None:
    models, wanted = twins
    models.merge("twin", tmp_path / "out", residual=wanted)
    models.merge("sibling", tmp_path / "reference", residual=wanted)
    out, reference = models.at(tmp_path / "out"), models.at(tmp_path / "reference")
    assert relative_deviation(logits(models.sibling), logits(out)) < 1e-3
    anchor = {name: x.float() for name, x in models.anchor.state_dict().items()}
    distances = [squared_distance(anchor, dict(model.state_dict())) for model in (out, reference, models.twin)]
    assert distances[0] == pytest.approx(distances[1], rel=5e-3)
    assert distances[0] < 0.2 * distances[2]
    report = json.loads((tmp_path / "out" / "symalign_report.json").read_text("utf-8"))
    (entry,) = report["models"].values()
    assert report["exact"]
    assert entry["residual"]["distance_after"] < 0.1 * entry["residual"]["distance_before"]
