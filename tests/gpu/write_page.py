"""Writes what GPUs took into docs/performance.md, from the files of results: ``make gpu-page``."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from gpu.results import table

sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))

from pages import PAGE, between, of_files

RESULTS = Path(__file__).parent / "results"
MARKS = ("<!-- on a GPU: written by make gpu-page -->\n", "<!-- end of what GPUs took -->")
NOTHING = "Not yet measured: no results of a GPU are in `tests/gpu/results/`.\n"


def section() -> str:
    """Every card's tables, or that there are none."""
    return of_files(RESULTS, _of_card) or NOTHING


def page(text: str, written: str) -> str:
    """The page with the tables of today."""
    return between(MARKS, text, written)


def _of_card(found: Mapping[str, Any], file: str) -> str:
    """The tables of one file of results, and which parts failed or were skipped."""
    card = found["machine"]
    lines = [f"### {card['device']}\n", f"torch {card['torch']}; every number is from `tests/gpu/results/{file}`.\n"]
    for stage in found["stages"]:
        lines += [f"**{stage['name']}**: {stage['status']} in {stage['seconds']:.0f} s\n"]
        lines += [f"{stage['note']}\n"] if stage["note"] else []
        lines += [table(stage["rows"]) + "\n"] if stage["rows"] else []
    return "\n".join(lines)


if __name__ == "__main__":
    PAGE.write_text(page(PAGE.read_text("utf-8"), section()), "utf-8")
