"""Section 3: coordinates that tools leave behind."""

from __future__ import annotations

from ..findings import DEVIATION, OWN, SKILL, SKILL_LOSS, Findings
from ..lineage import FINE_TUNED
from .markdown import judged, opening, paragraphs, table

TITLES = {
    "hadamard": "value/output turned by a Hadamard matrix per head",
    "sorted-neurons": "neurons sorted by importance",
    "reordered-heads": "heads reordered",
    "all-three": "all three",
    "scaled-channels": "up/down channels rescaled (aligned with `neuron_scaling: true`)",
    "layout-round-trip": "Q/K to the interleaved layout and back",
    "layout-left": "Q/K left in the interleaved layout (another function)",
}
WORDS = {
    "worse": "*Worse*",
    "no change": "*No difference*",
    "no difference shown": "*No difference shown*",
    "better": "*Better*",
}
OTHER_MERGE = ("scaled-channels", "layout-left")  # aligned with one more symmetry; another function


def aligned_variant(arm: str) -> str:
    return "neuron-scaling" if arm == "scaled-channels" else "weights"


def section(findings: Findings) -> str:
    arms = findings.arms("foreign")
    untouched = [findings.estimate("merge", FINE_TUNED, "plain", metric) for metric in (SKILL, OWN)]
    return paragraphs(
        "## 3 Foreign coordinates",
        _opening(findings),
        _verdict(findings, arms),
        f"""\
These are the targets of section 1 as tools leave them behind, merged as there. *Changed by* is the largest deviation of
their logits in any seed, in standard deviations. The target that no tool had touched, merged plainly, has
{untouched[0].text()} % of the skill and {untouched[1].text()} % of its own tasks (section 1). Own tasks say less here
than the skill does: a skill vector that amounts to noise does them little harm.""",
        _table(findings, arms),
        "![Plain and aligned merges from foreign coordinates](figures/foreign.png)",
    )


def _opening(findings: Findings) -> str:
    plain, aligned = (findings.estimate("foreign", "all-three", v, SKILL_LOSS).text(2) for v in ("plain", "weights"))
    gain = findings.difference("foreign", "all-three", "weights", SKILL_LOSS)
    untouched = findings.estimate("merge", FINE_TUNED, "plain", SKILL_LOSS).text(2)
    return f"""\
{opening([gain.verdict(-1)])} Here a tool has rewritten the target without changing what it computes. With all three
changes at once, the loss on the skill's answers is {plain} nats per character after a plain merge (lower is better).
After an aligned merge it is {aligned}, and {untouched} where no tool had been."""


def _verdict(findings: Findings, arms: list[str]) -> str:
    verdicts: dict[str, list[str]] = {"worse": [], "no change": [], "no difference shown": [], "better": []}
    for arm in arms:
        gain = findings.difference("foreign", arm, aligned_variant(arm), SKILL_LOSS)
        verdicts[gain.verdict(-1)].append(TITLES[arm])
    gap = _largest_gap(findings, arms)
    said = [f"{WORDS[verdict]}: {'; '.join(names)}." for verdict, names in verdicts.items() if names]
    same = f"to {gap:.1e} nats/character in every seed" if gap else "in every seed, to six digits"
    return f"""\
By the loss on the skill's answers, aligned against plain. {" ".join(said)} Wherever the tool has kept the function, the
aligned merge has the loss of the merge that no tool had touched: {same}. Rescaled channels are aside: they are aligned
by one more symmetry."""


def _largest_gap(findings: Findings, arms: list[str]) -> float:
    """Between aligned merges from foreign coordinates and the aligned merge of the untouched target, of all seeds."""
    untouched = findings.per_seed("merge", FINE_TUNED, "weights", SKILL_LOSS)
    kept = [arm for arm in arms if arm not in OTHER_MERGE]
    losses = [findings.per_seed("foreign", arm, "weights", SKILL_LOSS) for arm in kept]
    return max(abs(loss - untouched[seed]) for found in losses for seed, loss in found.items())


def _table(findings: Findings, arms: list[str]) -> str:
    head = ["coordinates", "changed by"]
    head += [f"{what}, {how}, %" for what in ("skill", "own tasks") for how in ("plain", "aligned")]
    rows = []
    for arm in arms:
        aligned = aligned_variant(arm)
        changed = max(findings.per_seed("foreign", arm, "plain", DEVIATION).values())
        cells = [f"{changed:.1e}"]
        for metric in (SKILL, OWN):
            cells += [findings.estimate("foreign", arm, variant, metric).text() for variant in ("plain", aligned)]
        cells += [judged(findings.difference("foreign", arm, aligned, SKILL), 1)]
        rows.append((TITLES[arm], *cells, judged(findings.difference("foreign", arm, aligned, SKILL_LOSS), -1, 2)))
    return table((*head, "skill, aligned − plain, points", "skill, aligned − plain, nats/character"), rows)
