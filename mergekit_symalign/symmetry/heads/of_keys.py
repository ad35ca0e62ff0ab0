"""Values without rows of their own: the key rows write keys and values (Gemma 4's ``attention_k_eq_v``).

Under a QK-norm keys carry an orthogonal matrix for each head, so attended values carry the same one as queries. Their
output columns then count as more columns of the query rows, and nothing is left of values.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch

from mergekit_symalign.symmetry.groups import AxisAction
from mergekit_symalign.symmetry.options import HeadShape, HeadValues, Sides


def with_own_values(shape: HeadShape) -> HeadShape:
    """The same heads with values of their own."""
    return replace(shape, values=HeadValues.free)


def joined_rows(sides: Sides, shape: HeadShape) -> Sides:
    """Rows of a block with what reads the values beside the queries, and values that are nothing."""
    some = sides["key"][0][0]
    nothing = {axis: torch.zeros(shape.heads(axis) * shape.head_dim, 1).to(some) for axis in ("value", "attended")}
    joined = {"query": [*sides["query"], *sides["attended"]]}
    return {**sides, **joined, **{axis: [(x, x)] for axis, x in nothing.items()}}


def with_attended(actions: Mapping[str, AxisAction]) -> dict[str, AxisAction]:
    """The actions on queries and keys, and the same as the queries' on what reads the values."""
    own = {axis: action for axis, action in actions.items() if axis not in ("value", "attended")}
    return own | ({"attended": own["query"]} if "query" in own else {})
