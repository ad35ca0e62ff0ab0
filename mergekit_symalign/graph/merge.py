"""The task that merges one tensor: MergeKit's own, a few rows at a time where the method allows it."""

from __future__ import annotations

import math
from typing import Any, Dict, Optional

import torch
from mergekit.common import ModelReference, dtype_from_name
from mergekit.merge_methods.base import MergeMethod
from mergekit.merge_methods.task_adapter import ExecuteMergeMethodTask

from mergekit_symalign.graph.one_pass import add_task_vectors
from mergekit_symalign.graph.pieces import MERGED, in_pieces, is_large

_ELEMENTWISE = {"linear": math.inf, "task_arithmetic": 5}
"""MergeKit's methods that take every number by itself (no norm, rank or random draw), and of how many models at most.

More than four differences are added by torch in an order that depends on where in the tensor they stand.
"""


def merge_task(inner: MergeMethod, **fields: Any) -> ExecuteMergeMethodTask:
    """The task that runs ``inner`` on one tensor of the output."""
    name = inner.spec.name
    divisible = len(fields["model_order"]) <= _ELEMENTWISE.get(name, 0)
    task = MergeInPieces if divisible else ExecuteMergeMethodTask
    return task(method_name=name, **fields)


class MergeInPieces(ExecuteMergeMethodTask):
    """MergeKit's task for a method that gives the same bits for a few rows as for all of them."""

    def execute(self, tensors: Dict[ModelReference, torch.Tensor], **_kwargs: Any) -> Optional[torch.Tensor]:
        if len(tensors) < len(self.model_order) or not _divisible(tensors):
            return super().execute(tensors)
        if (in_one_pass := self._in_one_pass(tensors)) is not None:
            return in_one_pass

        def merged(start: int, length: int) -> torch.Tensor:
            rows = {model: x.narrow(0, start, length) for model, x in tensors.items()}
            result = ExecuteMergeMethodTask.execute(self, rows)
            assert result is not None
            return result

        shape = next(iter(tensors.values())).shape
        return in_pieces(merged, shape, 0, most=MERGED // len(tensors))

    def _in_one_pass(self, tensors: Dict[ModelReference, torch.Tensor]) -> Optional[torch.Tensor]:
        """The same bits from a compiled loop; None where there is none."""
        dtypes = {dtype_from_name(name) for name in (self.dtype, self.out_dtype) if name is not None}
        dtypes |= {x.dtype for x in tensors.values()} if self.dtype is None else set()
        if self.method_name != "task_arithmetic" or dtypes != {torch.bfloat16}:
            return None
        models = [m for m in self.model_order if m != self.base_model]
        return add_task_vectors(
            tensors[self.base_model],
            [tensors[m] for m in models],
            [self.input_parameters[m]["weight"] for m in models],
            normalize=self.parameters["normalize"],
            factor=self.parameters["lambda"],
        )


def _divisible(tensors: Dict[ModelReference, torch.Tensor]) -> bool:
    """Whether there is something to divide, and nothing that MergeKit treats otherwise or refuses."""
    first, *others = tensors.values()
    alike = all(x.shape == first.shape and x.device == first.device for x in others)
    return alike and is_large(first) and all(x.is_floating_point() for x in tensors.values())
