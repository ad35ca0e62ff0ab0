"""Costs and maps of optimal transport: against the Hungarian algorithm, against all tokens at once, and their laws."""

from __future__ import annotations

import pytest
import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from mergekit_symalign.errors import ShapeError
from mergekit_symalign.families.flow import Place
from mergekit_symalign.fusion.correlations import TokenSums, activation_costs
from mergekit_symalign.fusion.flow import Evidence, Policy, Residual, through_front
from mergekit_symalign.fusion.flow import Part as FlowPart
from mergekit_symalign.fusion.maps import (
    Map,
    Mixing,
    attended_map,
    matrix_of,
    mean,
    over_heads,
    simplified,
    weighted_mean,
)
from mergekit_symalign.fusion.transport import transport, weight_costs
from mergekit_symalign.symmetry.element import TensorAxes
from mergekit_symalign.symmetry.groups import Permutation

ROUNDING = 1e-12


def _random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def _shuffle(n: int, seed: int = 0) -> Tensor:
    return torch.randperm(n, generator=torch.Generator().manual_seed(seed))


def _distances(anchor: Tensor, model: Tensor) -> Tensor:
    """From rows, number by number."""
    costs = torch.stack([torch.stack([(a - b).norm() for a in anchor]) for b in model])
    return costs / costs.max()


@pytest.mark.parametrize("n", [1, 7, 60, 200])
def test_exact_transport_costs_what_the_hungarian_algorithm_finds(n: int) -> None:
    for seed in range(3):
        costs = torch.rand(n, n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        rows, columns = linear_sum_assignment(costs.numpy())
        found = transport(costs, 0.0)
        assert abs(found.after - float(costs[rows, columns].mean())) < ROUNDING
        assert isinstance(found.map, Permutation)
        assert torch.equal(found.map.index.sort().values, torch.arange(n))


def test_weight_costs_are_distances_of_unit_rows() -> None:
    a, b = _random(6, 9), _random(6, 9, seed=1)
    unit = (x / x.norm(dim=1, keepdim=True) for x in (a, b))
    torch.testing.assert_close(weight_costs([(a, b)]), _distances(*unit))


def test_costs_of_several_tensors_count_alike() -> None:
    """Gate and up: scaling one of them changes nothing."""
    one, other = (_random(6, 9), _random(6, 9, seed=1)), (_random(6, 4, seed=2), _random(6, 4, seed=3))
    scaled = (100 * other[0], 0.01 * other[1])
    torch.testing.assert_close(weight_costs([one, other]), weight_costs([one, scaled]))
    assert not torch.allclose(weight_costs([one, other]), weight_costs([one]))


def test_rows_of_zeros_cost_what_they_differ() -> None:
    anchor = torch.tensor([[0.0, 0.0], [0.0, 2.0]])
    assert weight_costs([(anchor, anchor)]).tolist() == [[0.0, 1.0], [1.0, 0.0]]


def test_rows_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ShapeError, match="rows of a unit"):
        weight_costs([(_random(4, 3), _random(5, 3))])
    with pytest.raises(ShapeError, match="costs"):
        transport(torch.zeros(2, 3), 0.0)


@pytest.mark.parametrize("regularization", [0.0, 0.5, 0.08, 0.06, 0.009, 0.002])
def test_rows_and_columns_sum_to_one(regularization: float) -> None:
    costs = weight_costs([(_random(40, 9), _random(40, 9, seed=1))])
    matrix = matrix_of(transport(costs, regularization).map)
    for sums in (matrix.sum(0), matrix.sum(1)):
        torch.testing.assert_close(sums, torch.ones(40, dtype=torch.float64), rtol=0, atol=ROUNDING)
    assert bool((matrix >= 0).all())


def test_sinkhorn_tends_to_exact_transport() -> None:
    rows, order = _random(30, 12), _shuffle(30)
    costs = weight_costs([(rows, rows[order] + 0.5 * _random(30, 12, seed=1))])
    exact = transport(costs, 0.0)
    found = [transport(costs, r) for r in (1.0, 0.1, 0.01, 0.001)]
    above = [one.after - exact.after for one in found]
    assert above == sorted(above, reverse=True)
    assert above[-1] < 1e-9  # the error of the sums at which POT stops
    torch.testing.assert_close(matrix_of(found[-1].map), matrix_of(exact.map), rtol=0, atol=1e-9)


def test_planted_order_is_found() -> None:
    rows, order = _random(50, 20), _shuffle(50)
    found = transport(weight_costs([(rows, rows[order])]), 0.0)
    assert torch.equal(found.map(rows[order], 0), rows)  # type: ignore[operator]
    assert found.after == 0.0


def test_units_that_may_as_well_stay_do() -> None:
    """Silent and equal neurons read the same and may write different things: identical models must stay identical."""
    rows = torch.cat((torch.zeros(3, 8, dtype=torch.float64), _random(2, 8), _random(2, 8)))
    found = transport(weight_costs([(rows, rows)]), 0.0)
    assert found.map.index.tolist() == list(range(7))  # type: ignore[union-attr]


def _tokens(n: int = 90, units: int = 6) -> tuple[Tensor, Tensor]:
    x = _random(n, units)
    return 3 * x + 50, x @ _random(units, units, seed=1) - 1000


def test_activation_costs_are_distances_of_z_scores() -> None:
    anchor, model = _tokens()
    z = [((x - x.mean(0)) / x.std(0, unbiased=False)).mT for x in (anchor, model)]
    torch.testing.assert_close(activation_costs([TokenSums.of(anchor, model)], torch.float64), _distances(*z))


def test_sums_do_not_depend_on_the_batches() -> None:
    anchor, model = _tokens()
    sums: TokenSums | None = None
    for i in range(0, len(anchor), 7):
        sums = TokenSums.of(anchor[i : i + 7], model[i : i + 7], sums)
    assert sums is not None
    whole = TokenSums.of(anchor, model)
    costs = [activation_costs([x], torch.float64) for x in (sums, whole)]
    torch.testing.assert_close(*costs, rtol=0, atol=1e-9)
    covariance = sums.covariance()
    torch.testing.assert_close(covariance.cross, anchor.mT @ model)
    torch.testing.assert_close(covariance.model, model.square().sum(0))


def test_a_large_mean_hides_no_unit_in_float32() -> None:
    anchor = _random(400, 5).float() + 1e4
    order = _shuffle(5, seed=3)
    found = transport(activation_costs([TokenSums.of(anchor, anchor[:, order])], torch.float32), 0.0)
    assert torch.equal(found.map(anchor[:, order], 1), anchor)  # type: ignore[operator]


def test_constant_units_have_no_z_score() -> None:
    tokens = _random(50, 3)
    tokens[:, 1] = 7.3
    costs = activation_costs([TokenSums.of(tokens, tokens)], torch.float64)
    assert costs.diagonal().tolist() == [0.0, 0.0, 0.0]
    assert float(costs[1, 0]) == pytest.approx(2**-0.5 * float(costs[0, 2]), rel=0.5)
    assert bool(costs.isfinite().all())


def test_maps_act_as_their_matrix_does() -> None:
    x = _random(4, 5, 3)
    for of in (Permutation(_shuffle(5)), Mixing(_random(5, 5))):
        expected = torch.einsum("abc,bd->adc", x, matrix_of(of))
        torch.testing.assert_close(of(x, 1), expected)


def test_mean_of_equal_permutations_stays_one() -> None:
    a, b = Permutation(_shuffle(5)), Permutation(_shuffle(5, seed=1))
    assert isinstance(mean((a, a), (0.5, 0.5)), Permutation)
    torch.testing.assert_close(matrix_of(mean((a, b), (0.25, 0.75))), 0.25 * matrix_of(a) + 0.75 * matrix_of(b))


@pytest.mark.parametrize("regularization", [0.0, 0.1])
def test_attended_map_keeps_the_values_and_the_sums(regularization: float) -> None:
    kv_heads, group, head_dim = 3, 2, 4

    def found(n: int, seed: int) -> Map:
        return transport(weight_costs([(_random(n, 9, seed=seed), _random(n, 9, seed=seed + 1))]), regularization).map

    value, query = found(kv_heads * head_dim, 0), found(kv_heads * group * head_dim, 5)
    matrix = matrix_of(attended_map(value, query, kv_heads, head_dim))
    for sums in (matrix.sum(0), matrix.sum(1)):
        torch.testing.assert_close(sums, torch.ones(len(matrix), dtype=torch.float64), rtol=0, atol=1e-6)
    shared = matrix.reshape(kv_heads, group, head_dim, kv_heads, group, head_dim).sum((1, 4)) / group
    torch.testing.assert_close(shared.reshape(12, 12), matrix_of(value), rtol=0, atol=1e-6)


def test_gains_take_the_mean_over_heads() -> None:
    within = Permutation(_shuffle(4))
    heads = (torch.tensor([2, 0, 1]).unsqueeze(1) * 4 + within.index).flatten()
    found = over_heads(Permutation(heads), 4)
    assert isinstance(found, Permutation)
    assert torch.equal(found.index, within.index)


def test_only_permutations_are_simplified() -> None:
    assert isinstance(simplified(torch.eye(3).double()), Permutation)
    for other in (torch.eye(3).double() * 0.5, torch.tensor([[1.0, 1.0], [0.0, 0.0]])):
        assert isinstance(simplified(other), Mixing)


def test_weighted_mean() -> None:
    x, y, z = (_random(3, 4, seed=i) for i in range(3))
    torch.testing.assert_close(weighted_mean([(x, 1.0), (y, 2.0), (z, 5.0)]), (x + 2 * y + 5 * z) / 8)
    assert torch.equal(weighted_mean([(x, 0.0), (y, 3.0)]), y)
    assert torch.equal(weighted_mean([(x, 0.3), (x, 0.3), (x, 0.3)]), x)


@pytest.mark.parametrize("residual", list(Residual))
def test_policies_at_a_junction(residual: Residual) -> None:
    """Words are what is added to positions: the stream in front of the layers is the first junction."""
    axes = TensorAxes(("vocabulary", "residual"))
    words, positions = ((_random(20, 6, seed=s), _random(20, 6, seed=s)[:, _shuffle(6, s)]) for s in (1, 2))
    parts = {
        "words": FlowPart(axes, Place.words, *words),
        "positions": FlowPart(axes, Place.positions, *positions),
    }
    flow = through_front(parts, 6, Policy(residual=residual), Evidence())
    own, added = (torch.eye(6).double()[:, _shuffle(6, s).argsort()] for s in (2, 1))
    expected = {
        Residual.mean: (own + added) / 2,
        Residual.weighted: (own + added) / 2,  # sizes are those of layers
        Residual.branch: added,
        Residual.skip: own,
        Residual.identity: torch.eye(6).double(),
    }
    torch.testing.assert_close(matrix_of(flow.places[Place.front]), expected[residual])
