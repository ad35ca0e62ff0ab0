"""What MergeKit has planned: a tensor of the output, and the task that merges it."""

from __future__ import annotations

from mergekit.architecture import WeightInfo
from mergekit.common import ModelReference
from mergekit.io.tasks import GatherTensors
from mergekit.merge_methods.task_adapter import ExecuteMergeMethodTask

Planned = tuple[WeightInfo, ExecuteMergeMethodTask]


def anchor_of(task: ExecuteMergeMethodTask) -> ModelReference:
    """The model whose coordinates a tensor shall have; the first one, in a merge that aligns nothing."""
    base = task.base_model
    return base if base is not None and base in task.model_order else task.model_order[0]


def gather_of(task: ExecuteMergeMethodTask) -> GatherTensors:
    """The loads behind a planned tensor, whatever MergeKit does to its vocabulary afterwards."""
    inputs = task.gather_tensors
    return inputs if isinstance(inputs, GatherTensors) else inputs.gather_tensors
