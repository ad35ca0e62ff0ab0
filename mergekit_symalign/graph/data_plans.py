"""One table: how each method that uses data plans a merge."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from mergekit_symalign.graph.fisher_plan import plan_fisher
from mergekit_symalign.graph.fusion import plan_regmean, plan_task_vectors
from mergekit_symalign.graph.ready import Context, DataPlan
from mergekit_symalign.graph.transport_plan import plan_transport

PLANS: Mapping[str, Callable[[Context], DataPlan]] = {
    "regmean": plan_regmean,
    "fisher": plan_fisher,
    "regmean_task_arithmetic": plan_task_vectors,
    "ot_fusion": plan_transport,
}
"""By the method's name: the function that plans all tensors of a merge at once."""


def plan_with_data(context: Context) -> DataPlan:
    """The tasks of all tensors, and what the report says of the data.

    Raises:
        SymalignError: for data that is not of these models, before anything is computed.
    """
    return PLANS[context.method.spec.name](context)
