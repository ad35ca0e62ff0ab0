"""Scores of all pairs from 8-bit numbers: as near to the truth as they say, and enough to find the optimum."""

from __future__ import annotations

import math

import pytest
import torch
from chosen_numbers import choose
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from mergekit_symalign.symmetry.assignment import shortlist
from mergekit_symalign.symmetry.assignment.shortlist import Scores
from mergekit_symalign.symmetry.neurons import quantized
from mergekit_symalign.symmetry.neurons.costs import NeuronCosts, NeuronPairs
from mergekit_symalign.symmetry.neurons.match import best_permutation
from mergekit_symalign.symmetry.neurons.products import Numbers
from mergekit_symalign.symmetry.options import NeuronScale, Pair

CPU = torch.device("cpu")
DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def _quantize(monkeypatch: pytest.MonkeyPatch, use: bool = True) -> None:
    """Whether to take this route, on whatever processor the tests run."""
    if not quantized.usable(CPU, torch.float32, 1):
        monkeypatch.setattr(quantized, "_LARGEST", 63)
    monkeypatch.setattr(quantized, "usable", lambda device, dtype, columns: use)
    choose(monkeypatch, Numbers.whole)


def _scores(*pairs: Pair) -> Scores:
    lengths = [torch.cat([x[i] for x in pairs], 1).double().norm(dim=1) for i in range(2)]
    return quantized.quantized_scores(pairs, *lengths, exact=lambda rows, columns: rows)


def _errors(found: Scores, *pairs: Pair) -> tuple[Tensor, Tensor]:
    """How far the scores are off, and how far they say they may be."""
    truth = torch.stack([a.double() @ b.double().mT for a, b in pairs]).sum(0)
    highest, _ = found.within(torch.arange(len(truth) ** 2))
    stored = found.stored.double()
    return (stored - truth).abs(), highest.reshape(truth.shape) - stored


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_scores_are_as_near_as_they_say(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    _quantize(monkeypatch)
    pairs = _unrelated(dtype, 300).all
    off, hidden = _errors(_scores(*pairs), *pairs)
    assert (off <= hidden).all()
    assert (off > 0.2 * hidden).any()  # the bound is not a wide one
    truth = torch.stack([a.double() @ b.double().mT for a, b in pairs]).sum(0)
    assert hidden.mean() < 0.6 * truth.std()


def test_errors_do_not_add_up_where_all_round_the_same_way(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows of numbers that all lie just below the middle of two whole ones, but for one that sets the step."""
    _quantize(monkeypatch)
    x = torch.full((20, 4096), 10.49)
    x[:, 0] = quantized._LARGEST
    off, hidden = _errors(_scores((x, x)), (x, x))
    assert (off <= hidden).all()
    without_dither = (10.49**2 - 10**2) * 4095
    assert without_dither > 3 * hidden.max()


def test_errors_spread_as_much_as_the_bound_says(monkeypatch: pytest.MonkeyPatch) -> None:
    """Over many draws no side is preferred, and their variance is what the bound is made of: 1 / 12 of their terms."""
    _quantize(monkeypatch)
    g = torch.Generator().manual_seed(0)
    a, b = (torch.randn(20, 1000, generator=g) for _ in range(2))
    step = [x.abs().amax(1) / quantized._LARGEST for x in (a, b)]
    terms = torch.hypot(step[0].unsqueeze(1) * b.norm(dim=1), step[1] * a.norm(dim=1).unsqueeze(1)).double()
    draws = []
    for seed in range(200):
        monkeypatch.setattr(quantized, "_SEEDS", (2 * seed, 2 * seed + 1))
        draws.append((_scores((a, b)).stored.double() - a.double() @ b.double().mT) / terms)
    errors = torch.stack(draws)
    assert errors.square().mean() == pytest.approx(1 / 12, rel=0.05)
    assert errors.mean(0).abs().max() < 6 * (1 / 12 / len(draws)) ** 0.5
    assert errors.abs().max() < quantized._deviations(20)


def test_the_bound_holds_but_for_the_chance(monkeypatch: pytest.MonkeyPatch) -> None:
    """Hoeffding's bound for one pair (two events that go two ways each), and what more pairs add to it."""
    monkeypatch.setattr(quantized, "_CHANCE", 1e-6)
    assert 2 * 2 * math.exp(-6 * quantized._deviations(1) ** 2) == pytest.approx(1e-6)
    assert 2 * 2 * math.exp(-6 * quantized._deviations(1000) ** 2) == pytest.approx(1e-6 / 1000**2)


def test_one_neuron_with_an_outlier_leaves_the_others_in_focus(monkeypatch: pytest.MonkeyPatch) -> None:
    """Trained weights have them. Steps are each row's own, and so are the bounds."""
    _quantize(monkeypatch)
    g = torch.Generator().manual_seed(0)
    a, b = (torch.randn(50, 600, generator=g) for _ in range(2))
    _, before = _errors(_scores((a, b)), (a, b))
    a[3, 100] = b[7, 200] = 1000.0
    off, hidden = _errors(_scores((a, b)), (a, b))
    assert (off <= hidden).all()
    rows, columns = (torch.arange(50) != i for i in (3, 7))
    torch.testing.assert_close(hidden[rows][:, columns], before[rows][:, columns], rtol=1e-2, atol=0)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_unrelated_models_by_quantized_scores(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same permutation as by exact scores, the optimum, on processors that have fast 8-bit products and others."""
    pairs = _unrelated(dtype, 600)
    found = {}
    for fast in (True, False):
        _quantize(monkeypatch, fast)
        assert (NeuronCosts(pairs, NeuronScale.none).rounded_scores() is not None) == fast
        found[fast] = best_permutation(pairs, scale=NeuronScale.none)
        assert found[fast].routes == {"neurons_full": 600}
    assert torch.equal(found[True].index, found[False].index)
    score = sum((a.double() @ b.double().mT for a, b in pairs.all), torch.zeros(600, 600, dtype=torch.float64))
    best = score.numpy()[linear_sum_assignment(score.numpy(), maximize=True)].sum()
    assert score.gather(1, found[True].index.unsqueeze(1)).sum() == pytest.approx(best, rel=1e-7)


def test_threads_and_blocks_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    _quantize(monkeypatch)
    pairs, threads = _unrelated(torch.bfloat16, 600), torch.get_num_threads()
    found = []
    for many, rows, block in ((1, 1024, 1 << 19), (2, 128, 1 << 15), (3, 50, 601)):
        monkeypatch.setattr(quantized, "_ROWS", rows)
        monkeypatch.setattr(quantized, "_PIECE", rows // 2)
        monkeypatch.setattr(quantized, "_BLOCK", block)
        monkeypatch.setattr(shortlist, "_BLOCK", block)
        torch.set_num_threads(many)
        try:
            found.append(best_permutation(pairs, scale=NeuronScale.none))
        finally:
            torch.set_num_threads(threads)
    assert all(torch.equal(found[0].index, x.index) and x.cost == found[0].cost for x in found)


def test_the_identity_stays_where_it_is_as_good(monkeypatch: pytest.MonkeyPatch) -> None:
    """Neurons that are all alike may stand in any order: they are left where they are."""
    _quantize(monkeypatch)
    row = torch.randn(1, 40, generator=torch.Generator().manual_seed(0)).bfloat16().expand(600, -1)
    pairs = NeuronPairs([(row, -row)], [(row, -row)], [(row, -row)])
    assert torch.equal(best_permutation(pairs, scale=NeuronScale.none).index, torch.arange(600))


def test_where_it_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not where products may overflow, not for float64, which would lose its precision, nor on other devices."""
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_vnni": True}, raising=False)
    assert quantized.usable(CPU, torch.bfloat16, 100_000)
    assert not quantized.usable(CPU, torch.bfloat16, 200_000)
    assert not quantized.usable(CPU, torch.float64, 100)
    assert not quantized.usable(torch.device("meta"), torch.bfloat16, 100)
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx2": True, "avx512_vnni": False}, raising=False)
    assert not quantized.usable(CPU, torch.bfloat16, 100)


def _unrelated(dtype: torch.dtype, n: int) -> NeuronPairs:
    """Two models that have nothing in common, with neurons of different size."""
    g = torch.Generator().manual_seed(1)

    def rows() -> Tensor:
        return ((0.3 * torch.randn(n, 1, generator=g)).exp() * torch.randn(n, 96, generator=g)).to(dtype)

    return NeuronPairs(*([(rows(), rows())] for _ in range(3)))
