"""From the tensors of a merge and the models' statistics to tasks: RegMean."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from mergekit.architecture import WeightInfo
from mergekit.common import ModelReference
from mergekit.graph import Task

from mergekit_symalign.errors import ParameterError
from mergekit_symalign.graph.fusion_checks import (
    require_agreement,
    require_limits,
    require_reordered,
    shares_of,
    warn_of_few_tokens,
)
from mergekit_symalign.graph.fusion_tasks import (
    MergeLinear,
    MergeRegMean,
    MergeTaskVectors,
    Part,
    PartOf,
)
from mergekit_symalign.graph.linear import Linear
from mergekit_symalign.graph.ready import Context, DataPlan, Ready
from mergekit_symalign.graph.statistics import Lookup, StatisticsFiles
from mergekit_symalign.methods import TASK_VECTORS


def plan_regmean(context: Context) -> DataPlan:
    """Every linear layer by `regmean`, everything else as MergeKit averages it."""
    return Planner(context, MergeRegMean, ("gram",)).plan()


def plan_task_vectors(context: Context) -> DataPlan:
    """Every linear layer by `regmean_of_task_vectors`, everything else as MergeKit's task arithmetic does."""
    return Planner(context, MergeTaskVectors, ("gram",)).plan()


@dataclass
class Planner:
    """Plans the tensors of one merge.

    Attributes:
        context: of the merge.
        linear_task: the task that merges a linear layer.
        kinds: of statistics that it reads.
    """

    context: Context
    linear_task: Callable[..., MergeLinear]
    kinds: tuple[str, ...]
    findings: list[tuple[str, Task]] = field(default_factory=list)

    @cached_property
    def files(self) -> StatisticsFiles:
        config = self.context.config
        matched = config.tokenizer is not None or config.tokenizer_source is not None
        context = self.context
        return StatisticsFiles(context.method.spec.name, context.checkpoints, context.options, matched)

    @cached_property
    def _by_name(self) -> dict[str, Ready]:
        return {one.name: one for one in self.context.tensors}

    def plan(self) -> DataPlan:
        """The tasks of all tensors.

        Raises:
            SymalignError: for parameters and statistics that do not fit, before any work.
        """
        found: dict[str, Task] = {}
        for one in self.context.tensors:
            require_limits(one)
            found |= self._tasks(one)
        tensors: list[tuple[WeightInfo, Task]] = [
            (one.weight, found.get(one.name) or one.merged_without_data(self.context.method))
            for one in self.context.tensors
        ]
        self.files.require_one_tokenizer()
        warn_of_few_tokens(self._read)
        facts = {"statistics": self.files.facts(), "papers": self.context.papers(), "tensors_with_data": len(found)}
        return DataPlan(tensors, facts, tuple(self.findings))

    @cached_property
    def _read(self) -> list[tuple[Lookup, int]]:
        """What is looked up, and how many numbers the layer reads."""
        return []

    def _tasks(self, one: Ready) -> dict[str, Task]:
        """The tasks that merge a linear layer's weight and bias with data; none for every other tensor."""
        layer = self._linear(one)
        return {} if layer is None else self._of_linear(one, layer)

    def _linear(self, one: Ready) -> Linear | None:
        """How a tensor is stored, if it is the weight of a linear layer in all models, and all of them have it."""
        found = set()
        for model in one.order:
            checkpoint, info = self.context.checkpoints[model], one.source(model)
            place = checkpoint.names.place(info.name)
            layer = checkpoint.names.linear.get(place.name) if place is not None else None
            if layer is None or checkpoint.stored(info) is None:
                return None
            found.add((layer.transposed, layer.experts, layer.bias is not None))
        if len(found) != 1:
            return None
        transposed, experts, biased = found.pop()
        bias = one.name.removesuffix("weight") + "bias"
        return Linear(transposed, experts, bias if biased and bias in self._by_name else None)

    def _of_linear(self, one: Ready, layer: Linear) -> dict[str, Task]:
        bias = None if layer.bias is None else self._by_name[layer.bias]
        if bias is not None:
            require_agreement(one, bias)
        parts = self._parts(one, self._kinds_of(layer))
        if parts is None:
            return {}
        self._require_shapes(one, layer, parts)
        moves, axes = moves_of(one, parts)
        if axes is not None and any(p.lookup is not None and self._diagonal(p.lookup) for p in parts):
            require_reordered(one, moves, (layer.read(axes)[0],), "diagonals of Gram matrices")
        merged = self.linear_task(
            name=one.name,
            parts=parts,
            axes=axes,
            moves=moves,
            weights=one.inputs,
            out_dtype=one.out_dtype,
            layer=layer,
            biases=None if bias is None else bias.inputs,
            base=one.base,
            **self._options(one, parts),
        )
        self.findings.append((one.name, PartOf(merged=merged, entry="facts")))
        tasks: dict[str, Task] = {one.name: PartOf(merged=merged, entry="weight")}
        return tasks if bias is None else {**tasks, bias.name: PartOf(merged=merged, entry="bias")}

    def _kinds_of(self, layer: Linear) -> tuple[str, ...]:
        return self.kinds if layer.bias is None else (*self.kinds, "mean")

    def _options(self, one: Ready, parts: Sequence[Part]) -> dict[str, Any]:
        options = {"off_diagonal": one.asked("off_diagonal"), "ridge": one.asked("ridge")}
        return options if one.base is None else {**options, "factor": one.asked("lambda")}

    def _parts(self, one: Ready, kinds: tuple[str, ...]) -> tuple[Part, ...] | None:
        """The share and the statistics of every model; None if a file left this tensor out."""
        shares = shares_of(one)
        if _from_task_vectors(one, list(shares)):
            return tuple(Part(m, share, None) for m, share in shares.items())
        if any(self.context.checkpoints[m].layout.is_around_text(one.source(m).name) for m in shares):
            return None  # no text of the statistics reached it
        lookups = {m: self.files.lookup(one, m, kinds) for m in shares}
        if any(lookup is None for lookup in lookups.values()):
            return None
        return tuple(Part(m, share, lookups[m]) for m, share in shares.items())

    def _require_shapes(self, one: Ready, layer: Linear, parts: Sequence[Part]) -> None:
        header = self.context.checkpoints[one.order[0]].stored(one.source(one.order[0]))
        assert header is not None
        shape = header.shape
        sizes = {"gram": layer.inputs(shape), "mean": layer.inputs(shape), "gradient_gram": layer.outputs(shape)}
        experts = shape[:1] if layer.experts else ()
        for lookup in (part.lookup for part in parts if part.lookup is not None):
            for kind in self._kinds_of(layer):
                vector = kind == "mean" or (kind == "gram" and self._diagonal(lookup))
                lookup.file.require_shape(lookup.name, kind, (*experts, *(sizes[kind],) * (1 if vector else 2)))
            self._read.append((lookup, layer.inputs(shape)))

    def _diagonal(self, lookup: Lookup) -> bool:
        return lookup.file.measured.gram == "diagonal"


def moves_of(one: Ready, parts: Sequence[Part]) -> tuple[tuple[Task | None, ...], Any]:
    """The solution of each part's block, and the axes of the tensor if any model is aligned."""
    moved = [one.aligned.get(part.model) for part in parts]
    axes = next((apply.axes for apply in moved if apply is not None), None)
    return tuple(None if apply is None else apply.solution for apply in moved), axes


def _from_task_vectors(one: Ready, models: Sequence[ModelReference]) -> bool:
    """Whether the models' own updates stand for statistics.

    Raises:
        ParameterError: if they do for some models only: their sizes cannot be compared.
    """
    if one.base is None:
        return False
    given = {one.asked("statistics", m) == TASK_VECTORS: m for m in models}
    if len(given) > 1:
        raise ParameterError(
            f"parameter statistics of model {given[False]}",
            f"it is a file, but {TASK_VECTORS} for model {given[True]} ({one.name}), and the two cannot be compared",
            f"Give every model a file, or use {TASK_VECTORS} for all",
        )
    return True in given
