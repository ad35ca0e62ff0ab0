"""The numbers behind sections 7 and 8: models with different skills, merged with and without data."""

from __future__ import annotations

import re

from ..estimates import Estimate
from ..findings import Findings, Metric, plain_number
from ..skills.arms import arms
from ..skills.comparison import ALONE, MERGE
from ..skills.costs import COST
from ..skills.settings import Mix

AVERAGE, TASK_ARITHMETIC, TIES = "average", "task-arithmetic", "ties"

REGMEAN, DATA_FREE = "regmean", "regmean-vectors"


def mixes(findings: Findings) -> list[Mix]:
    return [Mix(tuple(m["kinds"]), tuple(m["weights"]), m["arms"]) for m in findings.settings["mixes"]]


def loss(mix: Mix) -> Metric:
    """The loss on what the models of a mix were trained on, weighted as they are."""
    return lambda row: sum(w * float(row[f"{kind}_loss"]) for kind, w in zip(mix.kinds, mix.weights, strict=True))


def scanned(findings: Findings, mix: Mix, name: str) -> list[str]:
    """All values of an arm that is scanned, or the arm itself, where they were measured."""
    named = [arm.name for arm in arms(mix.arms) if arm.name == name or re.match(rf"{re.escape(name)} \S+=", arm.name)]
    return [arm for arm in named if findings.has(MERGE, mix.name, arm)]


def best(findings: Findings, mix: Mix, name: str) -> str | None:
    """The value of a scan with the lowest loss over all seeds, chosen on the very texts that it is measured on."""
    found = scanned(findings, mix, name)
    return min(found, key=lambda arm: findings.estimate(MERGE, mix.name, arm, loss(mix)).mean, default=None)


def finished(findings: Findings) -> bool:
    """Whether every arm of every mix was measured for all seeds, and the costs."""
    complete = all(
        len(findings.per_seed(MERGE, mix.name, arm.name, loss(mix))) == len(findings.settings["seeds"])
        for mix in mixes(findings)
        for arm in arms(mix.arms)
    )
    return complete and findings.has(COST) == findings.settings["costs"]


def parents(findings: Findings, mix: Mix) -> dict[int, float]:
    """Per seed the weighted loss of each model on its own kind."""
    each = [findings.per_seed(ALONE, kind, "-", plain_number(f"{kind}_loss")) for kind in mix.kinds]
    return {seed: sum(w * x[seed] for w, x in zip(mix.weights, each, strict=True)) for seed in each[0]}


def closed(findings: Findings, mix: Mix, arm: str) -> Estimate:
    """Per cent of the way from the average's loss down to each model's own loss on its own kind."""
    ours, average = (findings.per_seed(MERGE, mix.name, a, loss(mix)) for a in (arm, AVERAGE))
    own = parents(findings, mix)
    return Estimate.of([100 * (average[s] - x) / (average[s] - own[s]) for s, x in ours.items()])


def gain(findings: Findings, mix: Mix, ours: str, rival: str) -> Estimate:
    """Loss of an arm minus the loss of the rival at its best value."""
    against = best(findings, mix, rival)
    if against is None:
        raise ValueError(f"{rival} was not measured for {mix.name}. Run the study before its report.")
    return findings.difference(MERGE, mix.name, ours, loss(mix), against=against)
