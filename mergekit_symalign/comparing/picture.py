"""A picture of a comparison: a row each, or a line over the values that were tried."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mergekit_symalign.comparing.rows import Column, Row, rank, worse_by
from mergekit_symalign.whole_file import written_whole


def draw(rows: Sequence[Row], columns: Sequence[Column], path: Path) -> None:
    """One panel for each column; told apart without colours.

    Error bars are 95 % intervals of the difference to the column's best merge, which has none.
    """
    from matplotlib.figure import Figure

    over = tried(rows)
    height = 2.8 if over else 0.9 + 0.25 * len(rows)
    figure = Figure(figsize=(6.5, height * len(columns)), layout="constrained")
    for axes, column in zip(figure.subplots(len(columns), 1, squeeze=False)[:, 0], columns, strict=True):
        (_line if over else _dots)(axes, rows, column)
        axes.set_title(column.name, fontsize=10, parse_math=False)
        axes.grid(alpha=0.3)
    with written_whole(path) as scratch:
        figure.savefig(scratch, dpi=150)


def tried(rows: Sequence[Row]) -> str | None:
    """The one place of the config that was given several numbers, where there is just one."""
    merges = [row for row in rows if row.is_merge]
    places = {place for row in merges for place in row.values}
    if len(places) != 1 or len(merges) < 2:
        return None
    (place,) = places
    found = [row.values.get(place) for row in merges]
    is_number = all(isinstance(x, (int, float)) and not isinstance(x, bool) for x in found)
    return place if is_number and len(set(found)) == len(found) else None


def _points(rows: Sequence[Row], column: Column) -> list[tuple[Row, float, float]]:
    """Each row that was measured, its number, and the error of its difference to the best merge."""
    best, found = rank(rows, column).best, []
    for row in rows:
        if (number := row.number(column)) is not None:
            within = 0.0 if best is None or row is best else worse_by(row, best, column).within
            found.append((row, number, within if within < float("inf") else 0.0))
    return found


def _dots(axes: Any, rows: Sequence[Row], column: Column) -> None:
    points = _points(rows, column)
    for at, (row, number, within) in enumerate(points):
        axes.errorbar(number, at, xerr=within, fmt="o" if row.is_merge else "s", color=_shade(row), capsize=3)
    axes.set_yticks(range(len(points)), [row.label for row, *_ in points], fontsize=8, parse_math=False)
    axes.invert_yaxis()
    axes.set_xlabel(column.unit, parse_math=False)


def _line(axes: Any, rows: Sequence[Row], column: Column) -> None:
    place, points = tried(rows) or "", _points(rows, column)
    merges = sorted((row.values[place], number, within) for row, number, within in points if row.is_merge)
    if merges:
        x, y, errors = zip(*merges, strict=True)
        axes.errorbar(x, y, yerr=errors, fmt="o-", color="black", capsize=3, label="merges")
    dashes = ("--", ":", "-.", (0, (1, 4)))
    for i, (row, number, _) in enumerate(p for p in points if not p[0].is_merge):
        axes.axhline(number, color="0.5", linestyle=dashes[i % len(dashes)], label=_literal(row.label))
    axes.set_xlabel(place, parse_math=False)
    axes.set_ylabel(column.unit, parse_math=False)
    axes.legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1.0, 0.5))


def _shade(row: Row) -> str:
    return "black" if row.is_merge else "0.5"


def _literal(name: str) -> str:
    """A name that a legend does not take for mathematics, nor for one that it should leave out."""
    return name.replace("$", r"\$").lstrip("_") or "model"
