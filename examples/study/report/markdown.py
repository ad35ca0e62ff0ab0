"""Markdown tables, and the few words that verdicts are put into."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from ..estimates import Estimate

VARIANT_TITLES = {
    "plain": "no alignment",
    "weights": "alignment from weights",
    "activations": "alignment from activations",
    "rotation": "rotation only",
    "scale": "scale only",
    "permutation": "permutation only (neurons and heads)",
    "full": "`rotation: full`",
    "neuron-scaling": "alignment from weights, `neuron_scaling: true`",
}
DRIFT_TITLES = {
    "other-start": "another initialisation",
    "branch-0": "branch at 0 %",
    "branch-1": "branch at 1 %",
    "branch-5": "branch at 5 %",
    "branch-25": "branch at 25 %",
    "branch-100": "branch at 100 %",
    "long": "100 %, longer",
    "hot": "100 %, hotter",
}


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table whose first column is text and whose others are numbers."""
    marks = ["---", *["---:"] * (len(head) - 1)]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (head, marks, *rows))


def listing(names: Sequence[str]) -> str:
    """Names in a sentence."""
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"


def judged(difference: Estimate, favourable: int, digits: int = 1, unit: str = "") -> str:
    """A difference with what it may be called: ``+1.5 ± 0.3 points: better``."""
    return f"{difference.text(digits, signed=True)}{unit}: {difference.verdict(favourable)}"


def paragraphs(*parts: str) -> str:
    return "\n\n".join(part.strip() for part in parts if part.strip())
