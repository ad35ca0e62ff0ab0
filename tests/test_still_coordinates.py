"""Coordinates that do not turn under a QK-norm: they change places with their gains, and come back."""

from __future__ import annotations

from dataclasses import replace
from itertools import permutations

import pytest
import torch
from attention import (
    Rows,
    moved,
    noisy,
    planted,
    random_rows,
    random_tokens,
    require_kept,
    require_twins_back,
    seen_on,
    sides_of,
)
from more_models import more_model

from mergekit_symalign.errors import SymmetryError
from mergekit_symalign.families.resolve import resolve
from mergekit_symalign.families.schema import BlockKind
from mergekit_symalign.learning.elements import learned_block
from mergekit_symalign.planting import random_elements
from mergekit_symalign.symmetry.blocks import align_attention
from mergekit_symalign.symmetry.by_activations.attention import align_attention_by
from mergekit_symalign.symmetry.describe import describe_heads
from mergekit_symalign.symmetry.element import BlockElement
from mergekit_symalign.symmetry.groups import Chain, Permutation, Scaling
from mergekit_symalign.symmetry.membership import require_symmetry
from mergekit_symalign.symmetry.options import GainScope, HeadShape, Rotation, Symmetries
from mergekit_symalign.symmetry.solve import solve_block

SHAPES = {
    "one set of gains": HeadShape(6, 2, 8, 4, norm=GainScope.head),
    "odd rest": HeadShape(6, 2, 9, 4, interleaved=True, norm=GainScope.head),
    "no RoPE": HeadShape(4, 4, 7, 0, norm=GainScope.head),
    "gains of all heads": HeadShape(6, 2, 8, 2, norm=GainScope.all),
    "all heads, odd, no RoPE": HeadShape(6, 3, 5, 0, norm=GainScope.all),
    "less the mean": HeadShape(6, 2, 9, 4, norm=GainScope.centred),
    "less the mean, interleaved": HeadShape(4, 2, 8, 2, interleaved=True, norm=GainScope.centred),
}


@pytest.mark.parametrize("name", SHAPES)
def test_what_is_planted_keeps_the_function_and_is_admitted(name: str) -> None:
    for seed in range(5):
        require_kept(planted(SHAPES[name], seed), SHAPES[name])


@pytest.mark.parametrize("noise", [0.0, 0.3])
@pytest.mark.parametrize("name", SHAPES)
def test_a_planted_twin_comes_back(name: str, noise: float) -> None:
    require_twins_back(SHAPES[name], noise)


@pytest.mark.parametrize("name", SHAPES)
def test_a_sibling_in_place_stays_bit_for_bit(name: str) -> None:
    shape = SHAPES[name]
    anchor = random_rows(shape, 0)
    found = solve_block(sides_of(anchor, noisy(anchor, 0.05)), shape, Symmetries(scaling=False)).element
    assert not {"query", "key", "query_gain", "key_gain"} & found.actions.keys()


@pytest.mark.parametrize("name", ["one set of gains", "gains of all heads", "less the mean"])
@pytest.mark.parametrize("rotation", [Rotation.exact, Rotation.none])
@pytest.mark.parametrize("scaling", [True, False])
def test_the_optimum_over_all_orders_and_signs(name: str, rotation: Rotation, scaling: bool) -> None:
    """Of unrelated models with heads in place: no order of coordinates, each with its best signs, is nearer."""
    shape = replace(SHAPES[name], query_heads=2, kv_heads=1, head_dim=6, rotary=2)
    anchor, model = random_rows(shape, 0), random_rows(shape, 1)
    use = Symmetries(heads=False, rotation=rotation, scaling=scaling)
    found = align_attention(sides_of(anchor, model), shape, use)
    axes = ("query", "key", "query_gain", "key_gain")
    back = moved(model, found.element)
    reached = sum(float((anchor[axis] - back[axis]).square().sum()) for axis in axes)
    best = min(_best_of_order(anchor, model, shape, order, use) for order in permutations(range(2, 6)))
    stays = _best_of_order(anchor, model, shape, (2, 3, 4, 5), use)
    assert reached == pytest.approx(best if rotation is Rotation.exact else stays, rel=1e-9)


def _best_of_order(anchor: Rows, model: Rows, shape: HeadShape, order: tuple[int, ...], use: Symmetries) -> float:
    """By brute force over signs, and a grid refined by golden sections over the factors."""
    rows = {a: [x.unflatten(0, (-1, shape.head_dim)) for x in (anchor[a], model[a])] for a in ("query", "key")}
    gains = {
        a: [x.unflatten(0, (-1, shape.head_dim)) for x in (anchor[a], model[a])] for a in ("query_gain", "key_gain")
    }
    signed = use.rotation is Rotation.exact
    sizes = sum(float(x.square().sum()) for pair in rows.values() for x in pair)
    gained = [
        sum(float((a[:, i] * b[:, j]).sum()) for a, b in rows.values())
        for i, j in zip((0, 1, 2, 3, 4, 5), (0, 1, *order), strict=True)
    ]
    by_unit = [gained[0] + gained[1], *gained[2:]]
    if not signed:
        saved = sum(by_unit)
    else:
        saved = abs(sum(by_unit)) if shape.norm is GainScope.centred else sum(map(abs, by_unit))
    cost = sizes - 2 * saved
    for own, others in [((0, 1), (0, 1)), *(((i,), (j,)) for i, j in zip(range(2, 6), order, strict=True))]:
        (q_a, q_b), (k_a, k_b) = ((a[:, list(own)], b[:, list(others)]) for a, b in gains.values())
        t = torch.linspace(-4, 4, 1001, dtype=torch.float64) if use.scaling else torch.zeros(1, dtype=torch.float64)
        options = []
        for sign in (1, -1) if signed and use.scaling else (1,):
            for _ in range(4):
                s = sign * t.exp().reshape(-1, 1, 1, 1)
                f = (q_a - s * q_b).square().flatten(1).sum(1) + (k_a - k_b / s).square().flatten(1).sum(1)
                at = int(f.argmin())
                t = torch.linspace(float(t[max(0, at - 1)]), float(t[min(len(t) - 1, at + 1)]), len(t), dtype=t.dtype)
            options.append(float(f.min()))
            t = torch.linspace(-4, 4, 1001, dtype=torch.float64) if use.scaling else t
        cost += min(options)
    return cost


@pytest.mark.parametrize("name", SHAPES)
def test_by_activations_too(name: str) -> None:
    shape = SHAPES[name]
    anchor = random_rows(shape, 0)
    sibling = noisy(anchor, 0.02)
    twin = moved(sibling, planted(shape, 3))
    seen = seen_on(random_tokens(200).mT, anchor, twin, shape)
    found = align_attention_by(seen, sides_of(anchor, twin), shape, Symmetries()).element
    require_symmetry(found, shape)
    for axis in ("query", "key", "query_gain", "key_gain"):
        back = found.actions[axis](twin[axis], 0) if axis in found.actions else twin[axis]
        assert (back - sibling[axis]).abs().max() < 0.2 * sibling[axis].abs().max(), axis


WRONG = {
    "a coordinate that turns": ("query key query_gain key_gain", [1, 0, 2, 3, 4, 5, 6, 7], "turn with the position"),
    "another order of the keys": ("query query_gain", [0, 1, 2, 3, 5, 4, 6, 7], "coordinates are not in the order"),
    "gains left behind": ("query key", [0, 1, 2, 3, 5, 4, 6, 7], "gain: its coordinates are not in the order"),
    "gains moved alone": ("query_gain key_gain", [0, 1, 2, 3, 5, 4, 6, 7], "gain: its coordinates are not"),
}


@pytest.mark.parametrize("case", WRONG)
@pytest.mark.parametrize("name", ["one set of gains", "gains of all heads"])
def test_what_is_no_symmetry_is_refused(case: str, name: str) -> None:
    axes, order, match = WRONG[case]
    shape = replace(SHAPES[name], head_dim=8, rotary=4)
    sizes = {a: len(x) for a, x in random_rows(shape, 0).items()}
    orders = {a: torch.cat([torch.tensor(order) + 8 * h for h in range(sizes[a] // 8)]) for a in axes.split()}
    with pytest.raises(SymmetryError, match=match):
        require_symmetry(BlockElement({a: Permutation(x) for a, x in orders.items()}), shape)


def test_orders_of_single_heads_need_gains_of_their_own() -> None:
    every = HeadShape(2, 2, 3, 0, norm=GainScope.all)
    index = Permutation(torch.tensor([1, 0, 2, 3, 4, 5]))
    apart = BlockElement(dict.fromkeys(("query", "key", "query_gain", "key_gain"), index))
    require_symmetry(apart, every)
    one = {"query": index, "key": index, "query_gain": Permutation(torch.tensor([1, 0, 2]))}
    with pytest.raises(SymmetryError, match="order of every query head"):
        require_symmetry(BlockElement(one), replace(every, norm=GainScope.head))
    signs = Scaling(torch.tensor([1.0, -1, 1, 1, 1, 1], dtype=torch.float64))
    require_symmetry(BlockElement({"query": signs, "key": signs}), every)
    with pytest.raises(SymmetryError, match="coordinates have one sign"):
        require_symmetry(BlockElement({"query": signs, "key": signs}), replace(every, norm=GainScope.centred))


@pytest.mark.parametrize("name", SHAPES)
def test_a_learned_element_starts_where_it_was_found(name: str) -> None:
    shape = SHAPES[name]
    rows, element = random_rows(shape, 0), planted(shape, 2)
    learned = learned_block(element, shape, Symmetries())
    composed = learned.composed({key: leaf.start for key, leaf in learned.leaves().items()})
    require_symmetry(composed, shape)
    for axis, x in moved(rows, element).items():
        torch.testing.assert_close(moved(rows, composed)[axis], x)


def test_the_report_counts_coordinates() -> None:
    shape = SHAPES["no RoPE"]
    order = torch.tensor([1, 0, 2, 3, 4, 6, 5])
    every = Permutation(torch.cat([order + 7 * h for h in range(4)]))
    facts = describe_heads(BlockElement({"query": Chain((every,)), "key": every}), shape)
    assert (facts["query_coordinates_moved"], facts["query_heads_moved"]) == (16, 0)


@pytest.mark.parametrize("name", ["glm4-moe", "exaone4-hybrid", "minimax-m2"])
def test_classes_with_such_coordinates(name: str) -> None:
    """Their planted elements order them, so that what is checked of the classes elsewhere holds for orders too."""
    layout = resolve(more_model(name).config, model=name)
    elements = random_elements(layout, 1)
    orders = {i: elements[i, BlockKind.attention].actions["query"].steps[0] for i in range(layout.layers)}
    still = [i for i in range(layout.layers) if layout.head_shape(i).reorders]
    assert still
    for i in still:
        order = orders[i].index.unflatten(0, (-1, layout.geometry.head_dim)) % layout.geometry.head_dim
        assert not torch.equal(order, torch.arange(layout.geometry.head_dim).expand_as(order))
