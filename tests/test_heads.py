"""Head matching: planted orders come back exactly, and the assignment is the optimum over all orders of KV heads."""

from __future__ import annotations

from itertools import permutations

import pytest
import torch
from models import make_model, perturbed

from mergekit_symalign.families.resolve import ModelLayout, resolve
from mergekit_symalign.families.schema import BlockKind
from mergekit_symalign.planting import Planted, random_elements, transform
from mergekit_symalign.symmetry import heads as heads_module
from mergekit_symalign.symmetry.attention import head_moments
from mergekit_symalign.symmetry.blocks import align_attention
from mergekit_symalign.symmetry.element import rows_by_axis
from mergekit_symalign.symmetry.groups import Chain, Permutation
from mergekit_symalign.symmetry.heads import HeadProblem, match_heads
from mergekit_symalign.symmetry.moments import plane_correlation
from mergekit_symalign.symmetry.options import Facts, HeadShape, Rotation, Sides, Symmetries

State = dict[str, torch.Tensor]
CASES = {
    "gqa": ("llama", {"num_attention_heads": 12, "num_key_value_heads": 4, "head_dim": 8}),
    "mha": ("llama-mha", {}),
    "mqa": ("qwen2", {}),
    "qk-norm": ("qwen3", {}),
    "qk-norm over all heads": ("olmo2", {}),
    "without RoPE": ("smollm3", {}),
    "interleaved, partial": ("glm4", {}),
    "fused": ("phi4-mini", {}),
}


def _sides(anchor: State, model: State, layout: ModelLayout) -> Sides:
    sides: dict[str, list] = {}
    for part, spec in layout.block(BlockKind.attention).items():
        a, b = (state[layout.name(1, part)] for state in (anchor, model))
        first, second = (rows_by_axis(x, layout.axes(spec)) for x in (a, b))
        for axis in first.keys() & BlockKind.attention.axes:
            sides.setdefault(axis, []).append((first[axis], second[axis]))
    return sides


def _shape(layout: ModelLayout) -> HeadShape:
    return layout.head_shape(1)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("noise", [0.0, 0.1, 0.4])
def test_planted_order_is_recovered(case: str, noise: float) -> None:
    family, overrides = CASES[case]
    anchor = make_model(family, 0, **overrides)
    sibling = perturbed(anchor, noise, 1)
    layout = resolve(anchor.config, model="m")
    elements = random_elements(layout, 5)
    twin = transform(sibling.state_dict(), layout, elements)
    found = align_attention(_sides(anchor.state_dict(), twin, layout), _shape(layout), Symmetries())
    for axis in ("query", "key", "value", "attended"):
        planted = elements[1, BlockKind.attention].actions[axis]
        assert isinstance(planted, Chain)
        order = planted.steps[0]
        undone = found.actions[axis].steps[0] if isinstance(found.actions[axis], Chain) else None
        assert isinstance(order, Permutation)
        if undone is None:
            assert order.is_identity()
        else:
            assert isinstance(undone, Permutation)
            assert torch.equal(order.index[undone.index], torch.arange(order.size))


@pytest.mark.parametrize(
    ("case", "rotation"),
    [(c, r) for c in CASES for r in Rotation if "norm" not in c or r is not Rotation.full],
)
@pytest.mark.parametrize("scaling", [True, False])
def test_optimum_over_all_orders_of_unrelated_heads(case: str, rotation: Rotation, scaling: bool) -> None:
    family, overrides = CASES[case]
    a, b = (make_model(family, seed, **overrides) for seed in (0, 1))
    layout = resolve(a.config, model="m")
    sides, shape = _sides(a.state_dict(), b.state_dict(), layout), _shape(layout)
    use = Symmetries(rotation=rotation, scaling=scaling)
    problem, k = HeadProblem(sides, *head_moments(sides, shape, use.rotation), shape, use), shape.kv_heads
    i, j = torch.meshgrid(torch.arange(k), torch.arange(k), indexing="ij")
    costs = problem.cost(i.flatten(), j.flatten()).reshape(k, k)
    assert (problem.lower_bounds <= costs).all()
    assert (problem.plane_bounds <= costs).all()
    if problem.turning:
        assert (problem.prefix_bounds <= problem.plane_bounds + 1e-9).all()
    order = match_heads(problem)
    kv = torch.arange(k) if order is None else order.kv
    best = min(sum(costs[r, c] for r, c in enumerate(p)) for p in permutations(range(k)))
    assert costs[torch.arange(k), kv].sum() == pytest.approx(float(best), rel=1e-9)


def test_pairs_know_of_planes_what_whole_products_would_tell() -> None:
    family, overrides = CASES["gqa"]
    a, b = (make_model(family, seed, **overrides) for seed in (0, 1))
    layout = resolve(a.config, model="m")
    sides, shape = _sides(a.state_dict(), b.state_dict(), layout), _shape(layout)
    problem = HeadProblem(sides, *head_moments(sides, shape, Rotation.exact), shape, Symmetries())
    whole = HeadProblem(sides, *head_moments(sides, shape, Rotation.full), shape, Symmetries(rotation=Rotation.full))
    i, j = torch.tensor([0, 2, 3]), torch.tensor([1, 0, 3])
    for axis in ("query", "key"):
        planes, products = (p.group_moments(axis, i, j) for p in (problem, whole))
        order = torch.arange(planes.model.shape[1]).flip(0).expand(3, -1)
        turn = heads_module.of_planes(plane_correlation(products.summed().cross), shape.planes())
        torch.testing.assert_close(planes.along(turn), products.along(turn), rtol=1e-5, atol=1e-4)
        for few, all_of_it in ((planes.summed(), products.summed()), (planes.matched(order), products.matched(order))):
            kept = (plane_correlation(x.cross) for x in (few, all_of_it))
            torch.testing.assert_close(*kept, rtol=1e-5, atol=1e-4)
            assert torch.equal(few.model, all_of_it.model)


def test_siblings_are_settled_by_their_bounds(monkeypatch: pytest.MonkeyPatch) -> None:
    """No pair is solved at all: each head is cheaper where it stands than any other could become."""
    anchor = make_model("llama-mha", 0)
    layout = resolve(anchor.config, model="m")
    sides = _sides(anchor.state_dict(), perturbed(anchor, 0.05, 1).state_dict(), layout)
    asked = []
    original = HeadProblem.cost

    def cost(self, i, j):
        asked.extend(zip(i.tolist(), j.tolist(), strict=True))
        return original(self, i, j)

    monkeypatch.setattr(heads_module.HeadProblem, "cost", cost)
    shape = _shape(layout)
    facts: Facts = {}
    problem = HeadProblem(sides, *head_moments(sides, shape, Rotation.exact), shape, Symmetries())
    assert match_heads(problem, facts) is None
    assert asked == []
    assert not {"plane_bounds", "lower_bounds"} & problem.__dict__.keys()  # a few columns were enough
    assert facts == {"heads_route": "identity"}


def test_heads_false_keeps_the_order() -> None:
    anchor = make_model("llama", 0)
    layout = resolve(anchor.config, model="m")
    twin = transform(anchor.state_dict(), layout, random_elements(layout, 5, Planted(rotation=False, scaling=False)))
    sides = _sides(anchor.state_dict(), twin, layout)
    kept = align_attention(sides, _shape(layout), Symmetries(heads=False, rotation=Rotation.none, scaling=False))
    moved = align_attention(sides, _shape(layout), Symmetries(rotation=Rotation.none, scaling=False))
    assert kept.actions == {}
    assert set(moved.actions) == {"query", "key", "value", "attended"}
