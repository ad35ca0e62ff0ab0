"""Writes what merges took on processors into docs/performance.md, from the files of results: ``make bench-page``."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import tables

RESULTS = Path(__file__).parent / "results"
PAGE = Path(__file__).parent.parent.parent / "docs" / "performance.md"
BEGIN, END = "<!-- on processors: written by make bench-page -->\n", "<!-- end of what processors took -->"
NOTHING = "Not yet measured: no results are in `tests/benchmarks/results/`.\n"
TITLES = {
    "whole": "Whole merges: plain → aligned, lower is better.",
    "growth": "What alignment adds to the merge of a base and two siblings with 10 % noise, lower is better.",
    "depth": "Peak memory against the number of layers (output in files of 500 MB).",
    "layers": "One layer of one model alone, lower is better.",
}


def section(results: Path) -> str:
    """Every file's tables, or that there are none."""
    files = sorted(results.glob("*.json"))
    return "\n".join(_of_file(json.loads(file.read_text("utf-8")), file.name) for file in files) or NOTHING


def page(text: str, written: str) -> str:
    """The page with the tables of today."""
    before, _, rest = text.partition(BEGIN)
    _, _, after = rest.partition(END)
    return before + BEGIN + written + END + after


def _of_file(found: Mapping[str, Any], file: str) -> str:
    machine = found["machine"]
    units = f" ({', '.join(machine['units'])})" if machine["units"] else ""
    where = f"{machine['threads']} threads, {machine['memory_gib']} GiB, torch {machine['torch']}"
    size = found.get("bytes_of_a_model")
    of_models = f" Each model has {size / 1e9:.1f} GB." if size else ""
    lines = [f"**{machine['processor']}**{units}, {where}.{of_models} From `tests/benchmarks/results/{file}`.\n"]
    for kind, title in TITLES.items():
        if found.get(kind):
            lines += [f"{title}\n", tables.HEADS[kind], *(tables.cells(kind, line) for line in found[kind]), ""]
    return "\n".join(lines)


if __name__ == "__main__":
    PAGE.write_text(page(PAGE.read_text("utf-8"), section(RESULTS)), "utf-8")
