"""Which numbers products are taken in: those that are fastest here, and all lead to the same optimum."""

from __future__ import annotations

import re
import time
from collections.abc import Callable

import pytest
import torch
from chosen_numbers import choose
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from mergekit_symalign.graph import solve
from mergekit_symalign.symmetry.assignment.shortlist import Scores
from mergekit_symalign.symmetry.neurons import products, tiles
from mergekit_symalign.symmetry.neurons.bfloat import BfloatRows, bfloat_scores
from mergekit_symalign.symmetry.neurons.coarse import CoarseRows
from mergekit_symalign.symmetry.neurons.costs import NeuronCosts, NeuronPairs
from mergekit_symalign.symmetry.neurons.match import best_permutation
from mergekit_symalign.symmetry.neurons.products import Numbers, fastest, measured
from mergekit_symalign.symmetry.options import NeuronScale, Pair

N = 600


@pytest.fixture
def nothing_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(products, "_MEASURED", {})


@pytest.mark.usefixtures("nothing_measured")
def test_the_fastest_is_taken_and_measured_once() -> None:
    prepared, calls = [], []

    def way(name: str, seconds: float) -> Callable[[], Callable[[], None]]:
        def prepare() -> Callable[[], None]:
            prepared.append(name)

            def work() -> None:
                calls.append(name)
                time.sleep(seconds)

            return work

        return prepare

    ways = {Numbers.float32: way("float32", 0.03), Numbers.whole: way("8-bit", 0.001)}
    assert fastest("a test", 100, ways) is Numbers.whole
    assert fastest("a test", 120, ways) is Numbers.whole  # of the same power of two
    assert prepared == ["float32", "8-bit"]
    assert calls == 4 * ["float32"] + 4 * ["8-bit"]
    (seconds,) = measured().values()
    assert list(measured()) == ["a test, 64 to 127 coordinates"]
    assert 0.03 <= seconds["float32"] < 1 > 0.03 > seconds["8-bit"] >= 0.001
    fastest("a test", 128, ways)
    fastest("another", 100, ways)
    fastest("a test", 100, {**ways, Numbers.bfloat16: way("bfloat16", 0.0)})
    assert len(prepared) == 2 + 2 + 2 + 3


@pytest.mark.usefixtures("nothing_measured")
def test_a_single_possibility_is_not_measured() -> None:
    def never() -> Callable[[], object]:
        raise AssertionError("measured")

    assert fastest("a test", 100, {Numbers.float32: never}) is Numbers.float32
    assert measured() == {}


@pytest.mark.usefixtures("nothing_measured")
def test_a_merge_logs_what_was_measured(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(solve, "_LOGGED", set())
    fastest(
        "a test", 100, {Numbers.whole: lambda: time.perf_counter, Numbers.float32: lambda: lambda: time.sleep(0.01)}
    )
    with caplog.at_level("INFO"):
        solve._log_products()
        solve._log_products()
    (line,) = caplog.messages
    assert re.fullmatch(r"products for a test, 64 to 127 coordinates are taken in 8-bit \(8-bit 0.0 ms, .* ms\)", line)


@pytest.mark.usefixtures("nothing_measured")
@pytest.mark.parametrize("case", ["siblings", "unrelated"])
def test_the_first_block_is_measured(case: str) -> None:
    pairs = _siblings(torch.bfloat16) if case == "siblings" else _unrelated(torch.bfloat16)
    costs = NeuronCosts(pairs, NeuronScale.none)
    best_permutation(pairs, scale=NeuronScale.none)
    assert {name.split(",")[0] for name in measured()} == {
        "siblings": {"nearest neurons"},
        "unrelated": {"all pairs of neurons"},
    }[case]
    assert all(Numbers.bfloat16.value in times for times in measured().values())
    before = measured()
    best_permutation(costs.pairs, scale=NeuronScale.none)
    assert measured() == before


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("case", ["siblings", "unrelated"])
def test_the_same_optimum_by_all_of_them(case: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    pairs = _siblings(dtype) if case == "siblings" else _unrelated(dtype)
    found = {}
    for numbers in Numbers:
        asked = choose(monkeypatch, numbers)
        found[numbers] = best_permutation(pairs, scale=NeuronScale.none)
        assert set(asked) == {"nearest neurons" if case == "siblings" else "all pairs of neurons"}
    assert len({tuple(x.index.tolist()) for x in found.values()}) == 1
    assert len({tuple(x.routes.items()) for x in found.values()}) == 1
    score = sum((a.double() @ b.double().mT for a, b in pairs.all), torch.zeros(N, N, dtype=torch.float64))
    best = score.numpy()[linear_sum_assignment(score.numpy(), maximize=True)].sum()
    index = found[Numbers.bfloat16].index
    assert score.gather(1, index.unsqueeze(1)).sum() == pytest.approx(best, rel=1e-7)


@pytest.mark.parametrize("kind", [CoarseRows, BfloatRows])
@pytest.mark.parametrize("exact", [True, False], ids=["bfloat16", "float32"])
@pytest.mark.parametrize("outliers", ["none", "coordinates", "rows"])
def test_no_other_row_is_nearer_than_the_bound(
    kind: type[CoarseRows] | type[BfloatRows], exact: bool, outliers: str
) -> None:
    """With small rows, rows that are the same in both, and outlying coordinates or rows."""
    g = torch.Generator().manual_seed(0)
    anchor, model = (torch.randn(1500, 24, generator=g) for _ in range(2))
    for x in (anchor, model):
        x[:40] *= 0.02
        x[40:50] *= 1e4 if outliers == "rows" else 1
        x[:, 0] *= 50 if outliers == "coordinates" else 1
    model[60:80] = anchor[60:80]
    if exact:
        anchor, model = (x.bfloat16().float() for x in (anchor, model))
    rows = torch.randperm(1500, generator=g)[:1200]
    found = kind.rounded(anchor, model).nearest(rows)
    distance = torch.cdist(anchor[rows].double(), model.double(), compute_mode="donot_use_mm_for_euclid_dist").square()
    others = distance.scatter(1, found.columns.unsqueeze(1), torch.inf).amin(1)
    assert (found.bound <= others * (1 + 1e-5)).all()
    same = (rows >= 60) & (rows < 80)
    if outliers == "none" or (kind is BfloatRows and outliers == "rows"):
        assert torch.equal(found.columns[same], rows[same])
        least = 0.7 if kind is CoarseRows else 0.97 if exact else 0.9
        assert (found.bound[rows >= 50] > least * others[rows >= 50]).all()


@pytest.mark.parametrize(("height", "width", "chunk"), [(512, 1024, 256), (7, 30, 10), (100, 64, 64), (1, 1, 1)])
@pytest.mark.parametrize("columns", [1, 40, 257, 1100])
def test_tiles(height: int, width: int, chunk: int, columns: int, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"_HEIGHT": height, "_WIDTH": width, "_CHUNK": chunk}.items():
        monkeypatch.setattr(tiles, name, value)
    x = torch.randint(-(2**15), 2**15 - 1, (130, columns), generator=torch.Generator().manual_seed(0)).to(torch.int16)
    rows = torch.arange(0, 130, 2)
    place, second = tiles.two_nearest(lambda some: lambda at: x[some, at].contiguous(), rows, columns)
    ordered = x[rows].sort(1).values
    assert torch.equal(x[rows].gather(1, place.unsqueeze(1)).squeeze(1), ordered[:, 0])
    assert torch.equal(second, ordered[:, 1] if columns > 1 else torch.full_like(second, 2**15 - 1))


def test_scores_in_bfloat16_are_as_near_as_they_say() -> None:
    pairs = _unrelated(torch.bfloat16).all
    lengths = [torch.cat([pair[i] for pair in pairs], 1).double().norm(dim=1) for i in range(2)]
    found = bfloat_scores(pairs, *lengths, exact=lambda rows, columns: rows)
    truth = torch.stack([a.double() @ b.double().mT for a, b in pairs]).sum(0)
    highest, lowest = (x.reshape(truth.shape) for x in found.within(torch.arange(N**2)))
    assert ((lowest <= truth) & (truth <= highest)).all()
    hidden = (highest - lowest) / 2
    assert ((found.stored.double() - truth).abs() > 0.4 * hidden).any()  # the bound is not a wide one
    assert isinstance(found, Scores)


def _side(dtype: torch.dtype, *sizes: Tensor) -> list[Pair]:
    """Rows of anchor and model."""
    a, b = (x.to(dtype) for x in sizes)
    return [(a, b)]


def _unrelated(dtype: torch.dtype) -> NeuronPairs:
    g = torch.Generator().manual_seed(1)
    sizes = [(0.3 * torch.randn(N, 1, generator=g)).exp() for _ in range(2)]
    sides = [_side(dtype, *(size * torch.randn(N, 96, generator=g) for size in sizes)) for _ in range(3)]
    down = [tuple(x.mT.contiguous().mT for x in pair) for pair in sides[2]]
    return NeuronPairs(sides[0], sides[1], down)  # type: ignore[arg-type]


def _siblings(dtype: torch.dtype) -> NeuronPairs:
    g = torch.Generator().manual_seed(2)
    order = torch.randperm(N, generator=g)
    sides = []
    for _ in range(3):
        anchor = torch.randn(N, 400, generator=g)
        sides.append(_side(dtype, anchor, (anchor + 0.1 * torch.randn(N, 400, generator=g))[order]))
    return NeuronPairs(*sides)
