"""What is a symmetry of a block: everything planted or solved, and nothing that was changed in one place."""

from __future__ import annotations

from dataclasses import fields, replace
from functools import cache
from typing import Any

import pytest
import torch
from models import FAMILIES, make_model, perturbed

from mergekit_symalign.errors import SymmetryError
from mergekit_symalign.families.resolve import ModelLayout, resolve
from mergekit_symalign.families.schema import BlockKind
from mergekit_symalign.graph.solve import block_rows
from mergekit_symalign.planting import Planted, random_elements, transform
from mergekit_symalign.symmetry.consensus import Rows, find_consensus
from mergekit_symalign.symmetry.element import BlockElement
from mergekit_symalign.symmetry.groups import (
    AxisAction,
    Chain,
    HeadRotation,
    InterleavedPlaneRotation,
    Permutation,
    PlaneRotation,
    Scaling,
)
from mergekit_symalign.symmetry.membership import require_symmetry
from mergekit_symalign.symmetry.options import HeadShape, MlpShape, NeuronScale, Rotation, Sides, Symmetries
from mergekit_symalign.symmetry.solve import align_block, solve_block, without_identities
from mergekit_symalign.symmetry.steps import steps_of

DISTINCT = [
    *("llama", "qwen3", "olmo2", "cohere-qk-norm", "gpt2", "roberta", "mixtral"),
    *("cohere2", "phi4-mini", "glm4", "gpt-neox"),
]
EVERYTHING = Planted(neuron_scaling=True)


@cache
def layout_of(family: str) -> ModelLayout:
    return resolve(make_model(family, 0).config, model=family)


def shape_of(layout: ModelLayout, layer: int, kind: BlockKind) -> HeadShape | MlpShape:
    return layout.head_shape(layer) if kind is BlockKind.attention else layout.mlp_shape()


@pytest.mark.parametrize("family", FAMILIES)
def test_everything_planted_is_a_symmetry(family: str) -> None:
    layout = layout_of(family)
    for (layer, kind), element in random_elements(layout, 5, EVERYTHING).items():
        shape = shape_of(layout, layer, kind)
        require_symmetry(element, shape)
        require_symmetry(element.inverse(), shape)
        require_symmetry(without_identities(element), shape)
    require_symmetry(BlockElement({}), layout.head_shape(0))


@pytest.mark.parametrize("family", DISTINCT)
def test_an_axis_changed_alone_is_refused(family: str) -> None:
    """Each axis left out, moved once more, or scaled, while its partners stay."""
    layout = layout_of(family)
    elements = random_elements(layout, 5, EVERYTHING)
    for (layer, kind), element in list(elements.items())[:4]:  # of two layers, which differ where any do
        shape = shape_of(layout, layer, kind)
        for axis, action in element.actions.items():
            for changed in _changed(action):
                with pytest.raises(SymmetryError, match=r"^axis \w+: "):
                    require_symmetry(BlockElement(_with(element, axis, changed)), shape)


def _with(element: BlockElement, axis: str, action: AxisAction | None) -> dict[str, AxisAction]:
    rest = {name: g for name, g in element.actions.items() if name != axis}
    return rest if action is None else rest | {axis: action}


def _changed(action: AxisAction) -> list[AxisAction | None]:
    """The same action, wrong in one way each."""
    n = action.size
    swapped = torch.arange(n)
    swapped[:2] = torch.tensor([1, 0])
    steps = steps_of(action)
    result: list[AxisAction | None] = [
        None,
        Chain((*steps, Permutation(swapped))),
        Chain((*steps, Permutation(torch.zeros(n, dtype=torch.int64)))),
        Chain((*steps, Scaling(torch.full((n,), 1.00001, dtype=torch.float64)))),
        Permutation(torch.arange(n + 1)),
    ]
    for i, step in enumerate(steps):
        for name in (f.name for f in fields(step)):  # type: ignore[arg-type]
            if name != "index":
                for value in (torch.nan, torch.inf, 0.3, 1e30):
                    result.append(Chain((*steps[:i], _edited(step, name, value), *steps[i + 1 :])))
    return result


def _edited(step: Any, name: str, value: float) -> AxisAction:
    numbers = getattr(step, name).contiguous().clone()
    numbers.flatten()[0] = value
    return replace(step, **{name: numbers})


def _attention(family: str = "llama") -> tuple[dict[str, AxisAction], HeadShape]:
    layout = layout_of(family)
    return dict(random_elements(layout, 1)[0, BlockKind.attention].actions), layout.head_shape(0)


def _refused(actions: dict[str, AxisAction], shape: HeadShape | MlpShape, match: str, **how: Any) -> None:
    with pytest.raises(SymmetryError, match=match):
        require_symmetry(BlockElement(actions), shape, **how)


def test_pairs_that_agree_with_each_other_and_not_with_the_architecture() -> None:
    actions, shape = _attention()
    plane = torch.zeros(shape.kv_heads, shape.head_dim // 2, dtype=torch.float64) + 0.3
    other = InterleavedPlaneRotation(plane, torch.ones_like(plane))
    wide = other.per_query_head(shape.queries_per_kv)
    _refused(actions | {"query": wide, "key": other.dual()}, shape, "cannot have a interleaved_plane_rotation")
    eye = torch.eye(shape.head_dim, dtype=torch.float64).flip(0).repeat(shape.kv_heads, 1, 1)
    rotation = HeadRotation(eye, torch.ones(shape.kv_heads, dtype=torch.float64))
    full = {"query": rotation.per_query_head(shape.queries_per_kv), "key": rotation}
    value = {name: HeadRotation(*full[axis].tensors()) for name, axis in (("attended", "query"), ("value", "key"))}
    _refused(full | value, shape, "cannot have a head_rotation")
    require_symmetry(BlockElement(full | value), shape, full=True)
    require_symmetry(BlockElement(value), shape)


def test_heads_that_leave_their_group() -> None:
    shape = HeadShape(4, 2, 2, 2)
    order = torch.tensor([4, 5, 2, 3, 0, 1, 6, 7])
    moved = {"query": Permutation(order), "attended": Permutation(order)}
    _refused(dict(moved), shape, "leaves the group")
    _refused({"value": Permutation(torch.tensor([1, 0, 2, 3]))}, shape, "parts of heads")


def test_experts_move_as_wholes() -> None:
    shape = MlpShape(2, 2)
    order = Permutation(torch.tensor([2, 1, 0, 3]))
    mixed: dict[str, AxisAction] = dict.fromkeys(("gate", "up", "down"), order)
    _refused(dict(mixed), shape, "leaves its expert")
    _refused({"expert": Permutation(torch.tensor([1, 0]))}, shape, "leaves its expert")


@pytest.mark.parametrize(
    ("scale", "factor", "match"),
    [
        (NeuronScale.none, 2.0, "cannot have a scaling"),
        (NeuronScale.positive, -2.0, "only positive"),
        (NeuronScale.signed, 0.0, "a factor of 0"),
        (NeuronScale.signed, 1e30, "a factor above"),
        (NeuronScale.signed, 1e-30, "a factor above"),
    ],
)
def test_factors_of_neurons(scale: NeuronScale, factor: float, match: str) -> None:
    up = Scaling(torch.full((3,), factor, dtype=torch.float64))
    _refused({"up": up, "down": up.dual()}, MlpShape(3, scale=scale), match)
    fits = Scaling(torch.full((3,), 2.0, dtype=torch.float64))
    require_symmetry(BlockElement({"up": fits, "down": fits.dual()}), MlpShape(3))
    _refused({"up": fits, "down": fits.dual()}, MlpShape(3), "a factor above", largest={"up": 1.5})


def test_huge_angles_are_angles() -> None:
    actions, shape = _attention()
    angle = torch.full((shape.kv_heads, shape.head_dim // 2), 1e300, dtype=torch.float64)
    turn = PlaneRotation(angle, torch.ones_like(angle))
    turned: dict[str, AxisAction] = {"query": turn.per_query_head(shape.queries_per_kv), "key": turn.dual()}
    require_symmetry(BlockElement(turned), shape)
    endless: dict[str, AxisAction] = {"value": Chain((actions["value"],) * 20)}
    _refused(endless, shape, "20 steps|40 steps")


@cache
def _state(family: str, seed: int) -> dict[str, torch.Tensor]:
    return dict(perturbed(make_model(family, 0), 0.3, seed).state_dict())


def _rows(family: str, layer: int, kind: BlockKind, seed: int) -> Rows:
    """The rows of one block of a sibling in foreign coordinates."""
    model, layout = make_model(family, 0), layout_of(family)
    state = perturbed(model, 0.3, seed).state_dict()
    planted = random_elements(layout, seed)
    state = {name: x for name, x in state.items() if (claim := layout.claim(name)) is not None and claim.layer == layer}
    moved = transform(state, layout, planted) if seed else state
    specs = {layout.name(layer, part): spec for part, spec in layout.block(kind).items()}
    there = [name for name in specs if name in moved]
    axes = tuple(layout.axes(specs[name]) for name in there)
    return block_rows(kind, axes, [moved[name].float() for name in there])


def _paired(anchor: Rows, model: Rows) -> Sides:
    return {axis: list(zip(rows, model[axis], strict=True)) for axis, rows in anchor.items()}


@pytest.mark.parametrize("family", DISTINCT)
def test_everything_solved_is_a_symmetry(family: str) -> None:
    layout, layer = layout_of(family), 1
    for kind in layout.kinds(0):
        shape, (heads, mlp) = shape_of(layout, layer, kind), (layout.head_shape(layer), layout.mlp_shape())
        sides = _paired(_rows(family, layer, kind, 0), _rows(family, layer, kind, 1))
        scaled = mlp.scale is not NeuronScale.none
        for use in (Symmetries(neuron_scaling=scaled), Symmetries(rotation=Rotation.none), Symmetries(scaling=False)):
            require_symmetry(solve_block(sides, mlp if kind is BlockKind.mlp else heads, use).element, shape)
        if kind is BlockKind.attention and not heads.qk_norm:
            full = align_block(sides, heads, Symmetries(rotation=Rotation.full)).element
            require_symmetry(full, shape, full=True)
            if heads.rotary:
                _refused(dict(full.actions), heads, "cannot have a head_rotation")


@pytest.mark.parametrize("family", ["llama", "qwen3", "olmo2", "cohere-qk-norm", "phi4-mini"])
def test_a_consensus_is_a_symmetry(family: str) -> None:
    layout = layout_of(family)
    for kind in layout.kinds(0):
        models = [_rows(family, 0, kind, seed) for seed in range(3)]
        use = Symmetries(neuron_scaling=True)
        heads, mlp = layout.head_shape(0), layout.mlp_shape()
        shape = mlp if kind is BlockKind.mlp else heads
        found = find_consensus(models, lambda sides: align_block(sides, shape, use).element, rounds=2)  # noqa: B023
        for element in found.elements:
            require_symmetry(without_identities(element), shape_of(layout, 0, kind))
