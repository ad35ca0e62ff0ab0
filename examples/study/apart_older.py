"""Part 9: the arm *another initialisation* of part 2, with the residual stream aligned too."""

from __future__ import annotations

from pathlib import Path

from .apart_merges import Pair, arms
from .apart_models import Apart
from .apart_skills import Measure
from .evaluation import loss
from .lineage import Lineage, drifts
from .models import State, with_state
from .settings import Settings
from .transfer import prompts

OLDER = "older"


def older(settings: Apart, work: Path, measure: Measure) -> None:
    """The barrier of each alignment, between reference and target of the first seeds of parts 1 to 3."""
    full = Settings.read(settings.lineage)

    def measured(state: State) -> float:
        return loss(with_state(full, state), full.base.shares, full)

    for seed in full.seeds[: settings.lineages]:
        lineage = Lineage(full, seed, work / f"seed-{seed}")
        for arm in arms():
            measure(OLDER, seed, arm, "-", lambda x=lineage, a=arm: _pair(settings, full, x).barrier(a, measured))


def _pair(settings: Apart, full: Settings, lineage: Lineage) -> Pair:
    drift = next(x for x in drifts(full) if x.branch is None)
    text = prompts(full, lineage)
    work = lineage.work / "apart"
    return Pair(lineage.reference(), lineage.target(drift), text, work, full.length, settings.older_learning)
