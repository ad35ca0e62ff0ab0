"""Random numbers as one process draws them.

MergeKit seeds torch's generator once, and DARE and DELLA draw from it, one tensor after another. How many numbers a
tensor takes follows from its shape. So a worker can pass over those of all tensors before its own.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from mergekit import merge_methods
from mergekit.graph import Task, TaskHandle
from mergekit.io.tasks import GatherTensors, LoadTensor
from mergekit.merge_methods.task_adapter import ExecuteMergeMethodTask
from mergekit.sparsify import SparsificationMethod
from mergekit.tokenizer import PermutedVocabulary

from mergekit_symalign.graph.headers import Header
from mergekit_symalign.graph.planned import gather_of

_AT_A_TIME = 2**24  # numbers that are passed over; they are written somewhere


@dataclass(frozen=True)
class Draws:
    """States of the generator before and after a task, in one process."""

    before: torch.Tensor
    after: torch.Tensor


def draws_of(
    order: Sequence[TaskHandle],
    header_of: Callable[[LoadTensor], Header | None],
    tokens: int,
    start: torch.Tensor,
    device: torch.device,
) -> dict[TaskHandle, Draws]:
    """The states of the generator for every task that is known to draw.

    Args:
        order: all tasks of the merge, as one process executes them.
        header_of: what a load reads; None if that is not known.
        tokens: of the output's tokenizer, where it is built.
        start: state of the generator before the first task.
        device: where the tasks draw.
    """
    generator = torch.Generator(device)
    generator.set_state(start)
    found = {}
    for handle in order:
        if counts := _counts(handle.task(), header_of, tokens):
            before = generator.get_state()
            for count in counts:
                _pass_over(count, generator)
            found[handle] = Draws(before, generator.get_state())
    return found


def _counts(task: Task[Any], header_of: Callable[[LoadTensor], Header | None], tokens: int) -> list[int]:
    """How many numbers a task draws, for each model that it draws for."""
    if not isinstance(task, ExecuteMergeMethodTask):
        return []
    kind = getattr(merge_methods.get(task.method_name), "sparsification_method", None)
    if kind not in (SparsificationMethod.random, SparsificationMethod.della_magprune):
        return []
    loads = GatherTensors.arguments(gather_of(task)).values()
    headers = {load.model: header_of(load) for load in loads}
    count = _numbers(task, [header for header in headers.values() if header is not None], tokens)
    least = -math.inf if kind == SparsificationMethod.random else 0.0
    drawn_for = [m for m in task.model_order if m != task.base_model and headers.get(m) is not None]
    return [count for m in drawn_for if least < task.input_parameters[m]["density"] < 1] if count else []


def _numbers(task: ExecuteMergeMethodTask, headers: Sequence[Header], tokens: int) -> int:
    """Of one model's tensor, as the method sees it: with the rows of the output's vocabulary."""
    sizes = [math.prod(header.shape) for header in headers if header.dtype is None or header.dtype.is_floating_point]
    inputs = task.gather_tensors
    if not sizes or not isinstance(inputs, PermutedVocabulary):
        return min(sizes, default=0)
    multiple = inputs.pad_to_multiple_of or 1
    return sizes[0] // headers[0].shape[inputs.vocabulary_axis] * (-(-tokens // multiple) * multiple)


def _pass_over(count: int, generator: torch.Generator) -> None:
    """Leave a generator as it is when a tensor of this many probabilities has been drawn."""
    if generator.device.type != "cpu":  # what a draw takes depends on how it is divided among the cores of a GPU
        torch.bernoulli(torch.zeros(count, device=generator.device), generator=generator)
        return
    for done in range(0, count, _AT_A_TIME):  # a number each, of 32 bits, whatever its dtype
        torch.empty(min(_AT_A_TIME, count - done), dtype=torch.uint8).random_(generator=generator)


def state_of(seed: int | None) -> bytes | None:
    """The state of torch's generator now, if there is a seed that it comes from."""
    return None if seed is None else torch.get_rng_state().numpy().tobytes()


def start_of(state: bytes, seed: int, device: torch.device) -> torch.Tensor:
    """The state of a device's generator before the first task. Only tasks draw on a GPU."""
    if device.type == "cpu":
        return torch.frombuffer(bytearray(state), dtype=torch.uint8)
    return torch.Generator(device).manual_seed(seed).get_state()


def generator_of(device: torch.device) -> torch.Generator | None:
    """The one that tasks draw from; None for devices whose generator is not known here."""
    if device.type == "cuda":
        torch.cuda.init()
        return torch.cuda.default_generators[torch.cuda.current_device() if device.index is None else device.index]
    return torch.default_generator if device.type == "cpu" else None


class InPlace:
    """An execution of some tasks, each of which draws what it draws in one process.

    Attributes:
        strayed: whether a task drew that was not known to, or drew another count, or nobody knows.
    """

    def __init__(self, draws: Mapping[TaskHandle, Draws], generator: torch.Generator | None) -> None:
        self.strayed = generator is None
        self._draws = draws
        self._generator = torch.default_generator if generator is None else generator

    def run(self, order: Iterable[TaskHandle], values: Iterable[tuple[TaskHandle, Any]]) -> Iterator[tuple[Any, Any]]:
        """
        Args:
            order: of the tasks.
            values: of the tasks as they end, with all that draw among them.

        Returns:
            the values.
        """
        waiting = deque(handle for handle in order if handle in self._draws)
        expected = self._next(waiting)
        for handle, value in values:
            if waiting and handle == waiting[0]:
                self._compare(self._draws[waiting.popleft()].after)
                expected = self._next(waiting)
            yield handle, value
        self._compare(expected)

    def _next(self, waiting: Sequence[TaskHandle]) -> torch.Tensor:
        """Put the generator where the next task finds it."""
        if waiting:
            self._generator.set_state(self._draws[waiting[0]].before)
        return self._generator.get_state()

    def _compare(self, expected: torch.Tensor) -> None:
        self.strayed |= not torch.equal(self._generator.get_state(), expected)
