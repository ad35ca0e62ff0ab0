"""The results file as numbers per seed: what was measured directly, and what follows from several rows."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .estimates import Estimate
from .store import KEY, Row
from .transfer import own_tasks

Metric = Callable[[Row], float]


def percent(name: str) -> Metric:
    return lambda row: 100 * row[name]


def plain_number(name: str) -> Metric:
    return lambda row: float(row[name])


SKILL = percent("steps")
SKILL_LOSS = plain_number("steps_loss")
LOG_LOSS = plain_number("log_loss")
COMPLEMENT = percent("complement")
ALONE = percent("alone")
DEVIATION = plain_number("deviation")


def OWN(row: Row) -> float:  # noqa: N802
    return 100 * own_tasks(row)


@dataclass(frozen=True)
class Findings:
    """All rows of a study, and its settings.

    A seed that lacks a row of an arm is left out of that arm, and `Estimate.n` says so.
    """

    settings: dict[str, Any]
    environment: dict[str, str]
    rows: dict[tuple[Any, ...], Row]

    @staticmethod
    def read(path: Path) -> Findings:
        content = json.loads(path.read_text("utf-8"))
        rows = {tuple(row[name] for name in KEY): row for row in content["rows"]}
        return Findings(content["settings"], content["environment"], rows)

    def has(self, part: str, arm: str | None = None, variant: str | None = None) -> bool:
        return any(p == part and arm in (None, a) and variant in (None, v) for p, _, a, v in self.rows)

    def arms(self, part: str) -> list[str]:
        """In the order in which they were measured."""
        return list(dict.fromkeys(arm for p, _, arm, _ in self.rows if p == part))

    def per_seed(self, part: str, arm: str, variant: str, metric: Metric) -> dict[int, float]:
        found = {seed: metric(row) for (p, seed, a, v), row in self.rows.items() if (p, a, v) == (part, arm, variant)}
        return dict(sorted(found.items()))

    def estimate(self, part: str, arm: str, variant: str, metric: Metric) -> Estimate:
        return Estimate.of(list(self.per_seed(part, arm, variant, metric).values()))

    def difference(self, part: str, arm: str, variant: str, metric: Metric, against: str = "plain") -> Estimate:
        """Variant minus ``against``, seed by seed."""
        return _paired(
            self.per_seed(part, arm, variant, metric), self.per_seed(part, arm, against, metric), lambda x, y: x - y
        )

    def symmetric_share(self, part: str, arm: str, variant: str, distance: str = "total") -> Estimate:
        """Per cent of the distance to the anchor that alignment takes away."""
        metric = plain_number(f"{distance}_distance")
        ours, plain = (self.per_seed(part, arm, v, metric) for v in (variant, "plain"))
        if part == "distance":
            plain = self.per_seed("merge", arm, "plain", metric)
        return _paired(ours, plain, lambda x, y: 100 * (1 - x / y))

    def barrier(self, arm: str, variant: str) -> dict[int, float]:
        """Per seed: how far the loss rises above the straight line between reference and target, nats."""
        ends = [self.per_seed("alone", name, "-", plain_number("base_loss")) for name in ("reference", arm)]
        paths = {s: row["path"] for (p, s, a, v), row in self.rows.items() if (p, a, v) == ("merge", arm, variant)}

        def rise(seed: int) -> float:
            start, end = (losses[seed] for losses in ends)
            points = zip(self.settings["mixing"], paths[seed], strict=True)
            return float(max(loss - (1 - share) * start - share * end for share, loss in points))

        return {seed: rise(seed) for seed in sorted(paths)}

    def barrier_difference(self, arm: str, variant: str) -> Estimate:
        return _paired(self.barrier(arm, variant), self.barrier(arm, "plain"), lambda x, y: x - y)


def _paired(ours: dict[int, float], others: dict[int, float], combine: Callable[[float, float], float]) -> Estimate:
    return Estimate.of([combine(x, others[seed]) for seed, x in ours.items() if seed in others])
