"""The small study from training to page, in one process: ``PYTHONPATH=examples python -m study.trial DIRECTORY``.

It measures what ``small.yml`` asks for, measures the first part of it again and compares, and writes the page. This
shows that the code runs and repeats itself; models trained for seconds show nothing else.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from .again import report_differences
from .apart import apart
from .data import text
from .lineage import drifts
from .report.__main__ import write
from .report.page import Study
from .settings import HERE, Settings
from .skills.compare import compare
from .skills.comparison import Comparison
from .skills.encoders import Encoders
from .skills.settings import Skills
from .store import Store
from .sweep import reproducible, sweep
from .vit_models import Vits
from .vits import Fusions


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path, help="a new directory")
    folder = parser.parse_args().folder.resolve()
    folder.mkdir(parents=True)
    reproducible()
    settings = Settings.read("small")
    results = folder / "results" / "small.json"
    sweep(settings, settings.seeds, drifts(settings), Store.open(results, settings), folder / "work")
    small = Vits.read("vits-small")
    Fusions(small, folder / "work" / "vits", Store.open(results.with_name("vits.json"), small)).run()
    report_differences(settings, results, folder / "again")
    skills(results.parent, folder / "work")
    without_base(results.parent, folder / "work")
    write(Study.read(results.parent, settings.name), folder)


def skills(results: Path, work: Path) -> None:
    """Part 8, whose merges are the ones of part 7 too."""
    settings = Skills.read("skill-encoders", HERE / "skill-encoders-small.yml")
    store = Store.open(results / f"{settings.name}.json", settings)
    compare(Comparison(Encoders(settings, work / settings.name, "cpu")), store, workers=1)


def without_base(results: Path, work: Path) -> None:
    """Part 9, on the ship's log."""
    corpus = work / "log.txt"
    corpus.write_text(text("log", "train"), "utf-8")
    apart(corpus, "apart-small", results / "apart.json", work)


if __name__ == "__main__":
    main()
