"""RegMean's solves against closed forms that are written out here."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from mergekit_symalign.errors import ShapeError
from mergekit_symalign.fusion.outcome import Route
from mergekit_symalign.fusion.regmean import (
    FALLBACK,
    gram_with_bias,
    regmean,
    regmean_of_task_vectors,
    with_bias,
)

OUT, IN = 5, 7


def _random(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def _models(count: int, rows: int = 40) -> tuple[list[Tensor], list[Tensor], list[float]]:
    """Weights, inputs [rows, in] and shares."""
    weights = [_random(i, OUT, IN) for i in range(count)]
    return weights, [_random(100 + i, rows, IN) for i in range(count)], [0.3, 1.0, 2.0, 0.7][:count]


def _gram(x: Tensor) -> Tensor:
    return x.T @ x / len(x)


@pytest.mark.parametrize("count", [1, 2, 4])
def test_the_least_squares_solution_is_found(count: int) -> None:
    """Of all rows of all models at once, each model's rows weighted, as a general solver finds it."""
    weights, inputs, shares = _models(count)
    rows = torch.cat([x * (s / len(x)) ** 0.5 for x, s in zip(inputs, shares, strict=True)])
    wanted = torch.cat([x @ w.T * (s / len(x)) ** 0.5 for x, w, s in zip(inputs, weights, shares, strict=True)])
    found = regmean(weights, shares, map(_gram, inputs))
    assert found.route is Route.exact
    assert float((found.weight - torch.linalg.lstsq(rows, wanted).solution.T).abs().max()) < 1e-9


@pytest.mark.parametrize(("off_diagonal", "ridge"), [(0.9, 0.0), (0.0, 0.0), (1.0, 0.1), (0.5, 2.0)])
def test_damping_and_ridge_are_as_published(off_diagonal: float, ridge: float) -> None:
    """Jin et al. multiply what is beside the diagonals. A ridge is one more model: the average, on white noise."""
    weights, inputs, shares = _models(3)
    grams = [_gram(x) for x in inputs]
    damped = [off_diagonal * g + (1 - off_diagonal) * torch.diag(g.diag()) for g in grams]
    total = sum(s * g for s, g in zip(shares, damped, strict=True))
    right = sum(s * w @ g for s, w, g in zip(shares, weights, damped, strict=True))
    centre = sum(s * w for s, w in zip(shares, weights, strict=True)) / sum(shares)
    more = ridge * total.diag().mean() * torch.eye(IN, dtype=torch.float64)
    wanted = (right + centre @ more) @ torch.linalg.inv(total + more)
    found = regmean(weights, shares, grams, off_diagonal=off_diagonal, ridge=ridge).weight
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-10)


def test_equal_statistics_give_the_average() -> None:
    weights, inputs, shares = _models(3)
    centre = sum(s * w for s, w in zip(shares, weights, strict=True)) / sum(shares)
    torch.testing.assert_close(regmean(weights, shares, [_gram(inputs[0])] * 3).weight, centre)


def test_a_bias_is_one_more_input() -> None:
    weights, inputs, shares = _models(2)
    biases = [_random(50 + i, OUT) for i in range(2)]
    inputs = [x + 1 for x in inputs]
    longer = [torch.cat([x, torch.ones(len(x), 1, dtype=torch.float64)], dim=1) for x in inputs]
    wanted = regmean(
        [torch.cat([w, b[:, None]], 1) for w, b in zip(weights, biases, strict=True)], shares, map(_gram, longer)
    )
    grams = [gram_with_bias(_gram(x), x.mean(0)) for x in inputs]
    found = regmean([with_bias(w, b) for w, b in zip(weights, biases, strict=True)], shares, grams)
    torch.testing.assert_close(found.weight, wanted.weight)


def test_inputs_that_nobody_saw_keep_the_average() -> None:
    weights, inputs, shares = _models(2)
    for x in inputs:
        x[:, 2] = 0
    found = regmean(weights, shares, map(_gram, inputs))
    centre = sum(s * w for s, w in zip(shares, weights, strict=True)) / sum(shares)
    assert found.route is Route.exact
    torch.testing.assert_close(found.weight[:, 2], centre[:, 2])
    kept = [i for i in range(IN) if i != 2]
    rest = regmean([w[:, kept] for w in weights], shares, [_gram(x[:, kept]) for x in inputs])
    torch.testing.assert_close(found.weight[:, kept], rest.weight)


def test_too_few_rows_are_solved_with_the_stated_ridge() -> None:
    weights, inputs, shares = _models(2, rows=3)
    grams = [_gram(x) for x in inputs]
    found = regmean(weights, shares, grams)
    total = sum(s * g for s, g in zip(shares, grams, strict=True))
    centre = sum(s * w for s, w in zip(shares, weights, strict=True)) / sum(shares)
    right = sum(s * (w - centre) @ g for s, w, g in zip(shares, weights, grams, strict=True))
    wanted = centre + right @ torch.linalg.inv(total + FALLBACK * torch.diag(total.diag()))
    assert found.route is Route.ridge
    torch.testing.assert_close(found.weight, wanted)


def test_no_rows_at_all_give_the_average() -> None:
    weights, _, shares = _models(2)
    found = regmean(weights, shares, [torch.zeros(IN, IN)] * 2)
    assert found.route is Route.average
    torch.testing.assert_close(found.weight, sum(s * w for s, w in zip(shares, weights, strict=True)) / sum(shares))


@pytest.mark.parametrize("size", [1e-12, 1.0, 1e12])
def test_inputs_of_very_different_size_are_no_singularity(size: float) -> None:
    weights, inputs, shares = _models(2)
    scale = torch.tensor([size, *[1.0] * (IN - 1)], dtype=torch.float64)
    found = regmean([w / scale for w in weights], shares, [_gram(x * scale) for x in inputs])
    assert found.route is Route.exact
    torch.testing.assert_close(found.weight * scale, regmean(weights, shares, map(_gram, inputs)).weight)


def test_diagonals_alone_weight_every_input_by_itself() -> None:
    weights, inputs, shares = _models(3)
    sizes = [_gram(x).diag() for x in inputs]
    wanted = sum(s * w * d for s, w, d in zip(shares, weights, sizes, strict=True)) / sum(
        s * d for s, d in zip(shares, sizes, strict=True)
    )
    torch.testing.assert_close(regmean(weights, shares, sizes).weight, wanted)
    mixed = [torch.diag(sizes[0]), sizes[1], torch.diag(sizes[2])]
    torch.testing.assert_close(regmean(weights, shares, mixed).weight, wanted)


@pytest.mark.parametrize("measured", [True, False])
def test_task_vectors_are_added_to_the_base(measured: bool) -> None:
    weights, inputs, shares = _models(3)
    base = _random(77, OUT, IN)
    tasks = [w - base for w in weights]
    grams = [_gram(x) for x in inputs] if measured else [t.T @ t / torch.sum(t * t) for t in tasks]
    total = sum(s * g for s, g in zip(shares, grams, strict=True))
    ridge = 0.03 * total.diag().mean() * torch.eye(IN, dtype=torch.float64)
    wanted = base + 0.8 * sum(s * t @ g for s, t, g in zip(shares, tasks, grams, strict=True)) @ torch.linalg.inv(
        total + ridge
    )
    found = regmean_of_task_vectors(base, weights, shares, grams if measured else None, factor=0.8, ridge=0.03)
    assert found.route is Route.exact
    torch.testing.assert_close(found.weight, wanted)


def test_task_vectors_on_different_inputs_are_all_added_in_full() -> None:
    """Two models that learned something about different inputs: neither is diluted."""
    base = _random(1, OUT, IN)
    one, other = torch.zeros(OUT, IN, dtype=torch.float64), torch.zeros(OUT, IN, dtype=torch.float64)
    one[:, :3], other[:, 3:] = _random(2, OUT, 3), _random(3, OUT, IN - 3)
    found = regmean_of_task_vectors(base, [base + one, base + other], [1.0, 1.0], None, ridge=1e-9)
    torch.testing.assert_close(found.weight, base + one + other, rtol=0, atol=1e-6)


def test_models_equal_to_the_base_change_nothing() -> None:
    base = _random(1, OUT, IN)
    found = regmean_of_task_vectors(base, [base, base.clone()], [1.0, 1.0], None, ridge=0.01)
    assert found.route is Route.exact
    assert torch.equal(found.weight, base)


def test_what_does_not_fit_is_refused() -> None:
    weights, inputs, shares = _models(2)
    with pytest.raises(ShapeError, match=r"Gram matrix.*\(6, 6\).*7 inputs"):
        regmean(weights, shares, [_gram(x[:, :6]) for x in inputs])
    with pytest.raises(ShapeError, match="shapes differ"):
        regmean([weights[0], weights[1][:, :6]], shares, map(_gram, inputs))
