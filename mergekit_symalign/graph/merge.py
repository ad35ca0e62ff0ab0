"""The task that merges one tensor: MergeKit's own, a few rows at a time where the method allows it."""

from __future__ import annotations

import math
from typing import Any, Dict, Optional

import torch
from mergekit.common import ModelReference
from mergekit.merge_methods.base import MergeMethod
from mergekit.merge_methods.task_adapter import ExecuteMergeMethodTask

from numpy import float32

from mergekit_symalign.graph.pieces import in_pieces, is_large
from mergekit_symalign.symmetry.compiled import bits, loops_for
from mergekit_symalign.symmetry.threads import in_parallel

_NUMBERS = 1 << 20  # of all models together that are merged at once
_NONE = 1e-8  # a sum of weights that MergeKit does not divide by
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
        return in_pieces(merged, shape, 0, most=_NUMBERS // len(tensors))

    def _in_one_pass(self, tensors: Dict[ModelReference, torch.Tensor]) -> Optional[torch.Tensor]:
        """Task arithmetic on bfloat16 by a compiled loop, which rounds at every step as MergeKit's does; None where
        there is none, or where it is not known to give the same bits."""
        base = tensors[self.base_model] if self.base_model in tensors else None
        named = {self.dtype or "bfloat16", self.out_dtype or "bfloat16"} == {"bfloat16"}
        if self.method_name != "task_arithmetic" or base is None or not named or not self._of_bfloat16(tensors):
            return None
        loops = loops_for(base)
        if loops is None:
            return None
        models = [m for m in self.model_order if m != self.base_model]
        weights = torch.tensor([self.input_parameters[m]["weight"] for m in models], dtype=base.dtype)
        divisor = float(weights.sum()) if self.parameters["normalize"] else 1.0
        factors = (1.0 if abs(divisor) < _NONE else divisor, float(self.parameters["lambda"]))
        output = torch.empty_like(base)

        def merged(start: int) -> bool:
            rows = {m: x.narrow(0, start, min(step, len(x) - start)).to(base.dtype) for m, x in tensors.items()}
            own, out = (bits(x).reshape(-1) for x in (rows[self.base_model], output.narrow(0, start, len(rows[models[0]]))))
            others = tuple(bits(rows[m]).reshape(-1) for m in models)
            ordinary: bool = loops.add_task_vectors(own, others, weights.float().numpy(), *map(float32, factors), out)
            return ordinary

        step = max(1, _NUMBERS // (len(tensors) * base.shape[1]))
        return output if all(in_parallel(merged, range(0, len(base), step), base.device)) else None

    def _of_bfloat16(self, tensors: Dict[ModelReference, torch.Tensor]) -> bool:
        """Whether MergeKit merges these in bfloat16."""
        return self.dtype is not None or all(x.dtype is torch.bfloat16 for x in tensors.values())


def _divisible(tensors: Dict[ModelReference, torch.Tensor]) -> bool:
    """Whether there is something to divide, and nothing that MergeKit treats otherwise or refuses."""
    first, *others = tensors.values()
    alike = all(x.shape == first.shape and x.device == first.device for x in others)
    return alike and is_large(first) and all(x.is_floating_point() for x in tensors.values())
