"""Runs a study and writes its results, figures and page: ``python examples/study/run.py full``.

Everything that was measured before is kept, so a killed study goes on where it was. Delete the results file to measure
anew.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import torch
import transformers

from .foreign import Foreign
from .lineage import Lineage
from .settings import HERE, Settings
from .store import Store
from .transfer import Transfer

RESULTS = HERE / "results"


def run(settings: Settings, results: Path, work: Path) -> Store:
    """Measure what is missing of parts 1 to 3, seed after seed."""
    torch.set_num_threads(1)  # the same sums in the same order wherever it runs
    transformers.utils.logging.disable_progress_bar()
    store = Store.open(results / f"{settings.name}.json", settings)
    for seed in settings.seeds:
        started = time.monotonic()
        lineage = Lineage(settings, seed, work / settings.name / f"seed-{seed}")
        Transfer(settings, lineage, store).run()
        Foreign(settings, lineage, store).run()
        print(f"seed {seed}: {time.monotonic() - started:.0f} s", flush=True)
    return store


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("settings", choices=("full", "small"))
    parser.add_argument("--results", type=Path, default=RESULTS, help="directory of the results file")
    parser.add_argument("--work", type=Path, default=Path(".cache/study"), help="directory for models and merges")
    args = parser.parse_args()
    run(Settings.read(args.settings), args.results, args.work.resolve())


if __name__ == "__main__":
    main()
