"""Measures the first seed's plain fine-tuning again, from nothing, and compares: ``python -m study.again full``.

Training, merges and evaluation of parts 1 and 3 are repeated in an empty directory. Every number has to come out as it
stands in the results file, to all its digits; only times may differ. That holds on the machine and the versions that
the file names.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from .findings import Findings
from .lineage import drifts
from .settings import HERE, Settings
from .store import Store
from .sweep import reproducible, sweep

TIMES = ("merge_seconds",)


def again(settings: Settings, results: Path, work: Path) -> tuple[int, list[str]]:
    """How many rows were measured again, and in words what came out otherwise.

    Raises:
        FileExistsError: if ``work`` is there, for nothing measured before is to be used.
    """
    work.mkdir(parents=True)
    store = Store.open(work / results.name, settings)
    sweep(settings, settings.seeds[:1], drifts(settings)[:1], store, work)
    before, after = (Findings.read(path).rows for path in (results, store.path))
    return len(after), [
        f"{'/'.join(map(str, key))}: {name} was {before.get(key, {}).get(name)}, is {value}"
        for key, row in after.items()
        for name, value in row.items()
        if name not in TIMES and before.get(key, {}).get(name) != value
    ]


def report_differences(settings: Settings, results: Path, work: Path) -> None:
    """Measure again, and say that nothing changed; exit with what did."""
    rows, changed = again(settings, results, work)
    if changed:
        sys.exit("\n".join((*changed, f"{len(changed)} numbers differ from {results}.")))
    print(f"{rows} rows measured again, all as in {results}.")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("settings", choices=("full", "small"))
    parser.add_argument("--results", type=Path, default=HERE / "results", help="directory of the results files")
    parser.add_argument("--work", type=Path, default=Path(".cache/study-again"), help="a new directory")
    args = parser.parse_args()
    reproducible()
    report_differences(Settings.read(args.settings), args.results / f"{args.settings}.json", args.work.resolve())


if __name__ == "__main__":
    main()
