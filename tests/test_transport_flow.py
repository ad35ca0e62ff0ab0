"""Transport maps through whole models, without MergeKit: a shuffled twin comes back as the anchor."""

from __future__ import annotations

import pytest
import torch
from models import FAMILIES, logits, make_model, relative_deviation
from transport_twins import named, shuffled
from transformers import PreTrainedModel

from mergekit_symalign.families.flow import Place, is_parallel
from mergekit_symalign.families.resolve import ModelLayout
from mergekit_symalign.fusion.flow import (
    Evidence,
    Flow,
    Heads,
    Part,
    Policy,
    Residual,
    through_end,
    through_front,
    through_layer,
)

DENSE = [family for family in FAMILIES if family not in ("mixtral", "qwen3-moe", "olmoe")]
EXACT_STREAM = [family for family in DENSE if "deberta" not in family]


def transported(anchor: PreTrainedModel, model: PreTrainedModel, policy: Policy) -> dict[str, torch.Tensor]:
    """The model's tensors in the anchor's coordinates, layer by layer."""
    layout, tensors = named(anchor)
    ours, theirs = anchor.state_dict(), model.state_dict()
    parts = {name: Part(*about, ours[name], theirs[name]) for name, about in tensors.items()}
    outside = {name: part for name, part in parts.items() if layout.claim(name).layer is None}
    places = (Place.words, Place.positions, Place.front)
    front = {name: part for name, part in outside.items() if part.place in places}
    flow = through_front(front, layout.geometry.hidden, policy, Evidence())
    words, stream = flow.places[Place.words], flow.places[Place.front]
    out = _moved(flow, front)
    for layer in range(layout.layers):
        inside = {name: part for name, part in parts.items() if layout.claim(name).layer == layer}
        parallel = is_parallel(anchor.config, layout)
        flow = through_layer(inside, stream, layout.head_shape(layer), policy, Evidence(), parallel=parallel)
        stream = flow.places[Place.leaving]
        out |= _moved(flow, inside)
    end = {name: part for name, part in outside.items() if name not in front}
    tied = bool(anchor.config.tie_word_embeddings)
    return out | _moved(through_end(end, stream, words, policy, tied=tied), end)


def _moved(flow: Flow, parts: dict[str, Part]) -> dict[str, torch.Tensor]:
    return {name: flow(part) for name, part in parts.items()}


@pytest.mark.parametrize("family", DENSE)
def test_shuffled_twin_computes_the_same(family: str) -> None:
    anchor = make_model(family, 0)
    assert relative_deviation(logits(anchor), logits(shuffled(anchor, 1))) < 1e-9


@pytest.mark.parametrize("residual", [r for r in Residual if r not in (Residual.identity, Residual.weighted)])
@pytest.mark.parametrize("family", DENSE)
def test_shuffled_twin_becomes_the_anchor(family: str, residual: Residual) -> None:
    anchor = make_model(family, 0)
    found = transported(anchor, shuffled(anchor, 1), Policy(residual=residual))
    for name, x in anchor.named_parameters():
        torch.testing.assert_close(found[name], x.detach(), rtol=0, atol=1e-12, msg=name)


@pytest.mark.parametrize("family", DENSE)
def test_shuffled_twin_becomes_the_anchor_with_heads_respected(family: str) -> None:
    anchor = make_model(family, 0)
    found = transported(anchor, shuffled(anchor, 1), Policy(heads=Heads.respect))
    for name, x in anchor.named_parameters():
        torch.testing.assert_close(found[name], x.detach(), rtol=0, atol=1e-6, msg=name)
