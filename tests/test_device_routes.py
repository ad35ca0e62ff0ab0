"""What a GPU does in another way than the CPU, on CPU tensors: the same results, and few questions asked."""

from __future__ import annotations

import threading
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from conftest import merge_config
from gpu.blocks import ROPE, attention_blocks
from gpu.stand_in import routes_of
from models import make_model, save
from test_devices import _plan, _tasks
from torch import Tensor

from mergekit_symalign.errors import ShapeError
from mergekit_symalign.graph.load import LoadFinite
from mergekit_symalign.graph.solve import SolveTogether
from mergekit_symalign.symmetry import devices, threads
from mergekit_symalign.symmetry.assignment.linear import best_assignment, best_assignments
from mergekit_symalign.symmetry.distance import squared_difference, squared_distance, squared_norm
from mergekit_symalign.symmetry.heads import polar
from mergekit_symalign.symmetry.heads.joint import joint_optimum, towards_identity
from mergekit_symalign.symmetry.heads.joint_polar import joint_optimum_by_polar
from mergekit_symalign.symmetry.heads.moments import moments
from mergekit_symalign.symmetry.heads.procrustes import align_heads
from mergekit_symalign.symmetry.options import HeadShape
from mergekit_symalign.symmetry.quartic import better_scale, bisected_scale
from mergekit_symalign.symmetry.scale import PROVEN, quartic_scale
from mergekit_symalign.symmetry.solve import solve_block

CPU = torch.device("cpu")
EPS = torch.finfo(torch.float64).eps


def _normal(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def _orthogonal(seed: int, *shape: int) -> Tensor:
    return torch.linalg.qr(_normal(seed, *shape))[0]


def _inner(a: Tensor, b: Tensor) -> Tensor:
    return (a * b).sum((-2, -1))


@pytest.mark.parametrize("condition", [1.0, 1e4, 1e8, 1e12, 1e15])
@pytest.mark.parametrize("d", [1, 2, 64])
def test_newtons_polar_factor_is_the_decompositions(condition: float, d: int) -> None:
    """Apart by rounding times the condition number, and as good: it has the nuclear norm as inner product."""
    spectrum = torch.logspace(0, -torch.tensor(condition).log10().item(), d, dtype=torch.float64)
    m = towards_identity((_orthogonal(0, 3, d, d) * spectrum) @ _orthogonal(1, 3, d, d))
    expected, found = polar.polar_factor(m), polar.newton_polar(m)
    assert polar.are_orthogonal(found).all()
    assert (found - expected).abs().max() <= 64 * d * EPS * condition
    nuclear = torch.linalg.svdvals(m).sum(-1)
    assert ((_inner(found, m) - nuclear).abs() <= 64 * d * EPS * nuclear).all()
    with routes_of(CPU):
        assert torch.equal(polar.polar_factor(m), found)
        assert torch.allclose(polar.nuclear_norm(m), nuclear, rtol=64 * d * EPS)


def test_where_nothing_is_said_the_polar_factor_is_the_identity() -> None:
    m = torch.zeros(2, 6, 6, dtype=torch.float64)
    m[1, :3, :3] = _normal(0, 3, 3)
    found = polar.newton_polar(towards_identity(m))
    assert (found[0] == torch.eye(6)).all()
    assert (found[1, 3:, 3:] - torch.eye(3)).abs().max() <= 64 * EPS


def test_a_singular_matrix_is_decomposed() -> None:
    m = torch.zeros(2, 3, 3, dtype=torch.float64)
    assert not polar.are_orthogonal(polar.newton_polar(m)).any()
    with routes_of(CPU):
        assert polar.are_orthogonal(polar.polar_factor(m)).all()


@pytest.mark.parametrize("case", ["any size", "three roots", "double roots"])
def test_bisected_scales_are_as_good_as_the_quartics(case: str) -> None:
    n = 20000
    b, o, p, q = (10 ** (3 * _normal(i, n)) for i in range(4))
    if case == "any size":
        p, q = p * _normal(4, n).sign(), q * _normal(5, n).sign()
    else:
        b, o = torch.ones(2, n, dtype=torch.float64)
        p = 4 * torch.rand(n, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        q = 4 * _normal(6, n).abs() if case == "three roots" else p**3 / 4 * (1 + 1e-9 * _normal(7, n))

    def left(s: Tensor) -> Tensor:
        return s**2 * b + o / s**2 - 2 * (s * p + q / s)

    expected, found = quartic_scale(b, o, p, q), bisected_scale(b, o, p, q)
    size = expected**2 * b + o / expected**2 + 2 * (expected * p).abs() + 2 * (q / expected).abs()
    assert (left(found) - left(expected) <= 16 * EPS * size).all()
    with routes_of(CPU):
        near = better_scale(found * 1.001, b, o, p, q)
    assert (left(near) - left(found) <= 64 * EPS * size).all()


def test_scales_stay_1_where_a_side_is_nothing() -> None:
    zero, one = torch.zeros(1, dtype=torch.float64), torch.ones(1, dtype=torch.float64)
    for b, o in ((zero, one), (one, zero)):
        assert bisected_scale(b, o, one, one) == 1
        with routes_of(CPU):
            assert better_scale(2 * one, b, o, one, one) == 1


def _sides(noise: float, scale: float, seed: int, columns: int = 200) -> tuple[Any, Any]:
    """Moments of value and attended, the model a rotated and scaled sibling, or (noise 0 of nothing) unrelated."""
    k, d = 5, 24
    anchors = [_normal(seed + i, k, d, columns) for i in (0, 1)]
    models = [(x if noise else 0 * x) + (noise or 1) * _normal(seed + i, *x.shape) for i, x in enumerate(anchors, 2)]
    q = _orthogonal(seed + 4, k, d, d)
    moved = (q @ models[0] * scale, q @ models[1] / scale)
    return tuple(moments(a.flatten(0, 1), b.flatten(0, 1), k)[0] for a, b in zip(anchors, moved, strict=True))


@pytest.mark.parametrize("columns", [20, 200])  # fewer columns than coordinates: heads of low rank
@pytest.mark.parametrize("scale", [0.5, 1.0, 4.0])
@pytest.mark.parametrize("noise", [1e-6, 0.1, 0.5, 0.0])
def test_heads_without_decompositions(noise: float, scale: float, columns: int) -> None:
    """The same optimum as with them, proven as often; what is proven is not beaten by any scale of a grid."""
    first, second = _sides(noise, scale, 7, columns)
    b, o = first.model.sum(-1), second.model.sum(-1)
    given = (first.cross, second.cross, b, o)
    with_svd, found = joint_optimum(*given), joint_optimum_by_polar(*given)

    def left(s: Tensor, gain: Tensor) -> Tensor:
        return s**2 * b + o / s**2 - 2 * gain

    def at(s: Tensor) -> Tensor:
        mixed = s.reshape(-1, 1, 1) * first.cross + second.cross / s.reshape(-1, 1, 1)
        return left(s, torch.linalg.svdvals(mixed).sum(-1))

    assert found.proven.sum() >= with_svd.proven.sum() - 1
    here = left(
        found.scale, found.scale * _inner(found.matrix, first.cross) + _inner(found.matrix, second.cross) / found.scale
    )
    best = torch.stack([at(torch.full_like(b, x)) for x in torch.logspace(-1, 1, 41, dtype=torch.float64)]).amin(0)
    assert (here - best <= PROVEN * (b + o))[found.proven].all()
    expected = align_heads(first, second, rotate=True, scale=True)
    with routes_of(CPU):
        other = align_heads(first, second, rotate=True, scale=True)
    assert (other.scale / expected.scale - 1).abs().max() <= 1e-6
    if columns > 24:
        assert (other.matrix - expected.matrix).abs().max() <= 1e-6


def test_assignments_of_a_batch() -> None:
    scores = _normal(0, 4, 9, 9)
    expected = torch.stack([best_assignment(x) for x in scores])
    assert torch.equal(best_assignments(scores), expected)
    with routes_of(CPU):
        assert torch.equal(best_assignments(scores), expected)
    with pytest.raises(ShapeError, match="scores"):
        best_assignments(scores[:, :5])


@pytest.mark.parametrize("stored", ["rows", "columns"])
def test_distances_in_large_steps(stored: str) -> None:
    a, b = (_normal(i, 700, 900) for i in (0, 1))
    pair = (a, b) if stored == "rows" else (a.mT.contiguous().mT, b.mT.contiguous().mT)
    rows, columns = torch.randperm(700)[:600], torch.randperm(700)[:600]
    expected = (a[rows] - b[columns]).square().sum(1)
    with routes_of(CPU):
        assert torch.allclose(squared_distance(pair, rows, columns), expected)
        assert squared_norm(pair[0]) == pytest.approx(float(a.square().sum()))
        assert squared_difference(*pair) == pytest.approx(float((a - b).square().sum()))


@pytest.mark.parametrize("interleaved", [False, True])
def test_coordinates_are_made_on_the_device(interleaved: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    shape = HeadShape(4, 4, 12, 8, interleaved=interleaved)
    expected = {name: torch.tensor(x) for name, x in (("planes", shape.planes()), ("rest", shape.rest()))}
    monkeypatch.setattr(torch, "tensor", None)  # which is a transfer
    for name, x in (("planes", shape.planes()), ("rest", shape.rest())):
        assert torch.equal(devices.whole_numbers(x, CPU), expected[name])
    for few in ([], [5], [5, 6]):
        assert devices.whole_numbers(few, CPU).tolist() == few


def test_any_other_numbers_are_sent() -> None:
    for values in ([3, 1, 2], [0, 1, 5, 2, 9], [4, 3, 2, 1], [2, 2]):
        assert devices.whole_numbers(values, CPU).tolist() == values


def test_no_step_is_taken_for_each_head(monkeypatch: pytest.MonkeyPatch) -> None:
    """Decompositions and questions are as many for twice the heads."""
    asked = []
    monkeypatch.setattr(devices, "are_all", lambda x: asked.append(x) or bool(x.all()))
    counts = []
    for shape in (ROPE, HeadShape(16, 8, 16, 16)):
        block, _ = attention_blocks({"of": shape})
        asked.clear()
        with routes_of(CPU), patch.object(torch.linalg, "svd", side_effect=AssertionError("a decomposition")):
            solve_block(block.sides, block.shape, block.use)
        counts.append(len(asked))
    assert counts[1] <= counts[0] + 2
    assert counts[0] > 0


def test_two_models_share_the_stream_of_a_device(monkeypatch: pytest.MonkeyPatch) -> None:
    barrier, entered = threading.Barrier(2), []
    stream: Any = object()

    @contextmanager
    def on(given: object) -> Any:
        entered.append((given, threading.current_thread()))
        yield

    monkeypatch.setattr(threads, "_shared_stream", lambda _: stream)
    monkeypatch.setattr(torch.cuda, "stream", on)

    def solve(i: int) -> int:
        barrier.wait(timeout=20)  # breaks unless two solves run at the same time
        return i

    assert threads.two_at_a_time(solve, range(4), torch.device("cuda")) == [0, 1, 2, 3]
    assert {given for given, _ in entered} == {stream}
    assert len({thread for _, thread in entered}) == 2


def test_no_tensor_goes_to_the_device_twice_for_one_block(tmp_path: Path) -> None:
    paths = [save(make_model("llama", i, num_hidden_layers=1), tmp_path / str(i)) for i in range(3)]
    config = merge_config("aligned_task_arithmetic", paths[0], paths[1:], parameters={"weight": 1.0})
    together = [t for t in _tasks(_plan(config, str(tmp_path / "out"))) if isinstance(t, SolveTogether)]
    assert together
    for task in together:
        loads = list(task.arguments().values())
        assert all(isinstance(load, LoadFinite) for load in loads)
        assert len({(load.model, load.tensor) for load in loads}) == len(loads) == 3 * len(task.solvers[0].anchor)
