"""Compiled loops (the extra ``fast``) against the same by torch, and where they are used."""

from __future__ import annotations

import itertools
import logging
import sys
from collections.abc import Callable, Iterator, Sequence

import pytest
import torch
from mergekit import merge_methods
from mergekit.merge_methods.base import TensorEntry, TensorGroup, TensorMetadata
from torch import Tensor

from mergekit_symalign.graph import one_pass
from mergekit_symalign.symmetry import compiled, distance
from mergekit_symalign.symmetry.distance import squared_distance
from mergekit_symalign.symmetry.heads.moments import moments
from mergekit_symalign.symmetry.neurons import quantized
from mergekit_symalign.symmetry.threads import one_thread

pytest.importorskip("numba", reason="pip install 'mergekit-symalign[fast]'")

ByTorch = Callable[[Callable[[], Sequence[Tensor]]], Sequence[Tensor]]


@pytest.fixture(autouse=True)
def _for_small_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiled, "_LEAST", 1)


@pytest.fixture
def by_torch(monkeypatch: pytest.MonkeyPatch) -> ByTorch:
    """The same without the loops."""

    def run(work: Callable[[], Sequence[Tensor]]) -> Sequence[Tensor]:
        with monkeypatch.context() as patch:
            patch.setattr(compiled, "_LEAST", 1 << 60)
            return work()

    return run


def _random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).bfloat16()


def _orders(n: int) -> Iterator[tuple[str, Tensor, Tensor]]:
    through, g = torch.arange(n), torch.Generator().manual_seed(5)
    yield "as they stand", through, through
    yield "in another order", through, torch.randperm(n, generator=g)
    yield "some of them", torch.tensor([3, 0, 3]), torch.tensor([1, n - 1, 2])


@pytest.mark.parametrize("stored", ["rows", "columns"])
def test_distances(stored: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(distance, "_PIECE", 7)  # several pieces
    a, b = _random(37, 133), _random(37, 133, seed=1)
    if stored == "columns":
        a, b = (x.mT.contiguous().mT for x in (a, b))
    for name, rows, columns in _orders(37):
        found = squared_distance((a, b), rows, columns)
        expected = (a[rows].double() - b[columns].double()).square().sum(1)
        assert found.dtype is torch.float32
        torch.testing.assert_close(found.double(), expected, rtol=1e-6, atol=0, msg=name)


@pytest.mark.parametrize("planes", [tuple(range(8)), (0, 2, 4, 6, 1, 3, 5, 7)], ids=["halves", "pairs"])
@pytest.mark.parametrize("order", [None, torch.tensor([2, 0, 1])], ids=["own", "other"])
def test_moments_of_planes(planes: tuple[int, ...], order: Tensor | None, by_torch: ByTorch) -> None:
    a, b = _random(24, 50), _random(24, 50, seed=1)

    def work() -> tuple[Tensor, ...]:
        found, own = moments(a, b, 3, order, planes)
        return found.cross, found.model, own

    for found, expected in zip(work(), by_torch(work), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


def test_scores_of_whole_numbers(by_torch: ByTorch) -> None:
    """The same bits: rows that are stored either way, one of zeros, and one of a tiny size."""
    pairs = [(_random(96, 70, seed=i), _random(96, 70, seed=9 + i)) for i in range(2)]
    pairs.append((_random(96, 70, seed=3).mT.contiguous().mT, _random(96, 70, seed=4).mT.contiguous().mT))
    for a, _ in pairs:
        a[5], a[6] = 0, a[6] * 1e-38
    if not quantized.usable(torch.device("cpu"), torch.bfloat16, 210):
        pytest.skip("this processor has no exact products of 8-bit numbers")
    lengths = [sum(pair[i].double().square().sum(1) for pair in pairs).sqrt() for i in (0, 1)]  # type: ignore[union-attr]

    def work() -> list[Tensor]:
        found = quantized.quantized_scores(pairs, *lengths, exact=lambda rows, columns: rows)
        return [found.stored, *found.error]

    assert all(map(torch.equal, work(), by_torch(work)))


def _by_mergekit(base: Tensor, models: list[Tensor], weights: list[float], normalize: bool, factor: float) -> Tensor:
    entries = [TensorEntry(id="base", tensor=base, is_base=True)]
    entries += [TensorEntry(id=str(i), tensor=x, is_base=False) for i, x in enumerate(models)]
    group = TensorGroup(entries=tuple(entries), metadata=TensorMetadata(name="x"))
    own = {"weight": {str(i): w for i, w in enumerate(weights)}, "density": {str(i): 1.0 for i in range(len(models))}}
    shared = {"normalize": normalize, "rescale": False, "int8_mask": False, "lambda": factor}
    return merge_methods.get("task_arithmetic").merge_group(group, **shared, **own)


@pytest.mark.parametrize("count", [1, 2, 3, 4])
@pytest.mark.parametrize("size", [1e-3, 1.0, 1e30])
def test_task_arithmetic_has_the_bits_of_mergekit(count: int, size: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(one_pass, "MERGED", 5000)  # several pieces
    base = _random(61, 173) * size
    base[:7], base[:, ::10] = 0, -0.0
    models = [base + 0.1 * size * _random(61, 173, seed=1 + i) for i in range(count)]
    for i, model in enumerate(models):
        model[:, i::7], model[:, i::11] = base[:, i::7], -0.0
    for weights in ([1.0] * count, [0.37 * i - 0.3 for i in range(count)], [0.5, -0.5, 0.5, -0.5][:count]):
        for normalize, factor in itertools.product((False, True), (1.0, 0.7, 2.5)):
            found = one_pass.add_task_vectors(base, models, weights, normalize=normalize, factor=factor)
            assert found is not None
            expected = _by_mergekit(base, models, weights, normalize, factor)
            assert torch.equal(found.view(torch.int16), expected.view(torch.int16)), (weights, normalize, factor)


def test_task_arithmetic_rounds_turned_tensors_first() -> None:
    """As MergeKit does where the configuration says dtype: bfloat16."""
    base, turned = _random(40, 30), torch.randn(40, 30, generator=torch.Generator().manual_seed(1))
    found = one_pass.add_task_vectors(base, [turned], [1.0], normalize=False, factor=1.0)
    assert found is not None
    assert torch.equal(found, _by_mergekit(base, [turned.bfloat16()], [1.0], False, 1.0))


def test_what_is_no_number_is_left_to_mergekit() -> None:
    base = torch.full((4, 4), 3e38).bfloat16()
    assert one_pass.add_task_vectors(base, [-base, -base], [1.0, -1.0], normalize=False, factor=1.0) is None


def test_results_do_not_depend_on_threads() -> None:
    base, model = _random(300, 257), _random(300, 257, seed=1)
    rows = torch.arange(300)

    def work() -> list[Tensor | None]:
        merged = one_pass.add_task_vectors(base, [model], [0.3], normalize=False, factor=1.0)
        return [squared_distance((base, model), rows, rows.flip(0)), merged]

    threads = torch.get_num_threads()
    found = []
    for n in (1, 3):
        torch.set_num_threads(n)
        with one_thread():
            found.append(work())
    torch.set_num_threads(threads)
    assert all(map(torch.equal, *found))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "x",
    [_random(4, 4).float(), _random(4, 4).half(), _random(4, 4).mT[:, 1:], _random(16), _random(4, 4).to("meta")],
    ids=["float32", "float16", "not contiguous", "one axis", "meta"],
)
def test_other_matrices_are_left_to_torch(x: Tensor) -> None:
    assert compiled.loops_for(_random(4, 4)) is not None
    assert compiled.loops_for(_random(4, 4), x) is None


def test_small_matrices_are_left_to_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    """numba is not even imported for them."""
    monkeypatch.setattr(compiled, "_LEAST", 17)
    assert compiled.loops_for(_random(4, 4)) is None


@pytest.mark.parametrize(
    ("error", "level"), [(ImportError("no numba"), "INFO"), (RuntimeError("cannot cache"), "WARNING")], ids=str
)
def test_without_numba(
    error: Exception, level: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    class Missing:
        def find_spec(self, name: str, path: object, target: object = None) -> None:
            if name == "mergekit_symalign.symmetry.loops":
                raise error

    monkeypatch.delitem(sys.modules, "mergekit_symalign.symmetry.loops", raising=False)
    monkeypatch.delattr("mergekit_symalign.symmetry.loops", raising=False)
    monkeypatch.setattr(sys, "meta_path", [Missing(), *sys.meta_path])
    compiled._loops.cache_clear()
    try:
        with caplog.at_level(logging.INFO):
            assert compiled.loops_for(_random(4, 4)) is None
        assert [(r.levelname, "takes longer" in r.getMessage()) for r in caplog.records] == [(level, True)]
        rows = torch.arange(4)
        a, b = _random(4, 4), _random(4, 4, seed=1)
        torch.testing.assert_close(squared_distance((a, b), rows, rows), (a.float() - b.float()).square().sum(1))
    finally:
        compiled._loops.cache_clear()


def test_what_is_compiled_is_kept() -> None:
    """numba refuses where it can keep nothing: each process would compile for seconds."""
    loops = compiled._loops()
    assert loops is not None
    assert loops.distances_of_rows.stats.cache_path
