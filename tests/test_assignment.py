"""Neurons: planted permutations come back exactly, and every answer is the optimum of the assignment."""

from __future__ import annotations

import pytest
import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from mergekit_symalign.symmetry.assignment import linear
from mergekit_symalign.symmetry.assignment.linear import best_assignment
from mergekit_symalign.symmetry.groups import Chain, Permutation, Scaling
from mergekit_symalign.symmetry.neurons.costs import NeuronPairs, neuron_factors
from mergekit_symalign.symmetry.neurons.match import align_neurons
from mergekit_symalign.symmetry.options import NeuronScale

NEURONS, HIDDEN = 40, 24


def _mlp(seed: int) -> list[Tensor]:
    g = torch.Generator().manual_seed(seed)
    return [torch.randn(NEURONS, HIDDEN, generator=g) for _ in range(3)]  # gate, up, down as rows


def _pairs(anchor: list[Tensor], model: list[Tensor]) -> NeuronPairs:
    return NeuronPairs(*([(a, b)] for a, b in zip(anchor, model, strict=True)))


@pytest.mark.parametrize("noise", [0.0, 0.1, 0.5])
def test_planted_permutation_is_recovered(noise: float) -> None:
    anchor = _mlp(0)
    order = torch.randperm(NEURONS, generator=torch.Generator().manual_seed(1))
    model = [(a + noise * b)[order] for a, b in zip(anchor, _mlp(2), strict=True)]
    found = align_neurons(_pairs(anchor, model), permute=True, scale=NeuronScale.none)
    gate, up = found.gate, found.up
    assert isinstance(gate, Permutation)
    assert gate is up
    assert torch.equal(order[gate.index], torch.arange(NEURONS))


def test_unrelated_neurons_get_the_optimum() -> None:
    score = torch.randn(60, 60, generator=torch.Generator().manual_seed(0))
    index = best_assignment(score)
    rows, columns = linear_sum_assignment(score.numpy(), maximize=True)
    assert sorted(index.tolist()) == list(range(60))
    assert score[torch.arange(60), index].sum() == pytest.approx(score[rows, columns].sum().item(), rel=1e-6)


def test_equal_and_dead_neurons_stay_where_they_are() -> None:
    anchor = _mlp(0)
    for x in anchor:
        x[5:9] = 0
        x[20] = x[21]
    found = align_neurons(_pairs(anchor, [x.clone() for x in anchor]), permute=True, scale=NeuronScale.none)
    gate = found.gate
    assert gate.is_identity()


def test_planted_signed_scales_are_recovered_with_the_permutation() -> None:
    anchor = _mlp(0)
    g = torch.Generator().manual_seed(3)
    order = torch.randperm(NEURONS, generator=g)
    factor = (torch.rand(NEURONS, generator=g) * 3 + 0.3) * torch.where(torch.rand(NEURONS, generator=g) < 0.5, -1, 1)
    planted = Chain((Permutation(order), Scaling(factor.double())))
    model = [Permutation(order)(anchor[0], 0), planted(anchor[1], 0), planted.dual()(anchor[2], 0)]
    found = align_neurons(_pairs(anchor, model), permute=True, scale=NeuronScale.signed)
    gate, up = found.gate, found.up
    assert isinstance(gate, Permutation)
    assert torch.equal(order[gate.index], torch.arange(NEURONS))
    for x, y, action in zip(anchor, model, (gate, up, up.dual()), strict=True):
        torch.testing.assert_close(action(y, 0), x, rtol=1e-5, atol=1e-5)


def test_scale_without_permutation_keeps_the_order() -> None:
    anchor = _mlp(0)
    model = [anchor[0], -2 * anchor[1], anchor[2] / -2]
    found = align_neurons(_pairs(anchor, model), permute=False, scale=NeuronScale.signed)
    gate, up = found.gate, found.up
    assert gate.is_identity()
    torch.testing.assert_close(up(model[1], 0), anchor[1])


def test_pairs_are_scored_at_their_own_best_factor() -> None:
    """The score of the assignment is that of the best factor of each pair: checked against a grid of factors."""
    anchor, model = _mlp(0), _mlp(1)
    model[1] = model[1] * 3
    found = align_neurons(_pairs(anchor, model), permute=True, scale=NeuronScale.signed)
    gate, up = found.gate, found.up

    def cost(index: Tensor) -> float:
        total = (anchor[0] - model[0][index]).square().sum(-1)
        grid = torch.cat((torch.logspace(-6, 6, 2001, base=2.0), -torch.logspace(-6, 6, 2001, base=2.0)))[:, None]
        u, v = (anchor[1] * model[1][index]).sum(-1), (anchor[2] * model[2][index]).sum(-1)
        b, o = model[1][index].square().sum(-1), model[2][index].square().sum(-1)
        best = (grid**2 * b + o / grid**2 - 2 * (grid * u + v / grid)).amin(0)
        return float((total + best + anchor[1].square().sum(-1) + anchor[2].square().sum(-1)).sum())

    actions = (gate, up, up.dual())
    reached = sum(float((g(y, 0) - x).square().sum()) for g, x, y in zip(actions, anchor, model, strict=True))
    assert isinstance(gate, Permutation)
    assert reached <= cost(gate.index) * (1 + 1e-5)
    swapped = gate.index.clone()
    for i in range(NEURONS - 1):  # no exchange of two neurons is better
        swapped[[i, i + 1]] = swapped[[i + 1, i]]
        assert reached <= cost(swapped) * (1 + 1e-5)
        swapped[[i, i + 1]] = swapped[[i + 1, i]]


def test_signed_scale_beats_a_grid() -> None:
    g = torch.Generator().manual_seed(0)
    p, q = (2 * torch.randn(300, generator=g, dtype=torch.float64) for _ in range(2))
    b, o = (torch.rand(300, generator=g, dtype=torch.float64) + 0.05 for _ in range(2))
    c = neuron_factors((p, b), (q, o), signed=True)
    grid = torch.logspace(-7, 7, 8001, base=2.0, dtype=torch.float64)[:, None]

    def f(c: Tensor) -> Tensor:
        return c**2 * b + o / c**2 - 2 * (c * p + q / c)

    assert (f(c) <= torch.minimum(f(grid).amin(0), f(-grid).amin(0)) + 1e-8).all()


def test_large_problems_use_short_lists_and_give_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    score = torch.randn(600, 600, generator=torch.Generator().manual_seed(0))
    found = best_assignment(score)
    monkeypatch.setattr(linear, "LARGE", 10**9)
    assert torch.equal(found, best_assignment(score))
