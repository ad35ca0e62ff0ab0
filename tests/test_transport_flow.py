"""Transport maps through whole models, without MergeKit: a shuffled twin comes back as the anchor."""

from __future__ import annotations

import pytest
import torch
from models import logits, make_model, perturbed, relative_deviation, with_weights
from transformers import PreTrainedModel
from transport_twins import named, shuffled

from mergekit_symalign.families.flow import Place, is_parallel
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
from mergekit_symalign.planting import random_elements, transform


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


@pytest.mark.parametrize(
    "family", ["llama", "gemma2", "olmo2", "gpt2", "gpt-neox", "roberta", "modernbert", "bert-classifier"]
)
def test_shuffled_twin_computes_the_same(family: str) -> None:
    """What the other tests plant is a symmetry of the whole model."""
    anchor = make_model(family, 0)
    assert relative_deviation(logits(anchor), logits(shuffled(anchor, 1))) < 1e-9


@pytest.mark.parametrize("residual", [Residual.branch, Residual.skip])
@pytest.mark.parametrize("family", ["llama", "cohere2", "gpt2", "distilbert"])
def test_policies_find_the_planted_order(family: str, residual: Residual) -> None:
    anchor = make_model(family, 0)
    _require_recovered(anchor, transported(anchor, shuffled(anchor, 1), Policy(residual=residual)), 1e-12)


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma3", "olmo2", "cohere-qk-norm", "glm4", "gpt2", "phi3"])
def test_heads_are_brought_back_exactly(family: str) -> None:
    """Also where a rotation of the values is planted, which no permutation of units undoes."""
    anchor = make_model(family, 0)
    layout, _ = named(anchor)
    turned = transform(shuffled(anchor, 1).state_dict(), layout, random_elements(layout, seed=3))
    found = transported(anchor, with_weights(anchor, turned), Policy(heads=Heads.respect))
    _require_recovered(anchor, found, 1e-5)


@pytest.mark.parametrize("heads", list(Heads))
def test_the_residual_stream_stays_where_nothing_is_transported(heads: Heads) -> None:
    """Neurons and heads of a twin come back; its stream was never touched."""
    anchor = make_model("llama", 0)
    twin = perturbed(anchor, 0.5, 1)
    found = transported(anchor, twin, Policy(residual=Residual.identity, heads=heads, regularization=0.06))
    for name in ("model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"):
        assert torch.equal(found[name], twin.state_dict()[name])


def _require_recovered(anchor: PreTrainedModel, found: dict[str, torch.Tensor], tolerance: float) -> None:
    for name, x in anchor.named_parameters():
        torch.testing.assert_close(found[name], x.detach(), rtol=0, atol=tolerance, msg=name)
