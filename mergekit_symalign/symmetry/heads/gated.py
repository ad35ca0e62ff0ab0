"""Values whose attended coordinates a gate multiplies: an order of a head's coordinates, and a factor for each.

``attended_k[i] · sigmoid(gate_k[i])`` goes to the output projection. A rotation of the values does not commute with the
gate. What does is an order of the coordinates of a KV head, which the gate rows of all its query heads follow, and a
factor ``c`` for each coordinate, which the columns of the output projection are divided by. Coordinates are matched as
neurons of a gated MLP are: values for its up rows, output columns for its down columns.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mergekit_symalign.symmetry.assignment.linear import best_assignments
from mergekit_symalign.symmetry.groups import AxisAction, Chain, Permutation, Scaling
from mergekit_symalign.symmetry.heads.coordinates import within_heads
from mergekit_symalign.symmetry.heads.moments import Moments
from mergekit_symalign.symmetry.quartic import best_scale, neuron_factors
from mergekit_symalign.symmetry.scale import best_saving

GATE = "attended_gate"


def align_gated(
    value: Moments, attended: Moments, gate: Moments | None, *, rotate: bool, scale: bool
) -> AxisAction | None:
    """An order and a factor for each coordinate of each KV head: jointly optimal.

    Args:
        value: of what is multiplied by the factors.
        attended: of what is divided by them; summed over the query heads of each group.
        gate: of the gate rows, summed in the same way; None where they say nothing.
        rotate: whether coordinates may change places and signs.
        scale: whether factors may differ from 1 and -1.

    Returns:
        The action on values, an order and then factors; None if nothing is admitted.
    """
    if not (rotate or scale):
        return None
    b, o = value.model, attended.model
    if not rotate:
        p, q = (x.cross.diagonal(dim1=-2, dim2=-1) for x in (value, attended))
        return Scaling(best_scale(b, o, p, q).flatten())
    if scale:
        score = best_saving(value.cross, b.unsqueeze(1), attended.cross, o.unsqueeze(1), signed=True)
    else:
        score = (value.cross + attended.cross).abs()
    place = best_assignments(score if gate is None else score + gate.cross)
    p, q = (x.cross.gather(2, place.unsqueeze(2)).squeeze(2) for x in (value, attended))
    if scale:
        factor = neuron_factors((p, b.gather(1, place)), (q, o.gather(1, place)), signed=True)
    else:
        factor = torch.where(p + q < 0, -1.0, 1.0).to(p)
    return Chain((within_heads(place), Scaling(factor.flatten())))


def gate_action(value: AxisAction | None) -> Permutation | None:
    """What the gate rows carry under an action on values: its order alone."""
    first = value.steps[0] if isinstance(value, Chain) else value
    return first if isinstance(first, Permutation) else None


def gate_matrix(value: AxisAction | None, like: Tensor) -> Tensor:
    """The same as a matrix for each head, from ``like`` [n, d]."""
    n, d = like.shape
    eye = torch.eye(d, dtype=like.dtype, device=like.device).repeat(n, 1)
    order = gate_action(value)
    return (eye if order is None else order.transform(eye)).unflatten(0, (n, d))
