"""From the tensors of a merge and the models' statistics to tasks: RegMean, and averages weighted by Fisher."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from mergekit.architecture import WeightInfo
from mergekit.common import ModelReference
from mergekit.graph import Task
from mergekit.io.tasks import GatherTensors

from mergekit_symalign.errors import ConfigError, OtherStatisticsError, ParameterError
from mergekit_symalign.graph.fusion_checks import (
    require_agreement,
    require_limits,
    require_reordered,
    shares_of,
    warn_of_few_tokens,
)
from mergekit_symalign.graph.fusion_tasks import (
    GatherFisher,
    MergeFisher,
    MergeKronecker,
    MergeLinear,
    MergeRegMean,
    MergeTaskVectors,
    Part,
    PartOf,
)
from mergekit_symalign.graph.linear import Linear
from mergekit_symalign.graph.ready import Context, DataPlan, Ready
from mergekit_symalign.graph.statistics import Lookup, MeanFisher, StatisticsFiles
from mergekit_symalign.methods import PAPERS, TASK_VECTORS

FACTORS = ("gram", "gradient_gram")


def plan_regmean(context: Context) -> DataPlan:
    """Every linear layer by `regmean`, everything else as MergeKit averages it."""
    return _Planner(context, MergeRegMean, ("gram",)).plan()


def plan_task_vectors(context: Context) -> DataPlan:
    """Every linear layer by `regmean_of_task_vectors`, everything else as MergeKit's task arithmetic does."""
    return _Planner(context, MergeTaskVectors, ("gram",)).plan()


def plan_fisher(context: Context) -> DataPlan:
    """Every tensor weighted by its diagonal Fisher information; linear layers by its factors where files have them."""
    return _FisherPlanner(context, MergeKronecker, FACTORS).plan()


@dataclass
class _Planner:
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
        papers = [{"title": title, "url": url} for title, url in PAPERS[self.context.method.spec.name]]
        facts = {"statistics": self.files.facts(), "papers": papers, "tensors_with_data": len(found)}
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
        moves, axes = _moves(one, parts)
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


class _FisherPlanner(_Planner):
    """Plans averages weighted by Fisher information, of factors or of the diagonal."""

    def _tasks(self, one: Ready) -> dict[str, Task]:
        shares = shares_of(one)
        if any(self.context.checkpoints[m].stored(one.source(m)) is None for m in shares) or one.out_dtype is None:
            return {}
        if not self._have_factors(one, list(shares)):
            return self._diagonal_mean(one)
        if (layer := self._linear(one)) is not None:
            return {} if _has_vocabulary(one) else self._of_linear(one, layer)
        return {} if self._is_bias(one) else self._diagonal_mean(one)

    def _is_bias(self, one: Ready) -> bool:
        """Whether it is merged together with a weight."""
        weight = self._by_name.get(one.name.removesuffix("bias") + "weight") if one.name.endswith("bias") else None
        return weight is not None and (layer := self._linear(weight)) is not None and layer.bias == one.name

    def _diagonal_mean(self, one: Ready) -> dict[str, Task]:
        parts = self._parts(one, ("fisher",))
        if parts is None:
            return {}
        for lookup in (part.lookup for part in parts if part.lookup is not None):
            self._require_fisher_shape(one, parts, lookup)
        moves, axes = _moves(one, parts)
        if axes is not None:
            require_reordered(one, moves, axes.names, "diagonals of Fisher information")
        gathered = GatherFisher(parts=parts, axes=axes, moves=moves, label=one.inputs.group_label())
        vocabulary = not isinstance(one.inputs, GatherTensors)
        merged = MergeFisher(
            name=one.name,
            parts=parts,
            axes=axes,
            moves=moves,
            weights=one.inputs,
            out_dtype=one.out_dtype,
            fishers=one.inputs.model_copy(update={"gather_tensors": gathered}) if vocabulary else gathered,
            **self._options(one, parts),
        )
        self.findings.append((one.name, PartOf(merged=merged, entry="facts")))
        return {one.name: PartOf(merged=merged, entry="weight")}

    def _require_fisher_shape(self, one: Ready, parts: Sequence[Part], lookup: Lookup) -> None:
        model = next(part.model for part in parts if part.lookup == lookup)
        header = self.context.checkpoints[model].stored(one.source(model))
        assert header is not None
        lookup.file.require_shape(lookup.name, "fisher", header.shape)

    def _have_factors(self, one: Ready, models: Sequence[ModelReference]) -> bool:
        """Whether the files have factors of the Fisher information of linear layers, and not its diagonal.

        Raises:
            OtherStatisticsError: if a file has no Fisher information.
            ConfigError: if one file has factors of it, and another one diagonals.
        """
        files = {m: self.files.of(one, m) for m in models}
        for m, file in files.items():
            if file.measured.fisher == "none":
                raise OtherStatisticsError(
                    file.label,
                    f"it has no Fisher information of model {m}",
                    f"Measure it: mergekit-symalign measure {m} --fisher empirical",
                )
        by_form = {file.measured.fisher == "kronecker": m for m, file in files.items()}
        if len(by_form) > 1:
            raise ConfigError(
                "parameter statistics",
                f"model {by_form[True]} has Kronecker factors of its Fisher information, but {by_form[False]} has its "
                "diagonal",
                "Measure all models with the same --fisher",
            )
        return True in by_form

    def _options(self, one: Ready, parts: Sequence[Part]) -> dict[str, Any]:
        normalize = one.asked("normalize_fisher")
        scales = tuple(self._scale(one, part) for part in parts) if normalize == "model" else ()
        return {"epsilon": one.asked("epsilon"), "normalize": normalize == "tensor", "scales": scales}

    def _scale(self, one: Ready, part: Part) -> MeanFisher:
        """The mean over all of this kind that the model's file has."""
        assert part.lookup is not None
        file = part.lookup.file
        factors = "gradient_gram" in file.kinds(part.lookup.name)
        wanted = set(FACTORS if factors else ("fisher",))
        names = [name for name in file.names if wanted <= file.kinds(name)]
        lookups = tuple(Lookup(part.lookup.path, part.lookup.sha256, name) for name in names)
        return MeanFisher(lookups=lookups, factors=factors)


def _moves(one: Ready, parts: Sequence[Part]) -> tuple[tuple[Task | None, ...], Any]:
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


def _has_vocabulary(one: Ready) -> bool:
    """Whether a factor would be as large as the vocabulary, times itself."""
    return one.weight.vocabulary_axis is not None
