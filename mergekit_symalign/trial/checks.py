"""Whether a family's table describes a model: all tensors claimed, and every symmetry it admits kept."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor
from transformers import PreTrainedModel

from mergekit_symalign.families.resolve import ModelLayout
from mergekit_symalign.families.schema import Positions
from mergekit_symalign.families.stream import layer_scope, outside_scope, residual_group, ties_embeddings
from mergekit_symalign.planting import Planted, random_elements, random_stream, transform
from mergekit_symalign.symmetry.residual.kinds import ResidualKind
from mergekit_symalign.symmetry.residual.move import move_scope
from mergekit_symalign.symmetry.residual.scope import norms_of
from mergekit_symalign.trial.models import outputs, randomise, relative_deviation, with_weights

EXACT = 1e-9  # of the outputs' standard deviation, in float64
SHOWS = 1e-3  # what a tensor that is left behind changes at least
State = dict[str, Tensor]


def problems(model: PreTrainedModel, layout: ModelLayout) -> list[str]:
    """Everything that a family's table says wrongly of a model, one sentence each.

    Args:
        model: random, in float64.
        layout: the family applied to its config.
    """
    unclaimed = [*unclaimed_tensors(model, layout), *missing_tensors(model, layout)]
    if unclaimed:
        return unclaimed
    found = [] if (off := deviation_of_blocks(model, layout)) < EXACT else [f"random elements of its blocks {_by(off)}"]
    found += tensors_without_effect(model, layout)
    return found + [
        f"residual: a random {kind.value.replace('_', ' ')} {_by(off)}"
        for kind in stream_kinds(model, layout)
        if (off := deviation_of_stream(model, layout, kind)) >= EXACT
    ]


def unclaimed_tensors(model: PreTrainedModel, layout: ModelLayout) -> list[str]:
    """Tensors that no rule claims, or claims with another shape."""
    found = []
    for name, x in model.state_dict().items():
        placed = layout.placed(name)
        if placed is None:
            found.append(f"{name} {list(x.shape)} is not in the table")
        elif not placed.claim.spec.any_shape and not _fits(wanted := placed.layout.shape(placed.claim.spec), x):
            found.append(f"{name} is {list(x.shape)}, by the table {list(wanted)}")
    return found


def missing_tensors(model: PreTrainedModel, layout: ModelLayout) -> list[str]:
    """Tensors that the table promises and the model does not have."""
    inside = (placed.name for placed in layout.in_layers() if not placed.claim.spec.optional)
    outside = (name for of in layout.stacks for name, spec in of.outside.items() if not spec.optional)
    there = model.state_dict().keys()
    return [f"{name} is in the table, but not in the model" for name in (*inside, *outside) if name not in there]


def deviation_of_blocks(model: PreTrainedModel, layout: ModelLayout, seed: int = 1) -> float:
    """How far the outputs move under random elements of every block."""
    elements = random_elements(layout, seed, Planted(neuron_scaling=True))
    twin = transform(model.state_dict(), layout, elements)
    return relative_deviation(outputs(model), outputs(with_weights(model, twin)))


def tensors_without_effect(model: PreTrainedModel, layout: ModelLayout) -> list[str]:
    """Tensors of blocks that may stay behind when the rest of their block is moved: they are not of the block."""
    before, state = outputs(model), model.state_dict()
    twin = with_weights(model, transform(state, layout, random_elements(layout, 1)))
    unseen = {tower for tower, of in layout.towers.items() if not _is_seen(model, of, before)}
    found = []
    for name in _first_of_each_block(state, layout, unseen):
        with _replaced(twin, name, state[name]):
            after = outputs(twin)
        if relative_deviation(before, after) < SHOWS:
            found.append(f"{name} has no effect on the outputs when it stays behind")
    return found


@contextmanager
def _replaced(model: PreTrainedModel, name: str, x: Tensor) -> Iterator[None]:
    """A model with other numbers in one tensor, for a while."""
    stored = model.state_dict()[name]
    kept = stored.clone()
    stored.copy_(x)
    try:
        yield
    finally:
        stored.copy_(kept)


def _is_seen(model: PreTrainedModel, tower: ModelLayout, before: Tensor) -> bool:
    """Whether the inputs pass through a tower: text does not pass through one for pictures."""
    state, prefix = model.state_dict(), tower.family.prefix
    halved = {name: x / 2 if name.startswith(prefix) else x for name, x in state.items()}
    return not torch.equal(before, outputs(with_weights(model, halved)))


def _first_of_each_block(state: State, layout: ModelLayout, unseen: Collection[str]) -> list[str]:
    """Of each tensor of a block the first layer's, except in towers that nothing passes through."""
    found: dict[tuple[str, str], str] = {}
    for placed in layout.in_layers():
        if placed.block is None or placed.name not in state or placed.tower in unseen:
            continue
        if not _is_ignored(placed.layout, placed.claim.part):
            found.setdefault((placed.tower, placed.claim.part), placed.name)
    return list(found.values())


def stream_kinds(model: PreTrainedModel, layout: ModelLayout) -> tuple[ResidualKind, ...]:
    """What may be done to the residual stream; nothing that shows in the outputs, where they are the stream."""
    returned = layout.family.stream.returned
    return () if returned else residual_group(layout, ties_embeddings(model.config, layout)).kinds[1:]


def deviation_of_stream(model: PreTrainedModel, layout: ModelLayout, kind: ResidualKind, seed: int = 2) -> float:
    """How far the outputs move under a random change of coordinates of the residual stream."""
    other = _stored(randomise(with_weights(model, model.state_dict()), seed))
    stream = random_stream(kind, layout.geometry.hidden, seed)
    moved = _stored(model)
    for layer in (None, *range(layout.layers)):
        own, norms = (_part(layout, x, layer) for x in (moved, other))
        scope = outside_scope(layout, own) if layer is None else layer_scope(layout, layer, _stored(model))
        after = move_scope(scope, own, kind, stream, {}, norms_of(scope, norms))
        moved |= {part if layer is None else layout.name(layer, part): x for part, x in after.items()}
    return relative_deviation(outputs(model), outputs(with_weights(model, moved)))


def _part(layout: ModelLayout, state: State, layer: int | None) -> State:
    claims = ((layout.claim(name), x) for name, x in state.items())
    return {c.part: x for c, x in claims if c is not None and c.layer == layer and not c.spec.any_shape}


def _stored(model: PreTrainedModel) -> State:
    tied = set(getattr(model, "all_tied_weights_keys", None) or {})
    return {name: x for name, x in model.state_dict().items() if name not in tied}


def _is_ignored(layout: ModelLayout, part: str) -> bool:
    """Without positions a bias of the keys adds the same to all scores of a query: softmax does not see it."""
    axes, positions = layout.inside[part].axes, layout.family.attention.positions
    nowhere = positions is Positions.none or layout.without_rope >= set(range(layout.layers))
    return axes == ("cross.key",) or (axes == ("key",) and nowhere)


def _fits(shape: tuple[int | None, ...], x: Tensor) -> bool:
    return len(shape) == x.ndim and all(want in (None, got) for want, got in zip(shape, x.shape, strict=True))


def _by(deviation: float) -> str:
    return f"moves the outputs by {deviation:.0e} of their standard deviation"
