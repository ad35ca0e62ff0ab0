"""Cutting the tasks of a merge into parts that need nothing of each other, and dividing these among workers.

Nothing here knows Ray. The same plan is cut in the same way in every process: a part names tensors, and no tasks.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

from mergekit.graph import Task, TaskHandle, TaskUniverse, build_schedule
from mergekit.io.tasks import LoadTensor, SaveTensor, TensorWriterTask
from mergekit.tokenizer import BuildTokenizer

Told = tuple[int, str]
"""A value that a task at the end of the merge needs: the number of the target, and the name of its argument."""


@dataclass(frozen=True)
class Component:
    """Tasks that depend on each other, and on nothing else that takes time.

    Attributes:
        saves: the tensors that it writes, by name.
        told: the values that it has for the end of the merge.
        size: bytes that it reads.
    """

    saves: tuple[str, ...]
    told: tuple[Told, ...]
    size: int


@dataclass(frozen=True)
class Part:
    """What one worker does at a time.

    Attributes:
        number: of the part; its shards come in this order.
        components: at least one.
    """

    number: int
    components: tuple[Component, ...]

    @property
    def size(self) -> int:
        return sum(component.size for component in self.components)


class Graph:
    """The tasks of a merge, seen as what saves tensors and what follows when all are saved.

    Attributes:
        targets: as MergeKit's planner lists them.
        universe: of all tasks.
    """

    def __init__(self, targets: Sequence[Task]) -> None:
        self.targets = tuple(targets)
        self.universe = TaskUniverse(self.targets)
        self._numbers = [self.universe.task_to_index[task] for task in self.targets]
        self._ends = {i for i, task in zip(self._numbers, self.targets, strict=True) if _is_at_the_end(task)}

    @cached_property
    def saves(self) -> dict[str, TaskHandle]:
        """The task that saves each tensor of the output."""
        saves = zip(self._numbers, self.targets, strict=True)
        return {task.tensor_name: TaskHandle(self.universe, i) for i, task in saves if isinstance(task, SaveTensor)}

    @cached_property
    def told(self) -> dict[Told, TaskHandle]:
        """The tasks of which the tasks at the end need the value."""
        found = {}
        for position, i in enumerate(self._numbers):
            for name, argument in self.universe.task_arguments[i].items() if i in self._ends else ():
                task = self.universe.tasks[argument]
                if argument not in self._ends and not isinstance(task, SaveTensor) and not _is_given(task):
                    found[position, name] = TaskHandle(self.universe, argument)
        return found

    @property
    def writer(self) -> TensorWriterTask:
        """The task that all saves write through."""
        return next(task.writer_task for task in self.targets if isinstance(task, SaveTensor))

    @property
    def tokenizer(self) -> TaskHandle | None:
        """The task that builds the output's tokenizer, if any."""
        built = (i for i, task in enumerate(self.universe.tasks) if isinstance(task, BuildTokenizer))
        return next((TaskHandle(self.universe, i) for i in built), None)

    @property
    def ends(self) -> list[TaskHandle]:
        """The targets that follow when all tensors are saved."""
        return [TaskHandle(self.universe, i) for i in self._numbers if i in self._ends]

    @property
    def order(self) -> list[TaskHandle]:
        """All tasks, as one process executes them."""
        return list(build_schedule([TaskHandle(self.universe, i) for i in self._numbers], {}).tasks)

    def handle(self, task: Task) -> TaskHandle:
        return TaskHandle(self.universe, self.universe.task_to_index[task])

    def components(self, size_of: Callable[[LoadTensor], int]) -> tuple[Component, ...]:
        """The independent parts of the graph, in the order of their first target.

        Args:
            size_of: bytes that a load reads.
        """
        root = self._roots()
        saves: dict[int, list[str]] = defaultdict(list)
        told: dict[int, list[Told]] = defaultdict(list)
        sizes: dict[int, int] = defaultdict(int)
        for name, handle in self.saves.items():
            saves[root[handle._index]].append(name)
        for value, handle in self.told.items():
            told[root[handle._index]].append(value)
        for i, at in root.items():
            task = self.universe.tasks[i]
            sizes[at] += size_of(task) if isinstance(task, LoadTensor) else 0
        return tuple(Component(tuple(saves[at]), tuple(told[at]), sizes[at]) for at in dict.fromkeys([*saves, *told]))

    def _roots(self) -> dict[int, int]:
        """For each task that is neither at the end nor given: one that stands for all that hang together with it."""
        inner = [i for i, task in enumerate(self.universe.tasks) if i not in self._ends and not _is_given(task)]
        parent = {i: i for i in inner}

        def root(i: int) -> int:
            while parent[i] != i:
                parent[i] = parent[parent[i]]
                i = parent[i]
            return i

        for i in inner:
            for argument in self.universe.task_arguments[i].values():
                if argument in parent:
                    parent[root(argument)] = root(i)
        return {i: root(i) for i in inner}


def _is_at_the_end(task: Task) -> bool:
    """Whether a target follows when all else is done: the index, reports, and alignments that are saved."""
    return not isinstance(task, SaveTensor) and not _is_given(task)


def _is_given(task: Task) -> bool:
    """Whether every worker is given its value, or repeats what costs less than to keep together all that need it."""
    return isinstance(task, TensorWriterTask | BuildTokenizer) or task.duplicate_per_gpu()


def balanced(components: Sequence[Component], most: int) -> tuple[Part, ...]:
    """Parts of about the same size: the largest component goes first, each to the part that has least.

    Args:
        components: of a graph.
        most: parts.

    Returns:
        At most that many parts, none of them empty, each with its components in the order of the graph.
    """
    order = sorted(range(len(components)), key=lambda i: (-components[i].size, i))
    bins: list[list[int]] = [[] for _ in range(min(most, len(components)))]
    filled = [0] * len(bins)
    for i in order:
        least = min(range(len(bins)), key=lambda b: (filled[b], len(bins[b]), b))
        bins[least].append(i)
        filled[least] += components[i].size
    in_order = sorted(sorted(bin) for bin in bins)
    return tuple(Part(number, tuple(components[i] for i in bin)) for number, bin in enumerate(in_order))


def share_of_largest(components: Sequence[Component]) -> float:
    """Of the bytes, in the component that reads most; no number of workers takes less time than that."""
    whole = sum(component.size for component in components)
    return max(component.size for component in components) / whole if whole else 1.0
