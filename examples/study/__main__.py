"""Measures what is missing of a study: ``PYTHONPATH=examples python -m study full``.

Everything that was measured before is kept, so a killed study goes on where it was. Delete a results file to measure
anew. ``python -m study.report`` then writes the page.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from .fusion import Encoders, Fusion
from .lineage import drifts
from .settings import HERE, Settings
from .smollm2 import FineTuning, SmolLM2
from .store import Store
from .sweep import reproducible, sweep
from .vit_models import Vits
from .vits import Fusions

SMALL_MODELS = ("full", "small")


def small_models(name: str, results: Path, work: Path) -> None:
    """Parts 1 to 3."""
    settings = Settings.read(name)
    sweep(settings, settings.seeds, drifts(settings), Store.open(results / f"{name}.json", settings), work / name)


def encoders(results: Path, work: Path) -> None:
    """Part 4."""
    settings = Encoders.read()
    Fusion(settings, work / "fusion", Store.open(results / "fusion.json", settings)).run()


def smollm2(results: Path, work: Path) -> None:
    """Part 5."""
    settings = FineTuning.read()
    SmolLM2(settings, work / "smollm2", Store.open(results / "smollm2.json", settings)).run()


def vits(results: Path, work: Path) -> None:
    """Part 6."""
    settings = Vits.read()
    Fusions(settings, work / "vits", Store.open(results / "vits.json", settings)).run()


OTHERS = {"fusion": encoders, "smollm2": smollm2, "vits": vits}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("parts", choices=(*SMALL_MODELS, *OTHERS))
    parser.add_argument("--results", type=Path, default=HERE / "results", help="directory of the results files")
    parser.add_argument("--work", type=Path, default=Path(".cache/study"), help="directory for models and merges")
    args = parser.parse_args()
    reproducible()
    work = args.work.resolve()
    if args.parts in SMALL_MODELS:
        small_models(args.parts, args.results, work)
    else:
        OTHERS[args.parts](args.results, work)


if __name__ == "__main__":
    main()
