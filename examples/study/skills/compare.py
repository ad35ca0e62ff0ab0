"""A part from training to results."""

from __future__ import annotations

from dataclasses import asdict

from ..store import Store
from .comparison import Comparison
from .costs import cost, priced
from .jobs import lacking, measure_all


def compare(comparison: Comparison, store: Store, workers: int) -> None:
    """Measure what is missing: models, statistics, merges, then costs with the machine to themselves.

    Raises:
        RuntimeError: at the end, if rows are still missing because something failed.
    """
    comparison.models.base()
    phases = [list(comparison.trained()), list(comparison.measured()), list(comparison.merged())]
    last = priced(comparison) if comparison.models.settings.costs else []
    if lacking([job for phase in (*phases, last) for job in phase], store):
        for phase in phases:
            measure_all(phase, comparison, store, workers)
    for job in last:
        store.measure(asdict(job), lambda wanted=job: cost(comparison, wanted))
    if lacking([job for phase in phases for job in phase], store):
        raise RuntimeError(f"rows are missing in {store.path}: see FAILED above, and run this again.")
