"""Short lists of good pairs: the optimum of the whole matrix, from exact scores or from rounded ones, or no answer."""

from __future__ import annotations

import time

import pytest
import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from mergekit_symalign.symmetry import rounded, shortlist
from mergekit_symalign.symmetry.assignment import _sparse_matching, best_assignment, best_permutation
from mergekit_symalign.symmetry.auction import auction_prices
from mergekit_symalign.symmetry.neuron_costs import NeuronCosts, NeuronPairs
from mergekit_symalign.symmetry.options import NeuronScale
from mergekit_symalign.symmetry.shortlist import Scores, shortlist_assignment

N = 400
DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def _scores(kind: str) -> Tensor:
    g = torch.Generator().manual_seed(0)
    score = torch.randn(N, N, generator=g)
    if kind == "ties":
        return (score * 4).round()
    if kind == "low rank":
        return torch.randn(N, 3, generator=g) @ torch.randn(3, N, generator=g)
    if kind == "contested":  # every row wants the same columns
        return score + 3 * torch.randn(N, generator=g)
    if kind == "uneven":  # neurons of different size, none of which knows the others
        return (0.3 * torch.randn(N, 1, generator=g)).exp() * score * (0.3 * torch.randn(N, generator=g)).exp()
    if kind == "spread":  # neurons' activations differ in size by many orders of magnitude
        size, x = (3 * torch.randn(N, 1, generator=g)).exp(), torch.randn(N, 60, generator=g)
        return (size * x) @ (size * (x + 0.1 * torch.randn(N, 60, generator=g))).mT
    return score


def _coarse(score: Tensor) -> Tensor:
    """To four significant bits."""
    share, power = score.frexp()
    return (share * 16).round().div(16).ldexp(power)


def _rounded(score: Tensor) -> Scores:
    def exact(rows: Tensor, columns: Tensor) -> Tensor:
        return score[rows, columns]

    return Scores(_coarse(score), torch.zeros(len(score), dtype=torch.float64), 2.0**-4, exact)


def _best(score: Tensor) -> float:
    return float(score.double()[linear_sum_assignment(score.double().numpy(), maximize=True)].sum())


def _total(score: Tensor, index: Tensor) -> float:
    assert sorted(index.tolist()) == list(range(len(score)))
    return float(score.double()[torch.arange(len(score)), index].sum())


@pytest.mark.parametrize("source", [Scores.known, _rounded], ids=["exact", "rounded"])
@pytest.mark.parametrize("kind", ["random", "ties", "low rank", "contested", "uneven", "spread"])
def test_the_optimum_of_the_whole_matrix(kind: str, source: object, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shortlist, "_LIST", 8)
    monkeypatch.setattr(shortlist, "_MOST", N)  # ties and lists that are not short are solved all the same
    score = _scores(kind)
    index = shortlist_assignment(source(score), _sparse_matching)  # type: ignore[operator]
    assert index is not None
    assert _total(score, index) == pytest.approx(_best(score), rel=1e-6)


def test_rounded_scores_alone_would_not_do() -> None:
    """What the test above relies on: the optimum of the rounded scores is another."""
    score = _scores("random")
    index = shortlist_assignment(Scores.known(_coarse(score)), _sparse_matching)
    assert index is not None
    assert _total(score, index) < _best(score) * (1 - 1e-4)


def test_no_answer_where_every_pair_can_matter() -> None:
    def exact(rows: Tensor, columns: Tensor) -> Tensor:
        raise AssertionError("all pairs, one by one")

    vague = Scores(_scores("random"), torch.full((N,), 10.0, dtype=torch.float64), 0.0, exact)
    assert shortlist_assignment(vague, _sparse_matching) is None


@pytest.mark.parametrize("kind", ["contested", "uneven"])
def test_prices_say_where_the_optimum_is(kind: str) -> None:
    score = _scores(kind)
    rows, columns = map(torch.from_numpy, linear_sum_assignment(score.numpy(), maximize=True))
    free, priced = (
        float(torch.isin(rows * N + columns, shortlist._lists(Scores.known(score), price)).float().mean())
        for price in (torch.zeros(N, dtype=torch.float64), auction_prices(score))
    )
    assert free < 0.9
    assert priced > 0.99


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rounded_scores_are_as_near_as_they_say(dtype: torch.dtype) -> None:
    pairs = _neurons(dtype, 300).all
    lengths = [torch.cat([x[i] for x in pairs], 1).double().norm(dim=1) for i in range(2)]
    found = rounded.rounded_scores(pairs, *lengths, exact=lambda rows, columns: rows)
    truth = sum((a.double() @ b.double().mT for a, b in pairs), torch.zeros(300, 300, dtype=torch.float64))
    off = (found.stored.double() - truth).abs()
    hidden = found.error.unsqueeze(1) + found.relative * found.stored.double().abs()
    assert (off <= hidden).all()
    assert (off > 0.3 * hidden).any() == (dtype is torch.bfloat16)  # the bound is not a wide one
    assert (hidden.mean() < 0.6 * truth.std()).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("spread", [1, 3])
def test_neurons_of_very_different_size_take_seconds(spread: int, dtype: torch.dtype) -> None:
    """The sparse solver went on for minutes (600 neurons) where costs were not rounded to whole numbers."""
    g = torch.Generator().manual_seed(0)
    a, b = ((spread * torch.randn(600, 1, generator=g)).exp() * torch.randn(600, 256, generator=g) for _ in range(2))
    score = (a @ b.mT).to(dtype)
    started = time.perf_counter()
    index = best_assignment(score)
    assert time.perf_counter() - started < 20
    assert _total(score, index) == pytest.approx(_best(score), rel=1e-6)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_unrelated_models_by_rounded_scores(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same permutation as by exact scores, the optimum, on processors that have fast 16-bit products and others."""
    pairs = _neurons(dtype, 600)
    found = {}
    for fast in (True, False):
        monkeypatch.setattr(rounded, "usable", lambda device, dtype, fast=fast: fast)
        assert (NeuronCosts(pairs, NeuronScale.none).rounded_scores() is not None) == fast
        found[fast] = best_permutation(pairs, scale=NeuronScale.none)
        assert found[fast].routes == {"neurons_full": 600}
    assert torch.equal(found[True].index, found[False].index)
    score = sum((a.double() @ b.double().mT for a, b in pairs.all), torch.zeros(600, 600, dtype=torch.float64))
    assert _total(score, found[True].index) == pytest.approx(_best(score), rel=1e-7)


def test_threads_and_blocks_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rounded, "usable", lambda device, dtype: True)
    pairs, threads = _neurons(torch.bfloat16, 600), torch.get_num_threads()
    found = []
    for many, rows, block in ((1, 1024, 1 << 19), (2, 128, 1 << 15), (3, 50, 601)):
        monkeypatch.setattr(rounded, "_ROWS", rows)
        monkeypatch.setattr(rounded, "_PIECE", rows // 2)
        monkeypatch.setattr(shortlist, "_BLOCK", block)
        torch.set_num_threads(many)
        try:
            found.append(best_permutation(pairs, scale=NeuronScale.none))
        finally:
            torch.set_num_threads(threads)
    assert all(torch.equal(found[0].index, x.index) and x.cost == found[0].cost for x in found)


def test_the_identity_stays_where_it_is_as_good(monkeypatch: pytest.MonkeyPatch) -> None:
    """Neurons that are all alike may stand in any order: they are left where they are."""
    monkeypatch.setattr(rounded, "usable", lambda device, dtype: True)
    row = torch.randn(1, 40, generator=torch.Generator().manual_seed(0)).bfloat16().expand(600, -1)
    pairs = NeuronPairs([(row, -row)], [(row, -row)], [(row, -row)])
    assert torch.equal(best_permutation(pairs, scale=NeuronScale.none).index, torch.arange(600))


def test_scores_that_are_all_the_same_take_no_auction() -> None:
    assert torch.equal(auction_prices(torch.ones(N, N)), torch.zeros(N, dtype=torch.float64))


def test_float64_keeps_its_precision() -> None:
    assert not rounded.usable(torch.device("cpu"), torch.float64)
    assert not rounded.usable(torch.device("meta"), torch.bfloat16)


def _neurons(dtype: torch.dtype, n: int) -> NeuronPairs:
    """Two models that have nothing in common, with neurons of different size."""
    g = torch.Generator().manual_seed(1)

    def rows() -> Tensor:
        return ((0.3 * torch.randn(n, 1, generator=g)).exp() * torch.randn(n, 96, generator=g)).to(dtype)

    return NeuronPairs(*([(rows(), rows())] for _ in range(3)))
