"""Short lists of good pairs: the optimum of the whole matrix, from exact scores or from rounded ones, or no answer."""

from __future__ import annotations

import pytest
import torch
from chosen_numbers import choose
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from mergekit_symalign.symmetry.assignment import shortlist
from mergekit_symalign.symmetry.assignment.auction import auction_prices
from mergekit_symalign.symmetry.assignment.linear import best_assignment, sparse_matching
from mergekit_symalign.symmetry.assignment.shortlist import Scores, shortlist_assignment
from mergekit_symalign.symmetry.neurons import quantized
from mergekit_symalign.symmetry.neurons.costs import NeuronPairs
from mergekit_symalign.symmetry.neurons.match import best_permutation
from mergekit_symalign.symmetry.neurons.products import Numbers
from mergekit_symalign.symmetry.options import NeuronScale

N = 400


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

    return Scores(_coarse(score), Scores.known(score).error, 2.0**-4, exact)


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
    index = shortlist_assignment(source(score), sparse_matching)  # type: ignore[operator]
    assert index is not None
    assert _total(score, index) == pytest.approx(_best(score), rel=1e-6)


def test_rounded_scores_alone_would_not_do() -> None:
    """What the test above relies on: the optimum of the rounded scores is another."""
    score = _scores("random")
    index = shortlist_assignment(Scores.known(_coarse(score)), sparse_matching)
    assert index is not None
    assert _total(score, index) < _best(score) * (1 - 1e-4)


def test_no_answer_where_every_pair_can_matter() -> None:
    def exact(rows: Tensor, columns: Tensor) -> Tensor:
        raise AssertionError("all pairs, one by one")

    much = torch.full((N, 1), 10.0**0.5, dtype=torch.float64)
    vague = Scores(_scores("random"), (much, much), 0.0, exact)
    assert shortlist_assignment(vague, sparse_matching) is None


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


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("spread", [1, 3])
def test_neurons_of_very_different_size(spread: int, dtype: torch.dtype) -> None:
    """The optimum; that it takes seconds and not minutes is in tests/benchmarks/timings.py."""
    g = torch.Generator().manual_seed(0)
    a, b = ((spread * torch.randn(600, 1, generator=g)).exp() * torch.randn(600, 256, generator=g) for _ in range(2))
    score = (a @ b.mT).to(dtype)
    index = best_assignment(score)
    assert _total(score, index) == pytest.approx(_best(score), rel=1e-6)


OUTLIERS = {"a row": ((3,), ()), "a column": ((), (8,)), "a pair": ((3,), (3,)), "several": ((3, 40, 41), (8, 90))}


def _with_outliers(rows: tuple[int, ...], columns: tuple[int, ...], n: int, factor: float) -> tuple[Tensor, Tensor]:
    """Neurons of two unrelated models, a few of them so many times larger than the rest."""
    g = torch.Generator().manual_seed(0)
    anchor, model = (torch.randn(n, 128, generator=g) for _ in range(2))
    anchor[list(rows)] *= factor
    model[list(columns)] *= factor
    return anchor, model


def _lost(score: Tensor, index: Tensor, of: tuple[int, ...]) -> float:
    """What a permutation misses of the best total, in roundings of the scores between ordinary rows and columns."""
    ordinary = torch.ones(len(score), dtype=torch.bool)
    ordinary[list(of)] = False
    rounding = torch.finfo(torch.float32).eps * score[ordinary][:, ordinary].abs().amax(1).sum()
    return (_best(score) - _total(score, index)) / float(rounding)


@pytest.mark.parametrize("n", [200, 600], ids=["dense", "short lists"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("where", OUTLIERS)
def test_an_outlier_does_not_hide_what_the_others_gain(where: str, dtype: torch.dtype, n: int) -> None:
    rows, columns = OUTLIERS[where]
    anchor, model = _with_outliers(rows, columns, n, 1e4)
    score = anchor.to(dtype) @ model.to(dtype).mT
    assert _lost(score.double(), best_assignment(score), (*rows, *columns)) < 4  # its own rounding, twice each way


@pytest.mark.parametrize("numbers", Numbers)
@pytest.mark.parametrize("where", OUTLIERS)
def test_neurons_beside_an_outlier_get_their_optimum(
    where: str, numbers: Numbers, monkeypatch: pytest.MonkeyPatch
) -> None:
    choose(monkeypatch, numbers)
    monkeypatch.setattr(quantized, "usable", lambda device, dtype, columns: numbers is Numbers.whole)
    if not torch.backends.cpu.get_cpu_capability().startswith("AVX512"):
        monkeypatch.setattr(quantized, "_LARGEST", 63)
    rows, columns = OUTLIERS[where]
    anchor, model = _with_outliers(rows, columns, 600, 1e4)
    if numbers is Numbers.bfloat16:
        anchor, model = anchor.bfloat16(), model.bfloat16()
    found = best_permutation(NeuronPairs([], [(anchor, model)], []), scale=NeuronScale.none)
    score = anchor.double() @ model.double().mT
    norm = anchor.norm(dim=1).double().median() * model.norm(dim=1).double().median()
    lost = (_best(score) - _total(score, found.index)) / (600 * torch.finfo(torch.float32).eps * float(norm))
    assert lost < 4  # a score is the difference of the pair's norms and its distance, each in float32


def test_a_few_neurons_move_beside_one_that_stays() -> None:
    """The large one keeps its place, and what the others gain is less than the rounding of its score."""
    anchor, _ = _with_outliers((0,), (), 50, 1e6)
    order = torch.arange(50)
    order[10:20] = order[10:20].roll(1)
    index = best_assignment(anchor @ anchor[order].mT)
    assert torch.equal(order[index], torch.arange(50))


def test_moves_that_gain_nothing_are_left_out() -> None:
    """Two copies of a neuron may change places, and stay; three others that have to move do."""
    anchor, _ = _with_outliers((), (), 50, 1.0)
    anchor[1] = anchor[0]
    order = torch.arange(50)
    order[[5, 6, 7]] = order[[6, 7, 5]]
    index = best_assignment(anchor @ anchor[order].mT)
    assert index[:2].tolist() == [0, 1]
    assert torch.equal(order[index], torch.arange(50))


def test_scores_that_are_all_the_same_take_no_auction() -> None:
    assert torch.equal(auction_prices(torch.ones(N, N)), torch.zeros(N, dtype=torch.float64))
