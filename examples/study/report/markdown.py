"""Markdown tables, and the few words that verdicts are put into."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable, Sequence

from ..estimates import ONE_SEED, Estimate

WIDTH = 128
VERBATIM = ("#", "|", "!", "<")  # headings, tables, pictures, comments
VARIANT_TITLES = {
    "plain": "no alignment",
    "weights": "alignment from weights",
    "activations": "alignment from activations",
    "rotation": "rotation only",
    "scale": "scale only",
    "permutation": "permutation only (neurons and heads)",
    "full": "`rotation: full` (inexact)",
    "neuron-scaling": "alignment from weights, `neuron_scaling: true`",
}
DRIFT_TITLES = {
    "other-start": "another initialisation",
    "branch-0": "branch at 0 %",
    "branch-1": "branch at 1 %",
    "branch-5": "branch at 5 %",
    "branch-25": "branch at 25 %",
    "branch-75": "branch at 75 %",
    "hot": "100 %, hotter",
    "long": "100 %, longer",
    "branch-100": "branch at 100 %",
}


def table(head: Sequence[str], rows: Iterable[Sequence[str]], *, text: int = 1) -> str:
    """A table whose first ``text`` columns are text and whose others are numbers."""
    marks = ["---"] * text + ["---:"] * (len(head) - text)
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (head, marks, *rows))


def listing(names: Sequence[str]) -> str:
    """Names in a sentence."""
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"


def in_order(arms: Iterable[str]) -> list[str]:
    """Drifts from the least to the most that is shared, in whatever order they were measured."""
    return sorted(arms, key=list(DRIFT_TITLES).index)


def judged(difference: Estimate, favourable: int, digits: int = 1, unit: str = "") -> str:
    """A difference with what it may be called: ``+1.5 ± 0.3 points: better``."""
    return f"{difference.text(digits, signed=True)}{unit}: {difference.verdict(favourable)}"


def opening(verdicts: Iterable[str]) -> str:
    """The first words of a section, in bold: what a user wants to know before the numbers."""
    given = set(verdicts)
    if given == {ONE_SEED}:
        return "**One seed only: a first look.**"
    shown = given & {"better", "worse"}
    if len(shown) == 2:
        return "**Better in some cases, worse in others.**"
    return f"**{shown.pop().capitalize() if shown else 'No difference'}.**"


def paragraphs(*parts: str) -> str:
    """Parts of a page with blank lines between them, prose filled to one width."""
    blocks = (block.strip() for part in parts for block in part.split("\n\n"))
    return "\n\n".join(block if block.startswith(VERBATIM) else _filled(block) for block in blocks if block)


def _filled(prose: str) -> str:
    return textwrap.fill(" ".join(prose.split()), WIDTH, break_long_words=False, break_on_hyphens=False)
