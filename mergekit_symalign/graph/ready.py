"""A planned tensor with all that merging it needs: its inputs, aligned and finite, and the models that take part."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from mergekit.architecture import WeightInfo
from mergekit.common import ImmutableMap, ModelReference
from mergekit.config import MergeConfiguration
from mergekit.graph import Task
from mergekit.merge_methods.base import MergeMethod, ParameterScope
from mergekit.merge_methods.task_adapter import ExecuteMergeMethodTask
from mergekit.options import MergeOptions
from mergekit.tokenizer import PermutedVocabulary
from mergekit.tokenizer.truncate import TruncatedVocabulary

from mergekit_symalign.graph.apply import ApplyBlock
from mergekit_symalign.graph.checkpoint_checks import Checkpoint, merged_dtype
from mergekit_symalign.graph.load import GatherAligned
from mergekit_symalign.graph.merge import merge_task
from mergekit_symalign.graph.planned import Planned, gather_of
from mergekit_symalign.methods import PAPERS, DataMethod


@dataclass(frozen=True)
class Ready:
    """One tensor of the output.

    Attributes:
        weight: the tensor.
        planned: MergeKit's task for it, with the parameters that hold for this tensor: ``planned.parameters[name]``,
            ``planned.input_parameters[model][name]``.
        order: the models that take part, as listed.
        base: the base among them, if the method has one.
        inputs: the task that gives their tensors, {model: tensor}. A tensor that is optional may be absent; where
            MergeKit matches vocabularies there may be models that take no part.
        aligned: for each aligned model the task that moves its tensor, with its ``axes`` and ``solution``.
        out_dtype: what the merged tensor is to have; None for a tensor that is not of floating-point numbers.
    """

    weight: WeightInfo
    planned: ExecuteMergeMethodTask
    order: tuple[ModelReference, ...]
    base: ModelReference | None
    inputs: Task
    aligned: Mapping[ModelReference, ApplyBlock]
    out_dtype: str | None

    @property
    def name(self) -> str:
        return self.weight.name

    def source(self, model: ModelReference) -> WeightInfo:
        """The tensor of a model that this one is merged from (of another layer, where slices say so)."""
        info: WeightInfo = gather_of(self.planned).weight_info[model]
        return info

    def asked(self, name: str, model: ModelReference | None = None) -> Any:
        """The value of a parameter for this tensor, and of this model if each has its own."""
        if model is None:
            return self.planned.parameters[name]
        return self.planned.input_parameters[model].get(name)

    def merged_by(
        self, method: MergeMethod, shared: Mapping[str, Any], own: Mapping[ModelReference, Mapping[str, Any]]
    ) -> ExecuteMergeMethodTask:
        """The task of a method of MergeKit's on this tensor alone.

        Args:
            method: of MergeKit's.
            shared, own: its parameters, and those of each model.
        """
        return merge_task(
            method,
            gather_tensors=self.inputs,
            model_order=self.order,
            base_model=self.base,
            output_weight=self.weight,
            parameters=dict(shared),
            input_parameters={m: dict(given) for m, given in own.items()},
            dtype=self.planned.dtype,
            out_dtype=self.out_dtype if self.aligned else None,
        )

    def merged_without_data(self, method: DataMethod) -> ExecuteMergeMethodTask:
        """The task for a tensor that the data says nothing of."""
        spec, bound = method.elsewhere.spec, dict(self.planned.parameters.items())
        shared = {p.name: method.given_elsewhere(p, bound) for p in spec.shared_parameters}
        own = {
            m: {
                p.name: method.given_elsewhere(p, dict(self.planned.input_parameters[m].items()))
                for p in spec.input_parameters
                if m != self.base or p.scope is ParameterScope.INPUT
            }
            for m in self.order
        }
        return self.merged_by(method.elsewhere, shared, own)


@dataclass(frozen=True)
class Context:
    """What a method that uses data plans from.

    Attributes:
        method: with its ``spec`` and what it does elsewhere.
        tensors: of the output, in the order in which MergeKit writes them.
        checkpoints: of every model, with its layout.
        config, options: of MergeKit.
    """

    method: DataMethod
    tensors: tuple[Ready, ...]
    checkpoints: Mapping[ModelReference, Checkpoint]
    config: MergeConfiguration
    options: MergeOptions

    def papers(self) -> list[dict[str, str]]:
        """What the report says of the method's papers."""
        return [{"title": title, "url": url} for title, url in PAPERS[self.method.spec.name]]


@dataclass(frozen=True)
class DataPlan:
    """What a method that uses data plans.

    Attributes:
        tensors: each tensor of the output with the task that gives it, or None where there is none to give.
        facts: what is known of the data before the merge, for the report: plain values under names.
        findings: tasks that tell more when they have run, by the name of the tensor: a flat dict of plain values each.
        inexact_because: why the models do not enter the merge as they are, if they do not.
    """

    tensors: list[tuple[WeightInfo, Task]]
    facts: Mapping[str, Any] = field(default_factory=dict)
    findings: tuple[tuple[str, Task], ...] = ()
    inexact_because: tuple[str, ...] = ()


def ready(
    planned: Planned,
    order: tuple[ModelReference, ...],
    base: ModelReference | None,
    aligned: Mapping[ModelReference, ApplyBlock],
    checkpoints: Mapping[ModelReference, Checkpoint],
    config: MergeConfiguration,
) -> Ready:
    """A tensor that MergeKit has planned, for the models that take part."""
    weight, task = planned
    gather = gather_of(task)
    stored = merged_dtype(checkpoints[m].stored(gather.weight_info[m]) for m in order)
    promoted = None if stored is None else str(stored).removeprefix("torch.")
    out_dtype = config.out_dtype or config.dtype or promoted
    return Ready(weight, task, order, base, _regathered(task, order, aligned), aligned, out_dtype)


def _regathered(
    task: ExecuteMergeMethodTask, order: tuple[ModelReference, ...], aligned: Mapping[ModelReference, ApplyBlock]
) -> Task:
    """The same inputs with finite loads, aligned where they are; vocabulary steps keep all models they know."""
    gather, inputs = gather_of(task), task.gather_tensors
    if isinstance(inputs, (PermutedVocabulary, TruncatedVocabulary)):
        return inputs.model_copy(
            update={"gather_tensors": GatherAligned(**dict(gather) | {"aligned": tuple(aligned.items())})}
        )
    infos = {m: info for m, info in gather.weight_info.items() if m in order}
    replaced = tuple((m, apply) for m, apply in aligned.items() if m in order)
    fields = dict(gather) | {"weight_info": ImmutableMap(data=infos), "aligned": replaced}
    return GatherAligned(**fields)
