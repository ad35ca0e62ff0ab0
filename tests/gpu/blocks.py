"""Blocks of every kind, as rows of anchor and model in float64 on the CPU."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cache

import torch
from attention import moved, noisy, planted, random_rows, sides_of
from more_models import more_model

from mergekit_symalign.families.resolve import resolve
from mergekit_symalign.families.schema import BlockKind
from mergekit_symalign.graph.solve import block_rows
from mergekit_symalign.planting import Planted, _Draw, random_elements, transform
from mergekit_symalign.symmetry.options import (
    BlockShape,
    GainScope,
    HeadShape,
    HeadValues,
    MlpShape,
    NeuronScale,
    Rotation,
    Sides,
    Symmetries,
    ValueOutput,
)

Rows = dict[str, torch.Tensor]
NOISE = 0.1  # of a sibling
HIDDEN = 48

ROPE = HeadShape(8, 4, 16, 16)
HEADS = {
    "RoPE": ROPE,
    "RoPE, interleaved": replace(ROPE, interleaved=True),
    "partial RoPE": HeadShape(6, 2, 12, 8),
    "no positions": HeadShape(4, 4, 8, 0),
    "QK-norm": replace(ROPE, norm=GainScope.head),
    "QK-norm, partial RoPE": HeadShape(6, 2, 12, 4, norm=GainScope.head),
    "QK-norm over all heads": HeadShape(6, 2, 12, 4, norm=GainScope.all),
    "QK layer norm": HeadShape(6, 2, 12, 4, norm=GainScope.centred),
    "gated values": replace(ROPE, values=HeadValues.gated),
    "values normed": replace(ROPE, norm=GainScope.head, values=HeadValues.normed),
    "values are keys": replace(ROPE, norm=GainScope.head, values=HeadValues.keys),
    "unit queries": replace(ROPE, unit=True),
    "sinks": replace(ROPE, numbered=True),
    "locked heads": replace(ROPE, rotary=0, locked=True),
}
NEURONS = {
    "MLP": MlpShape(600),
    "MLP, plain": MlpShape(600, gated=False, scale=NeuronScale.none),
    "experts": MlpShape(24, experts=6),
    "experts in groups": MlpShape(16, experts=6, groups=3),
}
USES = {
    "rotation: none": Symmetries(rotation=Rotation.none),
    "rotation: full": Symmetries(rotation=Rotation.full),
    "scaling: false": Symmetries(scaling=False),
    "heads: false": Symmetries(heads=False),
    "value_output: general": Symmetries(value_output=ValueOutput.general),
}


@dataclass(frozen=True)
class Block:
    """One block of an anchor and a model."""

    name: str
    sides: Sides
    shape: BlockShape
    use: Symmetries = field(default_factory=Symmetries)


def attention_blocks(shapes: Mapping[str, HeadShape]) -> Iterator[Block]:
    """Attention, its model a sibling in other coordinates or unrelated."""
    for name, shape in shapes.items():
        yield Block(f"{name}, sibling", _heads(shape, related=True), shape)
        yield Block(f"{name}, unrelated", _heads(shape, related=False), shape)


def blocks() -> Iterator[Block]:
    """Every kind of block, its model a sibling in other coordinates or unrelated, under all that may be admitted."""
    yield from attention_blocks(HEADS)
    for name, use in USES.items():
        yield Block(f"RoPE, {name}", _heads(ROPE, related=True), ROPE, use)
    for name, of_neurons in NEURONS.items():
        yield Block(f"{name}, sibling", neurons(of_neurons, related=True), of_neurons)
        yield Block(f"{name}, unrelated", neurons(of_neurons, related=False), of_neurons)
    for factor in (NeuronScale.signed, NeuronScale.positive):
        own, scaling = MlpShape(64, scale=factor), Symmetries(neuron_scaling=True)
        yield Block(f"MLP, {factor.value} factors", neurons(own, related=True), own, scaling)
    yield _latent()


def _heads(shape: HeadShape, *, related: bool) -> Sides:
    anchor = random_rows(shape, 0)
    model = moved(noisy(anchor, NOISE), planted(shape, 3)) if related else random_rows(shape, 5)
    return sides_of(anchor, model)


@cache
def neurons(shape: MlpShape, *, related: bool, hidden: int = HIDDEN) -> Sides:
    """Of an MLP."""
    anchor = _rows_of_neurons(shape, hidden, 0)
    if not related:
        return sides_of(anchor, _rows_of_neurons(shape, hidden, 5))
    element = _Draw(torch.Generator().manual_seed(3), Planted()).mlp(shape)
    return sides_of(anchor, moved(noisy(anchor, NOISE), element))


def _rows_of_neurons(shape: MlpShape, hidden: int, seed: int) -> Rows:
    g = torch.Generator().manual_seed(seed)
    axes = ("gate", "up", "down") if shape.gated else ("up", "down")
    sizes = dict.fromkeys(axes, shape.neurons * shape.experts)
    sizes |= {"expert": shape.experts} if shape.experts > 1 else {}
    return {axis: torch.randn(n, hidden, generator=g, dtype=torch.float64) for axis, n in sizes.items()}


def _latent() -> Block:
    """Multi-head latent attention: a twin of a random model."""
    model = more_model("minicpm3")
    layout, kind = resolve(model.config, model="gpu"), BlockKind.attention
    specs = {layout.name(0, p): layout.axes(s) for p, s in layout.parts(0).items() if s.block is kind}
    states = (model.state_dict(), transform(model.state_dict(), layout, random_elements(layout, 3)))
    anchor, twin = (block_rows(kind, tuple(specs.values()), [x[n] for n in specs]) for x in states)
    sides: Sides = {axis: list(zip(rows, twin[axis], strict=True)) for axis, rows in anchor.items()}
    return Block("latents, twin", sides, layout.head_shape(0))
