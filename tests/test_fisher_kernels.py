"""Means weighted by Fisher information, diagonal and in Kronecker factors, against dense solves."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from mergekit_symalign.fusion.fisher import fisher_mean
from mergekit_symalign.fusion.kronecker import Factors, kronecker_mean
from mergekit_symalign.fusion.outcome import Route

OUT, IN = 5, 7
SHARES = [0.3, 1.0, 2.0, 0.7]


def _random(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def _weights(count: int) -> list[Tensor]:
    return [_random(i, OUT, IN) for i in range(count)]


def _average(weights: list[Tensor]) -> Tensor:
    shares = SHARES[: len(weights)]
    return sum(s * w for s, w in zip(shares, weights, strict=True)) / sum(shares)  # type: ignore[no-any-return]


def _factors(count: int, rows: int = 40) -> list[Factors]:
    def square(seed: int, n: int) -> Tensor:
        x = _random(seed, rows, n)
        return x.T @ x

    return [Factors(square(200 + i, IN), 1e-3 * square(300 + i, OUT)) for i in range(count)]


@pytest.mark.parametrize("count", [1, 2, 4])
def test_numbers_are_weighted_by_their_fisher_information(count: int) -> None:
    weights, fishers = _weights(count), [_random(20 + i, OUT, IN).square() for i in range(count)]
    pairs = list(zip(SHARES, weights, fishers, strict=False))
    wanted = sum(s * f * w for s, w, f in pairs) / sum(s * f for s, _, f in pairs)
    found = fisher_mean(weights, SHARES[:count], fishers)
    assert found.route is Route.exact
    torch.testing.assert_close(found.weight, wanted)


def test_a_floor_is_added_to_all() -> None:
    weights, fishers = _weights(3), [_random(20 + i, OUT, IN).square() for i in range(3)]
    floor = 0.2
    each = floor / sum(SHARES[:3])
    pairs = list(zip(SHARES, weights, fishers, strict=False))
    wanted = sum(s * (f + each) * w for s, w, f in pairs) / sum(s * (f + each) for s, _, f in pairs)
    torch.testing.assert_close(fisher_mean(weights, SHARES[:3], fishers, floor=floor).weight, wanted)


def test_numbers_on_which_no_loss_depends_keep_the_average() -> None:
    weights, fishers = _weights(2), [_random(20 + i, OUT, IN).square() for i in range(2)]
    for f in fishers:
        f[1, 2] = 0
    torch.testing.assert_close(fisher_mean(weights, SHARES[:2], fishers).weight[1, 2], _average(weights)[1, 2])
    nothing = fisher_mean(weights, SHARES[:2], [torch.zeros(OUT, IN)] * 2)
    assert nothing.route is Route.average
    torch.testing.assert_close(nothing.weight, _average(weights))


@pytest.mark.parametrize("count", [1, 2, 3, 4])
@pytest.mark.parametrize("epsilon", [0.0, 0.05])
def test_factors_solve_the_vectorised_system(count: int, epsilon: float) -> None:
    """Two models in closed form, others by conjugate gradients: both against a dense solve of all numbers at once."""
    weights, factors = _weights(count), _factors(count)
    terms = list(zip(SHARES, weights, factors, strict=False))
    dense = sum(s * torch.kron(f.gradients, f.inputs) for s, _, f in terms)
    a, b = sum(s * f.inputs for s, _, f in terms), sum(f.gradients for _, _, f in terms)
    both = epsilon * torch.kron(b, a)
    right = sum(s * (f.gradients @ w @ f.inputs).flatten() for s, w, f in terms) + both @ _average(weights).flatten()
    wanted = torch.linalg.solve(dense + both, right).reshape(OUT, IN)
    found = kronecker_mean(weights, SHARES[:count], factors, epsilon=epsilon)
    assert found.route is Route.exact
    torch.testing.assert_close(found.weight, wanted, rtol=0, atol=1e-9)


@pytest.mark.parametrize("count", [2, 3])
def test_factors_of_few_rows_give_a_least_squares_solution(count: int) -> None:
    """Directions that nobody saw keep the average, inputs taken by their size; along the others the equations hold."""
    weights, factors = _weights(count), _factors(count, rows=2)
    found = kronecker_mean(weights, SHARES[:count], factors).weight
    terms = list(zip(SHARES, weights, factors, strict=False))
    off = sum(s * f.gradients @ (found - w) @ f.inputs for s, w, f in terms)
    size = max(float((f.gradients @ w @ f.inputs).abs().max()) for _, w, f in terms)
    assert float(off.abs().max()) < 1e-8 * size
    total = sum(s * f.inputs for s, _, f in terms)
    size_of_input = total.diag().sqrt()
    unseen = torch.linalg.eigh(total / size_of_input / size_of_input[:, None]).eigenvectors[:, : IN - 2 * count]
    assert float(((found - _average(weights)) * size_of_input @ unseen).abs().max()) < 1e-9


def test_no_gradients_give_the_average() -> None:
    weights, factors = _weights(2), [Factors(f.inputs, torch.zeros(OUT, OUT)) for f in _factors(2)]
    found = kronecker_mean(weights, SHARES[:2], factors)
    assert found.route is Route.average
    torch.testing.assert_close(found.weight, _average(weights))
