"""Should I use it? A row for each kind of model, for README and the head of docs/evidence.md."""

from __future__ import annotations

from ..estimates import Estimate
from ..findings import SKILL, SKILL_LOSS, Findings
from ..lineage import FINE_TUNED
from . import apart
from .markdown import judged, table

OTHER_START = "other-start"
NATS = "loss on the skill's answers, nats per character (lower is better)"
BARRIER = "rise of the loss on the way to the average, nats (lower is better)"


def rows(main: Findings, streams: Findings | None, page: str = "") -> str:
    """A row for each kind of model: whether to align, and the difference between aligned and plain merge.

    Args:
        main: the results of parts 1 to 3.
        streams: those of part 9, if it was measured.
        page: where everything stands, if not here.
    """
    tuned = main.difference("merge", FINE_TUNED, "weights", SKILL_LOSS)
    rewritten = main.difference("foreign", "all-three", "weights", SKILL_LOSS)
    head = ("your models", "align them?", "what was measured", "aligned − plain")
    fine_tunes = ("ordinary fine-tunes of one base", _advice(tuned), NATS, judged(tuned, -1, 3))
    tools = "models that a tool has rewritten: rotated (Hadamard), neurons sorted, heads reordered"
    foreign = (tools, _advice(rewritten), NATS, judged(rewritten, -1, 2))
    return table(head, [fine_tunes, foreign, *_other_start(main, page), *_streams(streams, page)], text=3)


def _advice(difference: Estimate) -> str:
    return "**Yes.**" if difference.verdict(-1) == "better" else "**No benefit.** Use a plain merge."


def _other_start(main: Findings, page: str) -> list[tuple[str, ...]]:
    """Models from different initialisations, where they were measured."""
    if not main.has("merge", OTHER_START, "weights"):
        return []
    barrier = main.barrier_difference(OTHER_START, "weights")
    said = "**Yes.**" if barrier.verdict(-1) == "better" else "**Not by itself.**"
    where = f"{said} See [the drift sweep]({page}#2-by-how-the-target-drifted)."
    return [("models from different initialisations, block by block", where, BARRIER, judged(barrier, -1, 2))]


def _streams(findings: Findings | None, page: str) -> list[tuple[str, ...]]:
    """The same with their residual streams aligned, on the shape that was measured first."""
    if findings is None:
        return []
    rows = []
    for arm, name in (("rotation", "with `residual: rotation`"), (apart.LEARNED, "with `mergekit-symalign learn`")):
        if findings.has("gpt2", arm):
            gain = apart.gain(findings, "gpt2", arm)
            said = "**Yes,** if you need them merged." if gain.verdict(-1) == "better" else "**No.**"
            where = f"{said} See [section 9]({page}#9-models-without-a-common-base)."
            rows.append((f"the same, {name} (GPT-2 shape)", where, BARRIER, judged(gain, -1, 2)))
    return rows


def reading(main: Findings, streams: Findings | None, page: str = "") -> str:
    """How to read the table; arguments as for `rows`."""
    plain, aligned = (main.estimate("merge", FINE_TUNED, variant, SKILL).text() for variant in ("plain", "weights"))
    seeds = main.difference("merge", FINE_TUNED, "weights", SKILL_LOSS).n
    more = f" Everything that was measured: [{page}]({page})." if page else ""
    return f"""\
Means ± standard errors of {seeds} seeds, on small Llama models trained for the purpose. Of the skill's problems, the
plain merge of ordinary fine-tunes solves {plain} %, the aligned one {aligned} % (higher is better).\
{_pairs(streams)}{more}"""


def _pairs(findings: Findings | None) -> str:
    """What the rows of part 9 are about."""
    if findings is None or not _streams(findings, ""):
        return ""
    barrier = findings.estimate("gpt2", apart.NONE, "-", apart.BARRIER).text(2)
    return f" GPT-2 shape: pairs of three small models, between which the loss rises by {barrier} without alignment."
