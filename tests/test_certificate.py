"""The certificate: the same optimum as scipy's on the whole problem, whichever route proves it."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from chosen_numbers import choose
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from mergekit_symalign.symmetry import distance
from mergekit_symalign.symmetry.distance import squared_distance
from mergekit_symalign.symmetry.neurons import certificate, tiles
from mergekit_symalign.symmetry.neurons import costs as neuron_costs
from mergekit_symalign.symmetry.neurons.certificate import nearest_neighbours
from mergekit_symalign.symmetry.neurons.costs import NeuronCosts, NeuronPairs
from mergekit_symalign.symmetry.neurons.match import best_permutation
from mergekit_symalign.symmetry.neurons.products import Numbers
from mergekit_symalign.symmetry.options import NeuronScale
from mergekit_symalign.symmetry.rows import two_lowest

N, HIDDEN = 300, 200
Kinds = list[Tensor]  # gate, up, down as rows


def _kinds(seed: int, biases: bool = False) -> Kinds:
    g = torch.Generator().manual_seed(seed)
    widths = [HIDDEN] * 3 + [1, 1] * biases
    return [torch.randn(N, width, generator=g) for width in widths]


def _pairs(anchor: Kinds, model: Kinds) -> NeuronPairs:
    """Gate, up and down; what follows are biases of gate and up. Down is stored with its neurons last."""
    sides = list(zip(anchor, model, strict=True))
    down = tuple(x.mT.contiguous().mT for x in sides[2])
    return NeuronPairs([sides[0], *sides[3:4]], [sides[1], *sides[4:5]], [down])


def _order(seed: int = 7) -> Tensor:
    return torch.randperm(N, generator=torch.Generator().manual_seed(seed))


def _sibling(noise: float, biases: bool = False) -> tuple[Kinds, Kinds]:
    anchor, other = _kinds(0, biases), _kinds(1, biases)
    return anchor, [(a + noise * x)[_order()] for a, x in zip(anchor, other, strict=True)]


def _unrelated() -> tuple[Kinds, Kinds]:
    return _kinds(0), _kinds(1)


def _duplicated() -> tuple[Kinds, Kinds]:
    """Neurons 10 to 19 are copies of 0 to 9, up to the rounding of the noise."""
    anchor, model = _kinds(0), _kinds(0)
    for x in (*anchor, *model):
        x[10:20] = x[:10]
    return anchor, [(y + 0.1 * x)[_order()] for x, y in zip(_kinds(1), model, strict=True)]


def _contested() -> tuple[Kinds, Kinds]:
    """Several of the anchor's neurons want the same one of the model's, and settled rows own what they take instead."""
    anchor = _kinds(0)
    for x in anchor:
        x[1:6] = x[0] + 0.05 * x[1:6]
    model = [a + 0.02 * b for a, b in zip(anchor, _kinds(1), strict=True)]
    for x, y in zip(model, _kinds(2), strict=True):
        x[1:5] = y[1:5]
        x[40] = x[41] + 0.01 * x[40]
    return anchor, [x[_order()] for x in model]


def _partly_unrelated() -> tuple[Kinds, Kinds]:
    anchor, model = _sibling(0.1)
    for x, y in zip(model, _kinds(5), strict=True):
        x[::9] = y[::9]
    return anchor, model


CASES: dict[str, tuple[Callable[[], tuple[Kinds, Kinds]], set[str]]] = {
    "siblings": (lambda: _sibling(0.05), {"neurons_prefix_1", "neurons_prefix_2"}),
    "identical": (lambda: _sibling(0.0), {"neurons_prefix_1"}),
    "far siblings": (lambda: _sibling(0.4), {"neurons_prefix_2", "neurons_prefix_3"}),
    "with biases": (lambda: _sibling(0.1, biases=True), {"neurons_prefix_1", "neurons_prefix_2"}),
    "unrelated": (_unrelated, {"neurons_full"}),
    "duplicated neurons": (_duplicated, {"neurons_rows"}),
    "contested neurons": (_contested, {"neurons_rows"}),
    "partly unrelated": (_partly_unrelated, {"neurons_rows"}),
}


def _reference(costs: Tensor) -> float:
    return float(costs[linear_sum_assignment(costs.numpy())].sum())


def _all_costs(pairs: NeuronPairs, scale: NeuronScale) -> Tensor:
    """Cost of every pair, in float64, from its definition."""

    def squared(side: list) -> Tensor:
        return sum(
            torch.cdist(a.double(), b.double(), compute_mode="donot_use_mm_for_euclid_dist") ** 2 for a, b in side
        )

    if scale is NeuronScale.none:
        return squared(pairs.all)
    p, q = (sum(a.double() @ b.double().T for a, b in side) for side in (pairs.scaled, pairs.divided))
    (a_u, b), (a_d, o) = (
        [sum(pair[i].double().square().sum(-1) for pair in side) for i in range(2)]
        for side in (pairs.scaled, pairs.divided)
    )
    return squared(pairs.fixed) + a_u[:, None] + a_d[:, None] + _best_over_a_grid(p, b, q, o)


def _best_over_a_grid(p: Tensor, b: Tensor, q: Tensor, o: Tensor) -> Tensor:
    """``min_c c² b + o / c² − 2 (c p + q / c)`` over both signs: ever finer grids of ``log c``, then a parabola."""
    best = torch.full_like(p, torch.inf)

    def f(t: Tensor, sign: int) -> Tensor:
        c = sign * torch.exp(t)
        return c.square() * b + o / c.square() - 2 * (c * p + q / c)

    for sign in (1, -1):
        at, low = torch.zeros_like(p), torch.full_like(p, torch.inf)
        for step, count in ((0.02, 150), (0.002, 10), (0.0002, 10)):
            middle = at
            for k in range(-count, count + 1):
                value = f(middle + k * step, sign)
                at, low = torch.where(value < low, middle + k * step, at), torch.minimum(value, low)
        left, right = f(at - step, sign), f(at + step, sign)
        dip = (left - right).square() / (8 * (left + right - 2 * low)).clamp_min(1e-30)
        best = torch.minimum(best, low - dip)
    return best


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_optimum_of_the_whole_problem(case: str, dtype: torch.dtype) -> None:
    make, expected = CASES[case]
    pairs = _pairs(*([x.to(dtype) for x in side] for side in make()))
    before = [x.clone() for pair in pairs.all for x in pair]
    found = best_permutation(pairs, scale=NeuronScale.none)
    assert all(torch.equal(x, y) for x, y in zip(before, (x for pair in pairs.all for x in pair), strict=True))
    costs = _all_costs(pairs, scale=NeuronScale.none)
    assert sorted(found.index.tolist()) == list(range(N))
    assert found.cost == pytest.approx(float(costs[torch.arange(N), found.index].sum()), rel=1e-5, abs=1e-6)
    assert float(costs[torch.arange(N), found.index].sum()) == pytest.approx(_reference(costs), rel=1e-6, abs=1e-6)
    assert sum(found.routes.values()) == N
    assert expected & found.routes.keys(), found.routes


@pytest.mark.parametrize("case", ["siblings", "far siblings", "with biases", "duplicated neurons", "unrelated"])
def test_optimum_with_signed_scales(case: str) -> None:
    anchor, model = CASES[case][0]()
    g = torch.Generator().manual_seed(3)
    factor = (0.4 + 2 * torch.rand(N, 1, generator=g)) * torch.where(torch.rand(N, 1, generator=g) < 0.5, -1, 1)
    model = [x * f for x, f in zip(model, [1, factor, 1 / factor, 1, factor], strict=False)]
    pairs = _pairs(anchor, model)
    found = best_permutation(pairs, scale=NeuronScale.signed)
    costs = _all_costs(pairs, scale=NeuronScale.signed)
    reached = float(costs[torch.arange(N), found.index].sum())
    assert reached == pytest.approx(_reference(costs), rel=1e-5)
    if case in ("siblings", "with biases"):
        assert "neurons_full" not in found.routes


@pytest.mark.parametrize("numbers", Numbers)
@pytest.mark.parametrize("case", ["siblings", "duplicated neurons", "partly unrelated"])
def test_same_for_any_block_size_and_number_of_threads(
    case: str, numbers: Numbers, monkeypatch: pytest.MonkeyPatch
) -> None:
    choose(monkeypatch, numbers)
    pairs = _pairs(*CASES[case][0]())
    expected = best_permutation(pairs, scale=NeuronScale.none)
    before = torch.get_num_threads()
    try:
        for block, threads in ((1 << 9, 1), (1 << 12, 2), (1 << 22, 3)):
            monkeypatch.setattr(certificate, "_BLOCK", block)
            monkeypatch.setattr(distance, "_BLOCK", block)
            monkeypatch.setattr(distance, "_PIECE", max(1, block >> 5))
            monkeypatch.setattr(neuron_costs, "_ROWS", max(1, block >> 9))
            monkeypatch.setattr(tiles, "_HEIGHT", max(1, block >> 7))
            monkeypatch.setattr(tiles, "_WIDTH", max(16, block >> 7))
            monkeypatch.setattr(tiles, "_CHUNK", 16)
            torch.set_num_threads(threads)
            found = best_permutation(pairs, scale=NeuronScale.none)
            assert torch.equal(found.index, expected.index)
            assert found.routes == expected.routes
    finally:
        torch.set_num_threads(before)


def test_a_prefix_that_misleads_proves_nothing_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nearest on the columns of the first prefix is another neuron than on all columns."""
    g = torch.Generator().manual_seed(0)
    anchor = torch.randn(60, 1000, generator=g)
    model = anchor.clone()
    seen = []
    original = certificate.spread_columns

    def columns(rows: Tensor, share: float) -> Tensor:
        if share == certificate.PREFIXES[0]:
            marked = torch.arange(1000.0).expand(60, -1)
            seen.extend(original(marked, share)[0].long().tolist())
        return original(rows, share)

    monkeypatch.setattr(certificate, "spread_columns", columns)
    best_permutation(NeuronPairs([], [(anchor, model)], []), scale=NeuronScale.none)
    model[:, seen] = anchor.roll(1, 0)[:, seen]
    found = best_permutation(NeuronPairs([], [(anchor, model)], []), scale=NeuronScale.none)
    assert torch.equal(found.index, torch.arange(60))


@pytest.mark.parametrize("dtype", [torch.int32, torch.float32])
@pytest.mark.parametrize("n", [7, 300, 512, 1])
def test_two_lowest(n: int, dtype: torch.dtype) -> None:
    x = (1000 * torch.randn(20, n, generator=torch.Generator().manual_seed(0))).to(dtype)
    place, second = two_lowest(x)
    ordered = x.sort(1).values
    assert torch.equal(x.gather(1, place.unsqueeze(1)).squeeze(1), ordered[:, 0])
    if n > 1:
        assert torch.equal(second, ordered[:, 1])


def test_a_few_open_rows_are_compared_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """No more of them than the sample that is looked at first: nothing is rounded for them."""
    asked = choose(monkeypatch, Numbers.bfloat16)
    costs = NeuronCosts(_pairs(*_sibling(0.1)), NeuronScale.none)
    found = certificate.Nearest.nothing(N, torch.device("cpu"))
    left = certificate._settle(costs, torch.arange(N - 20, N), 2, 0.0, found)
    assert len(left) == 0
    assert asked == []
    assert torch.equal(found.settled, torch.arange(N - 20, N))
    assert torch.equal(found.index[N - 20 :], torch.argsort(_order())[N - 20 :])


def test_a_few_open_rows_are_compared_in_full(monkeypatch: pytest.MonkeyPatch) -> None:
    """With what their prefix does not rule out: nearest neighbours without a longer prefix, and a bound that holds."""
    costs = NeuronCosts(_pairs(*_sibling(0.3)), NeuronScale.none)
    true = _all_costs(costs.pairs, costs.scale)
    prefix = certificate._Prefix.taken_from(costs.bounding, 0.07)
    candidates = prefix.candidates(costs, torch.arange(N))
    rows, most = candidates.open_rows[:12], candidates.open_costs[:12]
    assert len(rows) == 12
    found = prefix.compared_in_full(costs, rows, most)
    assert found is not None
    assert found.settled.all()
    assert torch.equal(found.columns, true.argmin(1)[rows])
    assert (found.bound <= true.topk(2, largest=False).values[rows, 1]).all()
    monkeypatch.setattr(certificate, "_RIVALS", len(rows))
    assert prefix.compared_in_full(costs, rows, most) is None


def test_copies_of_a_neuron_prove_nothing_in_full() -> None:
    costs = NeuronCosts(_pairs(*_duplicated()), NeuronScale.none)
    prefix = certificate._Prefix.taken_from(costs.bounding, 0.16)
    rows = torch.arange(20)
    found = prefix.compared_in_full(costs, rows, prefix.candidates(costs, rows).cost)
    assert found is not None
    assert (found.cost <= found.bound * (1 + 1e-4)).all()  # what is nearest is found
    nothing = certificate.Nearest.nothing(N, torch.device("cpu"))
    left = certificate._settle(costs, rows, 2, 0.0, nothing)
    assert len(left) == 0
    true = _all_costs(costs.pairs, costs.scale)
    assert torch.equal(nothing.index[nothing.settled], true.argmin(1)[nothing.settled])


def test_settled_rows_are_nearest_neighbours() -> None:
    pairs = _pairs(*CASES["partly unrelated"][0]())
    found = nearest_neighbours(NeuronCosts(pairs, scale=NeuronScale.none))
    costs = _all_costs(pairs, scale=NeuronScale.none)
    assert 0 < len(found.settled) < N
    assert torch.equal(found.index[found.settled], costs.argmin(1)[found.settled])


@pytest.mark.parametrize("stored", ["neurons first", "neurons last"])
def test_squared_distance(stored: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(distance, "_BLOCK", 1000)
    monkeypatch.setattr(distance, "_PIECE", 30)
    a, b = _kinds(0)[0].double(), _kinds(1)[0].double()
    if stored == "neurons last":
        a, b = (x.mT.contiguous().mT for x in (a, b))
    for rows, columns in ((torch.arange(N), torch.arange(N)), (torch.arange(50, 90), _order()[:40])):
        expected = (a[rows] - b[columns]).square().sum(1)
        torch.testing.assert_close(squared_distance((a, b), rows, columns), expected)
