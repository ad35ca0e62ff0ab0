"""Classes whose code is on the Hub and not in transformers: EXAONE 3, InternLM 2 and 3."""

from __future__ import annotations

from pathlib import Path

import hub_models
import pytest
import torch
from conftest import load, merge_config, merged, squared_distance
from hub_models import CLASSES, hub_model
from safetensors.torch import save_file
from test_more_families import perturbed_copy

from mergekit_symalign.errors import ArchitectureError
from mergekit_symalign.families.resolve import resolve
from mergekit_symalign.graph.names import names_of
from mergekit_symalign.planting import random_elements, transform
from mergekit_symalign.trial.checks import problems
from mergekit_symalign.trial.models import outputs, randomise, relative_deviation, with_weights

hub_models.register()


@pytest.mark.parametrize("kind", CLASSES)
def test_the_table_describes_the_model(kind) -> None:
    model = randomise(hub_model(kind), 0)
    assert problems(model, resolve(model.config, model="m")) == []


@pytest.mark.parametrize("kind", CLASSES[:2])
def test_a_planted_twin_comes_back_through_a_merge(tmp_path: Path, kind) -> None:
    """MergeKit has files for these two; the third it infers from code that is on the Hub."""
    anchor = randomise(hub_model(kind), 0)
    sibling, layout = perturbed_copy(anchor), resolve(anchor.config, model="m")
    planted = transform(sibling.state_dict(), layout, random_elements(layout, 3))
    for name, model in (("anchor", anchor), ("twin", with_weights(sibling, planted))):
        with_weights(model, model.state_dict()).float().save_pretrained(tmp_path / name)
    found = merged(merge_config("rotation_match", tmp_path / "anchor", [tmp_path / "twin"]), tmp_path / "out")
    result = with_weights(anchor, {name: x.double() for name, x in found.items()})
    assert relative_deviation(outputs(sibling), outputs(result)) < 1e-4
    before = squared_distance(anchor.state_dict(), sibling.state_dict())
    assert squared_distance(anchor.state_dict(), result.state_dict()) < before * 1.001


def test_a_head_that_is_the_embedding_and_old_buffers(tmp_path: Path) -> None:
    """Nothing of transformers tells what a tensor of such a model is called: the family's table does."""
    model = randomise(hub_model(CLASSES[0]), 0).float()
    model.config.tie_word_embeddings = True
    for name in ("anchor", "model"):
        model.save_pretrained(tmp_path / name)
        state = load(tmp_path / name)
        del state["lm_head.weight"]
        state["transformer.h.0.attn.attention.rotary_emb.inv_freq"] = torch.ones(4)
        save_file(state, tmp_path / name / "model.safetensors")
    found = merged(merge_config("rotation_match", tmp_path / "anchor", [tmp_path / "model"]), tmp_path / "out")
    assert found.keys() - {"lm_head.weight"} == state.keys() - {"transformer.h.0.attn.attention.rotary_emb.inv_freq"}
    torch.testing.assert_close(found["transformer.wte.weight"], state["transformer.wte.weight"])


def test_methods_that_run_the_model_say_that_they_cannot() -> None:
    model = randomise(hub_model(CLASSES[0]), 0)
    names = names_of(model.config, resolve(model.config, model="m"), "m")
    with pytest.raises(ArchitectureError, match="its code is not in transformers"):
        _ = names.linear
