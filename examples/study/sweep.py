"""Parts 1 to 3: for all seeds first what is asked first, then drift after drift."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path

import torch
import transformers

from .foreign import Foreign
from .lineage import FINE_TUNED, Drift, Lineage
from .settings import Settings
from .store import Store
from .transfer import Transfer


def sweep(settings: Settings, seeds: Sequence[int], wanted: Sequence[Drift], store: Store, work: Path) -> None:
    """Measure what is missing of these drifts; models and merges are kept in ``work``."""
    lineages = [Lineage(settings, seed, work / f"seed-{seed}") for seed in seeds]
    for drift in wanted:
        started = time.monotonic()
        for lineage in lineages:
            Transfer(settings, lineage, store).run(drift)
            if drift.name == FINE_TUNED:
                Foreign(settings, lineage, store).run()
        print(f"{drift.name}: {time.monotonic() - started:.0f} s", flush=True)


def reproducible() -> None:
    """One thread: the same sums in the same order wherever this runs. No progress bars."""
    torch.set_num_threads(1)
    transformers.utils.logging.disable_progress_bar()
