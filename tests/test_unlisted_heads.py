"""Heads that MergeKit's architecture files leave out: its own merge loses them, an aligned merge keeps them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from checkpoint_edits import edited
from conftest import merge_config, merged
from test_more_families import Twins

from mergekit_symalign.trial.models import outputs, relative_deviation, with_weights

LOST = ["bert-words", "bert-answers", "bert-pretraining", "bert-next", "roberta-answers", "electra-found"]


@pytest.mark.parametrize("name", LOST)
def test_a_head_that_mergekit_does_not_list_is_merged(tmp_path: Path, name: str) -> None:
    twins = Twins(name, tmp_path)
    merged(merge_config("rotation_match", twins.paths[0], [twins.paths[1]]), tmp_path / "out")
    twins.require_recovered(tmp_path / "out")


def test_the_original_bert(tmp_path: Path) -> None:
    """Its norms are called gamma and beta; beside the head for words it has a pooler and the next sentence's head."""
    twins = Twins("bert-words", tmp_path)
    more = {"bert.pooler.dense.weight": (48, 48), "bert.pooler.dense.bias": (48,)}
    more |= {"cls.seq_relationship.weight": (2, 48), "cls.seq_relationship.bias": (2,)}
    generator = torch.Generator().manual_seed(0)
    extra = {key: torch.randn(shape, generator=generator) for key, shape in more.items()}
    paths = [edited(path, tmp_path / f"old-{path.name}", lambda s: _older(s) | extra) for path in twins.paths]
    found = merged(merge_config("rotation_match", paths[0], [paths[1]]), tmp_path / "out")
    assert "cls.predictions.transform.LayerNorm.weight" in found
    result = with_weights(twins.anchor, {key: x.double() for key, x in found.items()})
    assert relative_deviation(outputs(twins.sibling), outputs(result)) < 1e-4


def _older(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    ends = (("LayerNorm.weight", "LayerNorm.gamma"), ("LayerNorm.bias", "LayerNorm.beta"))
    return {_renamed(key, ends): x for key, x in state.items()}


def _renamed(name: str, ends: tuple[tuple[str, str], ...]) -> str:
    for new, old in ends:
        name = name.replace(new, old)
    return name
