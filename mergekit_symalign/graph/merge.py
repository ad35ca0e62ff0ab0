"""The task that merges one tensor: MergeKit's own, a few rows at a time where the method allows it."""

from __future__ import annotations

from typing import Any, Dict, Optional

import torch
from mergekit.common import ModelReference
from mergekit.merge_methods.base import MergeMethod
from mergekit.merge_methods.task_adapter import ExecuteMergeMethodTask

from mergekit_symalign.graph.pieces import PIECE, in_pieces, is_large

ELEMENTWISE = frozenset(("linear", "task_arithmetic"))
"""MergeKit's methods that take every number by itself: no norm, no rank, no random draw over a whole tensor."""


def merge_task(inner: MergeMethod, **fields: Any) -> ExecuteMergeMethodTask:
    """The task that runs ``inner`` on one tensor of the output."""
    name = inner.spec.name
    task = MergeInPieces if name in ELEMENTWISE else ExecuteMergeMethodTask
    return task(method_name=name, **fields)


class MergeInPieces(ExecuteMergeMethodTask):
    """MergeKit's task for one of the `ELEMENTWISE` methods, which give the same bits for a few rows as for all."""

    def execute(self, tensors: Dict[ModelReference, torch.Tensor], **_kwargs: Any) -> Optional[torch.Tensor]:
        if len(tensors) < len(self.model_order) or not _divisible(tensors):
            return super().execute(tensors)

        def merged(start: int, length: int) -> torch.Tensor:
            rows = {model: x.narrow(0, start, length) for model, x in tensors.items()}
            result = ExecuteMergeMethodTask.execute(self, rows)
            assert result is not None
            return result

        shape = next(iter(tensors.values())).shape
        return in_pieces(merged, shape, 0, most=2 * PIECE // len(tensors))


def _divisible(tensors: Dict[ModelReference, torch.Tensor]) -> bool:
    """Whether there is something to divide, and nothing that MergeKit treats otherwise or refuses."""
    first, *others = tensors.values()
    alike = all(x.shape == first.shape and x.device == first.device for x in others)
    return alike and is_large(first) and all(x.is_floating_point() for x in tensors.values())
