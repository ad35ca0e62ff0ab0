"""The table of a comparison, what it says in sentences, and the same for programs."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

from mergekit_symalign.comparing.rows import Column, Ranking, Row, rank, worse_by
from mergekit_symalign.comparing.statistics import Difference

_LOSS = "nats/token"


def loss_column(name: str, tokens: Sequence[int]) -> Column:
    return Column(name, _LOSS, tuple(tokens))


def table(rows: Sequence[Row], columns: Sequence[Column]) -> list[str]:
    """One line a row; models first, then merges."""
    rankings = [rank(rows, column) for column in columns]
    costs = (("merge", "peak"), ("s", "MiB")) if any(row.seconds is not None for row in rows) else ((), ())
    shown = [[row.label, *_cells(row, rankings), *_cost(row)[: len(costs[0])]] for row in rows]
    head = [
        ["", *(column.name for column in columns), *costs[0]],
        ["", *(column.unit for column in columns), *costs[1]],
    ]
    widths = [max(map(len, cells)) for cells in zip(*head, *shown, strict=True)]
    lines = [_line(cells, widths) for cells in (*head, *shown)]
    return [*lines, *_legend(columns)]


def _line(cells: Sequence[str], widths: Sequence[int]) -> str:
    first, *others = cells
    padded = [first.ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(others, widths[1:], strict=True))]
    return "  ".join(padded).rstrip()


def _cells(row: Row, rankings: Sequence[Ranking]) -> Iterator[str]:
    """The number, a star where it is the best, and else the error of its difference to the best merge."""
    for ranking in rankings:
        number = row.number(ranking.column)
        if number is None:
            yield "failed" if row.failed else ""
            continue
        mark, error = " ", ""
        if row is ranking.best:
            mark = "*" if ranking.is_decided else " "
        elif ranking.best is not None:
            within = worse_by(row, ranking.best, ranking.column).within
            error = "±?" if math.isinf(within) else f"±{within:.4f}"
        yield f"{number:.4f}{mark}{error:7}"


def _cost(row: Row) -> list[str]:
    return ["" if x is None else f"{x:.0f}" for x in (row.seconds, row.peak_mib)]


def _legend(columns: Sequence[Column]) -> Iterator[str]:
    if any(column.tokens is not None for column in columns):
        yield "Loss: lower is better."
    yield "±: 95 % interval of the difference to the column's best merge."
    yield "*: better than every other merge by more than that."


def sentences(rows: Sequence[Row], columns: Sequence[Column]) -> list[str]:
    """What the table shows and what it does not, in words."""
    found = [line for column in columns for line in _said(rank(rows, column))]
    return [*found, *(f"{row.label}: {row.failed}" for row in rows if row.failed)]


def _said(ranking: Ranking) -> Iterator[str]:
    column, best = ranking.column, ranking.best
    if best is None:
        return
    if ranking.is_decided:
        second, difference = ranking.behind[0]
        yield f"{column.name}: {best.label} is better than {second.label} by {_by(difference, column)}"
    elif len(ranking.level) == len(ranking.behind) > 0:
        yield f"{column.name}: no difference larger than its error between the merges{_alone(column)}"
    elif ranking.level:
        names = ", ".join(row.label for row in ranking.level)
        yield f"{column.name}: no difference larger than its error between {best.label} and {names}{_alone(column)}"
    if ranking.parent is not None and ranking.behind_parent is not None:
        yield f"{column.name}: {_against(best, ranking.parent, ranking.behind_parent, column)}"


def _against(best: Row, parent: Row, behind: Difference, column: Column) -> str:
    """Of the best merge and the best of the models."""
    if not behind.is_shown:
        return f"no difference larger than its error between {best.label} and the best model, {parent.label}"
    word = "worse" if behind.value > 0 else "better"
    return f"{best.label} is {word} than the best model, {parent.label}, by {_by(behind, column)}"


def _by(difference: Difference, column: Column) -> str:
    return f"{abs(difference.value):.4f} ± {difference.within:.4f} {column.unit}"


def _alone(column: Column) -> str:
    """One document tells nothing of the error."""
    return " (it has one document, so there is no error)" if column.tokens and len(column.tokens) == 1 else ""


def numbers(rows: Sequence[Row], columns: Sequence[Column]) -> dict[str, Any]:
    """All of it for programs."""
    return {
        "columns": [
            {
                "name": column.name,
                "unit": column.unit,
                "higher_is_better": column.higher_is_better,
                **({} if column.tokens is None else {"documents": len(column.tokens), "tokens": sum(column.tokens)}),
            }
            for column in columns
        ],
        "rows": [_row(row, [rank(rows, column) for column in columns]) for row in rows],
        "sentences": sentences(rows, columns),
    }


def _row(row: Row, rankings: Sequence[Ranking]) -> dict[str, Any]:
    measured: dict[str, Any] = {}
    for ranking in rankings:
        column, best = ranking.column, ranking.best
        if (number := row.number(column)) is None:
            continue
        told: dict[str, Any] = {"value": number, "best": row is best and ranking.is_decided}
        if column.tokens is None:
            told["standard_error"] = row.scores[column.name][1]
        if best is not None and row is not best:
            told["worse_than_best"] = _numbers(worse_by(row, best, column))
        measured[column.name] = told
    return {
        "label": row.label,
        "kind": "merge" if row.is_merge else "model",
        "set": dict(row.values),
        "measured": measured,
        "seconds": row.seconds,
        "peak_mib": row.peak_mib,
        "failed": row.failed,
    }


def _numbers(difference: Difference) -> dict[str, float | None]:
    known = math.isfinite(difference.within)
    within = difference.within if known else None
    return {"value": difference.value, "standard_error": difference.error, "within_95": within}
