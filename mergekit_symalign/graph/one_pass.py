"""Task arithmetic in one pass over the tensors, with the bits that MergeKit's own steps leave.

MergeKit takes every step over whole tensors in bfloat16, and rounds at each of them. The compiled loop rounds in the
same places, and its numbers are the same (tests/test_compiled.py compares them with MergeKit's).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from mergekit_symalign.graph.pieces import MERGED
from mergekit_symalign.symmetry.compiled import arrays, bits, loops_for
from mergekit_symalign.symmetry.threads import in_parallel

_NONE = 1e-8  # a sum of weights that MergeKit does not divide by


def add_task_vectors(
    base: Tensor, models: Sequence[Tensor], weights: Sequence[float], *, normalize: bool, factor: float
) -> Tensor | None:
    """What MergeKit's ``task_arithmetic`` makes of matrices whose dtype is bfloat16, or is to be.

    Args:
        base: in bfloat16.
        models: of the same shape.
        weights: of the models.
        normalize: whether to divide by the sum of the weights.
        factor: MergeKit's ``lambda``.

    Returns:
        The merged matrix, or None where the loop is not to be used, or something else than numbers comes out.
    """
    loops = loops_for(base)
    if loops is None:
        return None
    weight = torch.tensor(weights, dtype=base.dtype)
    divisor = float(weight.sum()) if normalize else 1.0
    factors = arrays(weight.float(), torch.tensor([1.0 if abs(divisor) < _NONE else divisor, factor]))
    output = torch.empty_like(base)
    step = max(1, MERGED // ((1 + len(models)) * base.shape[1]))

    def merged(piece: tuple[Tensor, ...]) -> bool:
        out, own, *others = (bits(x.to(base.dtype)).reshape(-1) for x in piece)
        ordinary: bool = loops.add_task_vectors(own, tuple(others), *factors, out)
        return ordinary

    pieces = zip(*(x.split(step) for x in (output, base, *models)), strict=True)
    return output if all(in_parallel(merged, list(pieces), base.device)) else None
