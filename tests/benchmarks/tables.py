"""The tables of docs/performance.md, a line at a time, from what the benchmarks found."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from statistics import median
from typing import Any

GIB = 1 << 30

_NAMES: dict[str, list[str]] = {
    "whole": ["models", "wall, s", "ratio", "CPU, s", "ratio", "peak RSS, GiB", "ratio", "settled by"],
    "depth": ["", "plain, anonymous MiB", "aligned", "more than plain", "plain, RSS MiB", "aligned"],
    "growth": ["", "plain, wall s", "added, wall s", "added, CPU s", "added, CPU s per layer and model"],
    "layers": ["shape", "model", "MLP, s", "attention, s"],
}
_WORDS = {"", "shape", "model", "models", "settled by"}  # columns without numbers


def _head(names: list[str]) -> str:
    return f"| {' | '.join(names)} |\n|{'|'.join('---' if name in _WORDS else '---:' for name in names)}|"


HEADS = {kind: _head(names) for kind, names in _NAMES.items()}


def cells(kind: str, line: Mapping[str, Any]) -> str:
    """A line of a table."""
    return f"| {' | '.join(_CELLS[kind](line))} |"


def routes(total: Mapping[str, int]) -> str:
    """Shares of the neurons by route, and blocks by the route of their heads."""
    neurons = sum(count for name, count in total.items() if name.startswith("neurons_"))
    parts = []
    for name, count in sorted(total.items(), reverse=True):
        if name.startswith("neurons_"):
            parts.append(f"{name.removeprefix('neurons_').replace('_', ' ')} {count / neurons:.1%}")
        else:
            parts.append(f"{name.replace('_', ' ')} {count}")
    return ", ".join(parts)


def _whole(line: Mapping[str, Any]) -> list[str]:
    def both(field: str, unit: float, digits: int) -> str:
        p, a = (median(cost[field] for cost in line[side]) / unit for side in ("plain", "aligned"))
        return f"{p:.{digits}f} → {a:.{digits}f}"

    ratios = {field: f"{line['ratio'][field]:.2f}" for field in ("wall", "cpu", "peak_rss")}
    times = (both("wall", 1, 1), ratios["wall"], both("cpu", 1, 1), ratios["cpu"])
    return [line["name"], *times, both("peak_rss", GIB, 2), ratios["peak_rss"], routes(line["settled_by"])]


def _depth(line: Mapping[str, Any]) -> list[str]:
    plain, aligned = line["plain_own"], line["aligned_own"]
    numbers = (plain, aligned, aligned - plain, line["plain_rss"], line["aligned_rss"])
    return [line["name"], *(f"{x:.0f}" for x in numbers)]


def _growth(line: Mapping[str, Any]) -> list[str]:
    numbers = [f"{line[field]:.1f}" for field in ("plain_wall", "wall", "cpu")]
    return [line["name"], *numbers, f"{line['cpu_of_a_layer']:.2f}"]


def _layer(line: Mapping[str, Any]) -> list[str]:
    return [line["shape"], line["model"], f"{line['mlp']:.2f}", f"{line['attention']:.2f}"]


_CELLS: Mapping[str, Callable[[Mapping[str, Any]], list[str]]] = {
    "whole": _whole,
    "depth": _depth,
    "growth": _growth,
    "layers": _layer,
}
