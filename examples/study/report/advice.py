"""Should I use it? Three rows, for README and the head of docs/evidence.md."""

from __future__ import annotations

from ..estimates import Estimate
from ..findings import SKILL, SKILL_LOSS, Findings
from ..lineage import FINE_TUNED
from .markdown import judged, table

OTHER_START = "other-start"
NATS = "loss on the skill's answers, nats per character (lower is better)"
BARRIER = "rise of the loss on the way to the average, nats (lower is better)"


def rows(main: Findings, page: str = "") -> str:
    """A row for each kind of model: whether to align, and the difference between aligned and plain merge.

    Args:
        main: the results of parts 1 to 3.
        page: where everything stands, if not here.
    """
    tuned = main.difference("merge", FINE_TUNED, "weights", SKILL_LOSS)
    rewritten = main.difference("foreign", "all-three", "weights", SKILL_LOSS)
    head = ("your models", "align them?", "what was measured", "aligned − plain")
    fine_tunes = ("ordinary fine-tunes of one base", _advice(tuned), NATS, judged(tuned, -1, 3))
    tools = "models that a tool has rewritten: rotated (Hadamard), neurons sorted, heads reordered"
    foreign = (tools, _advice(rewritten), NATS, judged(rewritten, -1, 2))
    return table(head, [fine_tunes, foreign, *_other_start(main, page)], text=3)


def _advice(difference: Estimate) -> str:
    return "**Yes.**" if difference.verdict(-1) == "better" else "**No benefit.** Use a plain merge."


def _other_start(main: Findings, page: str) -> list[tuple[str, ...]]:
    """Models from different initialisations, where they were measured."""
    if not main.has("merge", OTHER_START, "weights"):
        return []
    barrier = main.barrier_difference(OTHER_START, "weights")
    said = "**Yes.**" if barrier.verdict(-1) == "better" else "**Not by itself.**"
    where = f"{said} See [the drift sweep]({page}#2-by-how-the-target-drifted)."
    return [("models from different initialisations", where, BARRIER, judged(barrier, -1, 2))]


def reading(main: Findings, page: str = "") -> str:
    """How to read the table; ``page`` is where everything stands, if not here."""
    plain, aligned = (main.estimate("merge", FINE_TUNED, variant, SKILL).text() for variant in ("plain", "weights"))
    seeds = main.difference("merge", FINE_TUNED, "weights", SKILL_LOSS).n
    more = f" Everything that was measured: [{page}]({page})." if page else ""
    return f"""\
Means ± standard errors of {seeds} seeds, on small Llama models trained for the purpose. Of the skill's problems, the
plain merge of ordinary fine-tunes solves {plain} %, the aligned one {aligned} % (higher is better).{more}"""
