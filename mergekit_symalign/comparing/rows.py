"""What is compared: models and merges in rows, files and tasks in columns; which differences are more than noise."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from mergekit_symalign.comparing.statistics import Difference, mean_loss, paired, unpaired


@dataclass(frozen=True)
class Column:
    """A file or a task.

    Attributes:
        name: in the table.
        unit: of its numbers.
        tokens: of each document, for a file; None for a task.
        higher_is_better: false for a loss.
    """

    name: str
    unit: str
    tokens: tuple[int, ...] | None = None
    higher_is_better: bool = False


@dataclass(frozen=True)
class Row:
    """A model, and what was found.

    Attributes:
        label: its name.
        is_merge: or one of the models that the merges are of.
        nats: of each document, by column.
        scores: of tasks with their standard errors, by column.
        seconds, peak_mib: of its merge.
        values: what ``--set`` gave it, by path.
        failed: why it could not be merged or measured.
    """

    label: str
    is_merge: bool
    nats: Mapping[str, Sequence[float]] = field(default_factory=dict)
    scores: Mapping[str, tuple[float, float | None]] = field(default_factory=dict)
    seconds: float | None = None
    peak_mib: float | None = None
    values: Mapping[str, object] = field(default_factory=dict)
    failed: str | None = None

    def number(self, column: Column) -> float | None:
        """What stands in a column; None if it was not measured."""
        if column.tokens is None:
            return self.scores[column.name][0] if column.name in self.scores else None
        return mean_loss(self.nats[column.name], column.tokens) if column.name in self.nats else None

    def badness(self, column: Column) -> float | None:
        """The same, turned so that lower is better."""
        found = self.number(column)
        return found if found is None or not column.higher_is_better else -found


def worse_by(row: Row, other: Row, column: Column) -> Difference:
    """How much worse a row is than another one, in the units of the column."""
    if column.tokens is None:
        found = unpaired(row.scores[column.name], other.scores[column.name])
    else:
        found = paired(row.nats[column.name], other.nats[column.name], column.tokens)
    return -found if column.higher_is_better else found


@dataclass(frozen=True)
class Ranking:
    """What a column says.

    Attributes:
        column: of the table.
        best: its best merge; None if none was measured.
        behind: the other merges, the best of them first, with how much worse each is.
        parent: the best of the models that the merges are of, if there is one.
        behind_parent: how much worse than it the best merge is.
    """

    column: Column
    best: Row | None
    behind: tuple[tuple[Row, Difference], ...]
    parent: Row | None
    behind_parent: Difference | None

    @property
    def level(self) -> list[Row]:
        """Merges that are not shown to be worse than the best."""
        return [row for row, difference in self.behind if not difference.is_shown]

    @property
    def is_decided(self) -> bool:
        """Whether the best is better than every other merge by more than the error."""
        return bool(self.behind) and not self.level


def rank(rows: Sequence[Row], column: Column) -> Ranking:
    """Who is best in a column, and whether that is more than noise."""
    measured = sorted(
        ((bad, i) for i, row in enumerate(rows) if (bad := row.badness(column)) is not None), key=lambda x: x
    )
    merges = [rows[i] for _, i in measured if rows[i].is_merge]
    parent = next((rows[i] for _, i in measured if not rows[i].is_merge), None)
    if not merges:
        return Ranking(column, None, (), parent, None)
    best, *others = merges
    behind = tuple((row, worse_by(row, best, column)) for row in others)
    return Ranking(column, best, behind, parent, None if parent is None else worse_by(best, parent, column))


def best_overall(rows: Sequence[Row], columns: Sequence[Column]) -> Row | None:
    """The merge with the least mean of losses over the files; without files, the highest mean of scores."""
    files = [column for column in columns if column.tokens is not None]
    asked = files or list(columns)

    def mean(row: Row) -> float | None:
        found = [row.badness(column) for column in asked]
        return None if any(x is None for x in found) else sum(x for x in found if x is not None) / len(found)

    means = [(bad, i) for i, row in enumerate(rows) if row.is_merge and (bad := mean(row)) is not None]
    return rows[min(means)[1]] if means else None
