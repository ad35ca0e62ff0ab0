"""Measures what is missing of a study: ``PYTHONPATH=examples python -m study full``.

Everything that was measured before is kept, so a killed study goes on where it was. Delete a results file to measure
anew. ``python -m study.report`` then writes the page.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import torch
import transformers

from .foreign import Foreign
from .fusion import Encoders, Fusion
from .lineage import FINE_TUNED, Lineage, drifts
from .settings import HERE, Settings
from .smollm2 import FineTuning, SmolLM2
from .store import Store
from .transfer import Transfer

SMALL_MODELS = ("full", "small")


def small_models(settings: Settings, results: Path, work: Path) -> None:
    """Parts 1 to 3: for all seeds first what is asked first, then drift after drift."""
    store = Store.open(results / f"{settings.name}.json", settings)
    lineages = [Lineage(settings, seed, work / settings.name / f"seed-{seed}") for seed in settings.seeds]
    for drift in drifts(settings):
        started = time.monotonic()
        for lineage in lineages:
            Transfer(settings, lineage, store).run(drift)
            if drift.name == FINE_TUNED:
                Foreign(settings, lineage, store).run()
        print(f"{drift.name}: {time.monotonic() - started:.0f} s", flush=True)


def encoders(results: Path, work: Path) -> None:
    """Part 4."""
    settings = Encoders.read()
    Fusion(settings, work / "fusion", Store.open(results / "fusion.json", settings)).run()


def smollm2(results: Path, work: Path) -> None:
    """Part 5."""
    settings = FineTuning.read()
    SmolLM2(settings, work / "smollm2", Store.open(results / "smollm2.json", settings)).run()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("parts", choices=(*SMALL_MODELS, "fusion", "smollm2"))
    parser.add_argument("--results", type=Path, default=HERE / "results", help="directory of the results files")
    parser.add_argument("--work", type=Path, default=Path(".cache/study"), help="directory for models and merges")
    args = parser.parse_args()
    torch.set_num_threads(1)  # the same sums in the same order wherever it runs
    transformers.utils.logging.disable_progress_bar()
    work = args.work.resolve()
    if args.parts in SMALL_MODELS:
        small_models(Settings.read(args.parts), args.results, work)
    else:
        {"fusion": encoders, "smollm2": smollm2}[args.parts](args.results, work)


if __name__ == "__main__":
    main()
