"""Work is divided among the threads that torch has, one for each piece, and nothing of the caller's state is lost."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator

import pytest
import torch

from mergekit_symalign.symmetry.threads import in_parallel, one_thread, two_at_a_time

either = pytest.mark.parametrize("way", [in_parallel, two_at_a_time])


@pytest.fixture(autouse=True)
def _three_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    yield
    torch.set_num_threads(before)


def _meet(barrier: threading.Barrier) -> tuple[str, int]:
    barrier.wait(timeout=20)  # breaks unless three pieces run at the same time
    return threading.current_thread().name, torch.get_num_threads()


@pytest.mark.parametrize("inside", [False, True])
def test_as_many_pieces_at_a_time_as_torch_has_threads(inside: bool) -> None:
    barrier = threading.Barrier(3)
    if inside:
        with one_thread():
            assert torch.get_num_threads() == 1
            found = in_parallel(_meet, [barrier] * 6)
            assert torch.get_num_threads() == 1
    else:
        found = in_parallel(_meet, [barrier] * 6)
    assert len({name for name, _ in found}) == 3
    assert {threads for _, threads in found} == {1}
    assert torch.get_num_threads() == 3


@pytest.mark.parametrize("inside", [False, True])
def test_two_solves_side_by_side_share_all_threads(inside: bool) -> None:
    solves, pieces = threading.Barrier(2), threading.Barrier(3)

    def solve(_: int) -> tuple[str, list[tuple[str, int]]]:
        solves.wait(timeout=20)  # breaks unless two solves run at the same time
        return threading.current_thread().name, in_parallel(_meet, [pieces] * 3)

    if inside:
        with one_thread():
            found = two_at_a_time(solve, range(4))
            assert torch.get_num_threads() == 1
    else:
        found = two_at_a_time(solve, range(4))
    assert len({name for name, _ in found}) == 2
    assert {threads for _, work in found for _, threads in work} == {1}
    assert len({name for _, work in found for name, _ in work}) == 3
    assert torch.get_num_threads() == 3


@either
def test_one_thread_stays_in_the_callers(way: Callable[..., list[threading.Thread]]) -> None:
    torch.set_num_threads(1)
    assert set(way(lambda _: threading.current_thread(), range(4))) == {threading.current_thread()}


@either
def test_other_devices_get_the_pieces_in_turn(way: Callable[..., list[threading.Thread]]) -> None:
    found = way(lambda _: threading.current_thread(), range(4), torch.device("cuda"))
    assert set(found) == {threading.current_thread()}


@either
@pytest.mark.parametrize("mode", [torch.inference_mode, torch.no_grad, torch.enable_grad])
def test_results_in_order_and_in_the_callers_grad_mode(
    mode: type, way: Callable[..., list[tuple[object, ...]]]
) -> None:
    with mode():
        expected = (torch.is_inference_mode_enabled(), torch.is_grad_enabled())
        found = way(lambda i: (i, torch.is_inference_mode_enabled(), torch.is_grad_enabled()), range(20))
    assert found == [(i, *expected) for i in range(20)]


@either
def test_errors_reach_the_caller_and_threads_come_back(way: Callable[..., list[None]]) -> None:
    def fail(i: int) -> None:
        raise ValueError(f"piece {i}")

    with pytest.raises(ValueError, match="piece 0"):
        way(fail, range(3))
    assert torch.get_num_threads() == 3
