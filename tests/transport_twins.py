"""Models whose whole width is shuffled: the residual stream, heads, values, neurons, task heads' hidden layers."""

from __future__ import annotations

import torch
from models import with_weights
from transformers import PreTrainedModel

from mergekit_symalign.families.flow import Place, layer_places, outside_axes, outside_place
from mergekit_symalign.families.resolve import ModelLayout, resolve
from mergekit_symalign.symmetry.element import TensorAxes, acted
from mergekit_symalign.symmetry.groups import Permutation
from mergekit_symalign.symmetry.options import GainScope

Named = dict[str, tuple[TensorAxes, Place | None]]


def named(model: PreTrainedModel) -> tuple[ModelLayout, Named]:
    """Every tensor of a model with its axes and its place in the residual stream."""
    layout = resolve(model.config, model="a test")
    places = layer_places(model.config, layout)
    names = [name for name, _ in model.named_parameters()]
    claims = {name: layout.claim(name) for name in names}
    outside = [name for name, claim in claims.items() if claim.layer is None]
    tied = bool(model.config.tie_word_embeddings)
    found: Named = {}
    for name, claim in claims.items():
        if claim.layer is not None:
            found[name] = layout.axes(claim.spec), places.get(claim.part)
        else:
            place = outside_place(name, claim.spec, present=outside, tied=tied)
            found[name] = outside_axes(layout, claim.spec, place), place
    return layout, found


def shuffled(model: PreTrainedModel, seed: int) -> PreTrainedModel:
    """A twin that computes the same, with other numbers for all that has an order.

    Query and key coordinates keep their place inside a head, because RoPE and gains that heads share need it.
    """
    layout, tensors = named(model)
    generator = torch.Generator().manual_seed(seed)
    state, tied = model.state_dict(), bool(model.config.tie_word_embeddings)
    residual = _random(layout.geometry.hidden, generator)
    width = {
        "residual": residual,
        "hidden": residual if tied and _words_head(tensors) else _random(len(residual), generator),
    }
    layers = [_in_layer(layout, generator) for _ in range(layout.layers)]
    twin = dict(state)
    for name, (axes, _) in tensors.items():
        layer = layout.claim(name).layer
        moves = width if layer is None else width | layers[layer]
        twin[name] = acted(state[name], axes, {axis: Permutation(index) for axis, index in moves.items()})
    owner = {state[name].data_ptr(): name for name in tensors}
    return with_weights(model, {name: twin[owner.get(x.data_ptr(), name)] for name, x in state.items()})


def _words_head(tensors: Named) -> bool:
    return not any(place is Place.output and "vocabulary" not in axes.names for axes, place in tensors.values())


def _in_layer(layout: ModelLayout, generator: torch.Generator) -> dict[str, torch.Tensor]:
    g = layout.geometry
    group = g.query_heads // g.kv_heads
    kv = _random(g.kv_heads, generator)
    inside = torch.stack([_random(group, generator) for _ in kv])
    query = (kv.unsqueeze(1) * group + inside).flatten()
    within = torch.arange(g.head_dim)
    values = torch.stack([_random(g.head_dim, generator) for _ in kv])
    value = kv.unsqueeze(1) * g.head_dim + values
    neurons = _random(g.neurons, generator)
    moves = {
        "query": (query.unsqueeze(1) * g.head_dim + within).flatten(),
        "key": (kv.unsqueeze(1) * g.head_dim + within).flatten(),
        "value": value.flatten(),
        "attended": (query.unsqueeze(1) * g.head_dim + values.repeat_interleave(group, 0)).flatten(),
        **dict.fromkeys(("gate", "up", "down"), neurons),
    }
    if layout.norm in (GainScope.all, GainScope.centred):
        moves |= {"query_gain": moves["query"], "key_gain": moves["key"]}
    return moves


def _random(n: int, generator: torch.Generator) -> torch.Tensor:
    return torch.randperm(n, generator=generator)
