"""Head matching: planted orders come back exactly, and the assignment is the optimum over all orders of KV heads."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from itertools import permutations

import numpy as np
import pytest
import torch
from models import make_model, perturbed
from scipy.optimize import minimize_scalar

from mergekit_symalign.families.resolve import ModelLayout, resolve
from mergekit_symalign.families.schema import BlockKind
from mergekit_symalign.planting import Planted, random_elements, transform
from mergekit_symalign.symmetry.blocks import align_attention
from mergekit_symalign.symmetry.element import rows_by_axis
from mergekit_symalign.symmetry.groups import Chain, Permutation
from mergekit_symalign.symmetry.heads import match as heads_module
from mergekit_symalign.symmetry.heads.from_rows import HeadRows
from mergekit_symalign.symmetry.heads.match import HeadProblem, match_heads
from mergekit_symalign.symmetry.heads.moments import of_planes, plane_correlation
from mergekit_symalign.symmetry.heads.solve import head_moments
from mergekit_symalign.symmetry.options import GainScope, HeadShape, Rotation, Sides, Symmetries

State = dict[str, torch.Tensor]
Products = tuple[np.ndarray, np.ndarray]
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
    found = align_attention(_sides(anchor.state_dict(), twin, layout), _shape(layout), Symmetries()).element
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
    source = HeadRows(sides, *head_moments(sides, shape, use.rotation), shape, use)
    problem, k = HeadProblem(source), shape.kv_heads
    i, j = torch.meshgrid(torch.arange(k), torch.arange(k), indexing="ij")
    costs = problem.cost(i.flatten(), j.flatten()).reshape(k, k)
    assert (source.lower_bounds <= costs).all()
    assert (source.plane_bounds <= costs).all()
    if source.turning:
        assert (source.prefix_bounds <= source.plane_bounds + 1e-9).all()
    order = match_heads(problem).order
    kv = torch.arange(k) if order is None else order.kv
    reference = _Reference(sides, shape, use)
    expected = [[reference.cost(r, c, problem.inner[r, c].tolist()) for c in range(k)] for r in range(k)]
    assert costs.flatten().tolist() == pytest.approx(np.ravel(expected).tolist(), rel=1e-9)
    best = min(sum(expected[r][c] for r, c in enumerate(p)) for p in permutations(range(k)))
    assert sum(expected[r][c] for r, c in enumerate(kv.tolist())) == pytest.approx(best, rel=1e-9)


class _Reference:
    """What a pair of KV heads costs, from its definition: numpy's decompositions, and scipy's search for the scale."""

    def __init__(self, sides: Sides, shape: HeadShape, use: Symmetries) -> None:
        self.shape, self.use = shape, use
        self.rotate, self.scale = use.rotation is not Rotation.none, use.scaling
        self.rows = {
            axis: [np.concatenate([pair[i].numpy() for pair in pairs], axis=1) for i in range(2)]
            for axis, pairs in sides.items()
        }

    def cost(self, i: int, j: int, inner: list[int]) -> float:
        """Of the anchor's head ``i`` and the model's ``j``, its query heads in this order; less the anchor's norms."""
        group = self.shape.queries_per_kv
        kv, own, other = ([i], [j]), range(i * group, (i + 1) * group), [j * group + h for h in inner]
        value, key = (self.products(axis, *kv) for axis in ("value", "key"))
        attended, query = (self.products(axis, own, other) for axis in ("attended", "query"))
        return self.of_matrix(value, attended) + self.of_query(query, key)

    def products(self, axis: str, own: Iterable[int], other: Iterable[int]) -> tuple[np.ndarray, np.ndarray]:
        """Of model and anchor [d, d], and squared norms of the model's coordinates [d], over all heads given."""
        d = self.shape.head_dim
        a, b = (
            np.concatenate([x[h * d : (h + 1) * d] for h in heads], axis=1)
            for x, heads in zip(self.rows[axis], (own, other), strict=True)
        )
        return b @ a.T, (b**2).sum(1)

    def of_query(self, query: Products, key: Products) -> float:
        shape, norm = self.shape, float(query[1].sum() + key[1].sum())
        first, second = np.split(np.array(shape.planes(), dtype=int), 2)
        if shape.qk_norm:
            by_plane = sum(np.diag(c)[first] + np.diag(c)[second] for c, _ in (query, key))
            gains = by_plane.sum() if shape.norm is GainScope.centred else by_plane
            return norm - 2 * float(np.abs(gains).sum() if self.rotate else np.sum(gains))
        if self.use.rotation is Rotation.full:  # the papers' way: a rotation, then a scale
            u, _, vh = np.linalg.svd(query[0] + key[0])
            q, k = ((vh.T @ u.T @ c).trace() for c, _ in (query, key))
            return self.least(query[1].sum(), key[1].sum(), lambda s: s * q + k / s)
        planes = sum(self.of_plane(query, key, a, b) for a, b in zip(first, second, strict=True))
        rest = shape.rest()
        if not rest:
            return planes
        return planes + self.of_matrix(*((c[np.ix_(rest, rest)], b[rest]) for c, b in (query, key)))

    def of_matrix(self, one: Products, dual: Products) -> float:
        def reached(s: float) -> float:
            c = s * one[0] + dual[0] / s
            return float(np.linalg.norm(c, "nuc") if self.rotate else np.trace(c))

        return self.least(one[1].sum(), dual[1].sum(), reached)

    def of_plane(self, query: Products, key: Products, a: int, b: int) -> float:
        def reached(s: float) -> float:
            c = s * query[0] + key[0] / s
            along, across = c[a, a] + c[b, b], c[a, b] - c[b, a]
            return float(np.hypot(along, across) if self.rotate else along)

        return self.least(query[1][[a, b]].sum(), key[1][[a, b]].sum(), reached)

    def least(self, one: float, dual: float, reached: Callable[[float], float]) -> float:
        """``min s² one + dual / s² − 2 reached(s)``: the best of a grid, and scipy's search around it."""

        def f(t: float) -> float:
            s = math.exp(t)
            return s**2 * one + dual / s**2 - 2 * reached(s)

        if not self.scale:
            return f(0.0)
        grid = np.linspace(-3, 3, 121)
        at = float(grid[np.argmin([f(t) for t in grid])])
        return float(minimize_scalar(f, bounds=(at - 0.1, at + 0.1), method="bounded", options={"xatol": 1e-9}).fun)


def test_pairs_know_of_planes_what_whole_products_would_tell() -> None:
    family, overrides = CASES["gqa"]
    a, b = (make_model(family, seed, **overrides) for seed in (0, 1))
    layout = resolve(a.config, model="m")
    sides, shape = _sides(a.state_dict(), b.state_dict(), layout), _shape(layout)
    problem = HeadRows(sides, *head_moments(sides, shape, Rotation.exact), shape, Symmetries())
    whole = HeadRows(sides, *head_moments(sides, shape, Rotation.full), shape, Symmetries(rotation=Rotation.full))
    i, j = torch.tensor([0, 2, 3]), torch.tensor([1, 0, 3])
    for axis in ("query", "key"):
        planes, products = (p.group_moments(axis, i, j) for p in (problem, whole))
        order = torch.arange(planes.model.shape[1]).flip(0).expand(3, -1)
        turn = of_planes(plane_correlation(products.summed().cross), shape.planes())
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
    source = HeadRows(sides, *head_moments(sides, shape, Rotation.exact), shape, Symmetries())
    found = match_heads(HeadProblem(source))
    assert found.order is None
    assert asked == []
    assert not {"plane_bounds", "lower_bounds"} & source.__dict__.keys()  # a few columns were enough
    assert found.facts == {"heads_route": "identity"}


def test_heads_false_keeps_the_order() -> None:
    anchor = make_model("llama", 0)
    layout = resolve(anchor.config, model="m")
    twin = transform(anchor.state_dict(), layout, random_elements(layout, 5, Planted(rotation=False, scaling=False)))
    sides = _sides(anchor.state_dict(), twin, layout)
    kept = align_attention(
        sides, _shape(layout), Symmetries(heads=False, rotation=Rotation.none, scaling=False)
    ).element
    moved = align_attention(sides, _shape(layout), Symmetries(rotation=Rotation.none, scaling=False)).element
    assert kept.actions == {}
    assert set(moved.actions) == {"query", "key", "value", "attended"}
