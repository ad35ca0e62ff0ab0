"""Writes what merges took on processors into docs/performance.md, from the files of results: ``make bench-page``."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import tables
from pages import PAGE, between, of_files

RESULTS = Path(__file__).parent / "results"
MARKS = ("<!-- on processors: written by make bench-page -->\n", "<!-- end of what processors took -->")
NOTHING = "Not yet measured: no results are in `tests/benchmarks/results/`.\n"
TITLES = {
    "whole": "Whole merges: plain → aligned, lower is better.",
    "growth": "What alignment adds to the merge of a base and two siblings with 10 % noise, lower is better.",
    "depth": "Peak memory against the number of layers (output in files of 500 MB).",
    "layers": "One layer of one model alone, lower is better.",
}


def section(results: Path) -> str:
    """Every file's tables, or that there are none."""
    return of_files(results, _of_file) or NOTHING


def page(text: str, written: str) -> str:
    """The page with the tables of today."""
    return between(MARKS, text, written)


def _of_file(found: Mapping[str, Any], file: str) -> str:
    machine = found["machine"]
    units = f" ({', '.join(machine['units'])})" if machine["units"] else ""
    numba = f"numba {machine['numba']}" if machine.get("numba") else "no numba"
    where = f"{machine['threads']} threads, {machine['memory_gib']} GiB, torch {machine['torch']}, {numba}"
    size = found.get("bytes_of_a_model")
    of_models = f" Each model has {size / 1e9:.1f} GB." if size else ""
    lines = [f"**{machine['processor']}**{units}, {where}.{of_models} From `tests/benchmarks/results/{file}`.\n"]
    for kind, title in TITLES.items():
        if found.get(kind):
            lines += [f"{title}\n", tables.HEADS[kind], *(tables.cells(kind, line) for line in found[kind]), ""]
    return "\n".join(lines)


if __name__ == "__main__":
    PAGE.write_text(page(PAGE.read_text("utf-8"), section(RESULTS)), "utf-8")
