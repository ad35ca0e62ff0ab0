"""Writes what GPUs took into docs/performance.md, from the files of results: ``make gpu-page``."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from gpu.results import table

RESULTS = Path(__file__).parent / "results"
PAGE = Path(__file__).parent.parent.parent / "docs" / "performance.md"
BEGIN, END = "<!-- on a GPU: written by make gpu-page -->\n", "<!-- end of what GPUs took -->"
NOTHING = "Not yet measured: no results of a GPU are in `tests/gpu/results/`.\n"


def section() -> str:
    """Every card's tables, or that there are none."""
    files = sorted(RESULTS.glob("*.json"))
    return "\n".join(_of_card(json.loads(file.read_text("utf-8")), file.name) for file in files) or NOTHING


def page(text: str, written: str) -> str:
    """The page with the tables of today."""
    before, _, rest = text.partition(BEGIN)
    _, _, after = rest.partition(END)
    return before + BEGIN + written + END + after


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
