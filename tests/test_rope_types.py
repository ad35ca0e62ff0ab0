"""Every RoPE that transformers has for text models keeps the planes of a head, or is refused."""

from __future__ import annotations

from typing import Any

import pytest
from more_models import family_for
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from mergekit_symalign.errors import ArchitectureError
from mergekit_symalign.families.resolve import resolve
from mergekit_symalign.trial.checks import EXACT, deviation_of_blocks
from mergekit_symalign.trial.models import randomise, small_model

HALF = {"partial_rotary_factor": 0.5}
NEEDS: dict[str, dict[str, Any]] = {
    "default": {},
    "linear": {"factor": 2.0},
    "dynamic": {"factor": 2.0},
    "yarn": {"factor": 2.0, "original_max_position_embeddings": 16},
    "longrope": {
        "factor": 2.0,
        "short_factor": [1.0] * 4,
        "long_factor": [3.0] * 4,
        "original_max_position_embeddings": 16,
    },
    "llama3": {
        "factor": 2.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 16,
    },
    "proportional": HALF,
}


def _rope(kind: str) -> dict[str, Any]:
    return {"rope_type": kind, "rope_theta": 100.0} | NEEDS[kind]


def _moved(name: str, settings: dict[str, Any]) -> float:
    model = randomise(small_model(name, family_for(name), settings), 0)
    return deviation_of_blocks(model, resolve(model.config, model=name))


def test_all_types_of_transformers_are_tried_here() -> None:
    assert NEEDS.keys() == {"default", *ROPE_INIT_FUNCTIONS}


@pytest.mark.parametrize("kind", NEEDS)
def test_every_type_keeps_the_planes(kind: str) -> None:
    assert _moved("LlamaForCausalLM", {"rope_parameters": _rope(kind)}) < EXACT


@pytest.mark.parametrize("name", ["Qwen3ForCausalLM", "GlmForCausalLM", "GPTNeoXForCausalLM", "OlmoForCausalLM"])
def test_proportional_turns_all_planes_the_last_by_nothing(name: str) -> None:
    """Also where other types turn only a part of a head, whose planes lie elsewhere."""
    assert _moved(name, {"rope_parameters": _rope("proportional")}) < EXACT


def test_each_kind_of_layers_may_have_its_own_type() -> None:
    ropes = {"sliding_attention": _rope("default"), "full_attention": _rope("proportional")}
    kinds = {"layer_types": list(ropes), "sliding_window": 8}
    assert _moved("Gemma3ForCausalLM", {"rope_parameters": ropes, **kinds}) < EXACT


def test_a_part_of_a_head_is_refused_where_it_was_never_checked() -> None:
    ropes = {"sliding_attention": _rope("default"), "full_attention": _rope("default") | HALF}
    kinds = {"layer_types": list(ropes), "sliding_window": 8}
    model = small_model("Gemma3ForCausalLM", family_for("Gemma3ForCausalLM"), {"rope_parameters": ropes, **kinds})
    with pytest.raises(ArchitectureError, match=r"partial_rotary_factor is 0.5"):
        resolve(model.config, model="m")
