"""Whether a family's table describes a model: all tensors claimed, and every symmetry it admits kept."""

from __future__ import annotations

from torch import Tensor
from transformers import PreTrainedModel

from mergekit_symalign.families.resolve import ModelLayout
from mergekit_symalign.families.schema import BlockKind, Positions
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
        claim = layout.claim(name)
        if claim is None:
            found.append(f"{name} {list(x.shape)} is not in the table")
        elif not claim.spec.any_shape and not _fits(layout.shape(claim.spec), x):
            found.append(f"{name} is {list(x.shape)}, by the table {list(layout.shape(claim.spec))}")
    return found


def missing_tensors(model: PreTrainedModel, layout: ModelLayout) -> list[str]:
    """Tensors that the table promises and the model does not have."""
    inside = (layout.name(i, p) for i in range(layout.layers) for p, s in layout.parts(i).items() if not s.optional)
    outside = (name for name, spec in layout.outside.items() if not spec.optional)
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
    twin = transform(state, layout, random_elements(layout, 1))
    found = []
    for kind in BlockKind:
        for part in layout.block(kind):
            name = next((n for i in range(layout.layers) if (n := layout.name(i, part)) in state), None)
            if name is None or _is_ignored(layout, part):
                continue
            after = outputs(with_weights(model, twin | {name: state[name]}))
            if relative_deviation(before, after) < SHOWS:
                found.append(f"{name} has no effect on the outputs when it stays behind")
    return found


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
    return layout.inside[part].axes == ("key",) and layout.family.attention.positions is Positions.none


def _fits(shape: tuple[int | None, ...], x: Tensor) -> bool:
    return len(shape) == x.ndim and all(want in (None, got) for want, got in zip(shape, x.shape, strict=True))


def _by(deviation: float) -> str:
    return f"moves the outputs by {deviation:.0e} of their standard deviation"
