"""Section 3: coordinates that tools leave behind."""

from __future__ import annotations

from ..findings import DEVIATION, OWN, SKILL, Findings
from .markdown import judged, paragraphs, table

TITLES = {
    "hadamard": "value/output turned by a Hadamard matrix per head",
    "sorted-neurons": "neurons sorted by importance",
    "reordered-heads": "heads reordered",
    "all-three": "all three",
    "scaled-channels": "up/down channels rescaled (aligned with `neuron_scaling: true`)",
    "layout-round-trip": "Q/K to the interleaved layout and back",
    "layout-left": "Q/K left in the interleaved layout (another function)",
}


def aligned_variant(arm: str) -> str:
    return "neuron-scaling" if arm == "scaled-channels" else "weights"


def section(findings: Findings) -> str:
    arms = findings.arms("foreign")
    return paragraphs(
        "## 3 Foreign coordinates",
        _verdict(findings, arms),
        "The target of section 1 as tools leave it behind, merged as there. *Changed by*: largest deviation of its logits, in "
        "standard deviations. The undisturbed target, merged plainly, is section 1's merge without alignment: "
        f"skill {findings.estimate('merge', 'branch-100', 'plain', SKILL).text()} %, own tasks "
        f"{findings.estimate('merge', 'branch-100', 'plain', OWN).text()} %.",
        _table(findings, arms),
        "![Plain and aligned merges from foreign coordinates](figures/foreign.png)",
    )


def _verdict(findings: Findings, arms: list[str]) -> str:
    verdicts: dict[str, list[str]] = {}
    for arm in arms:
        own = findings.difference("foreign", arm, aligned_variant(arm), OWN)
        verdicts.setdefault(own.verdict(1), []).append(TITLES[arm])
    parts = [f"{verdict} for {'; '.join(names)}" for verdict, names in verdicts.items()]
    return f"The target's own tasks after an aligned merge, against a plain one: **{'.** **'.join(parts)}**."


def _table(findings: Findings, arms: list[str]) -> str:
    head = (
        "coordinates",
        "changed by",
        "skill, plain, %",
        "skill, aligned, %",
        "own tasks, plain, %",
        "own tasks, aligned, %",
    )
    rows = []
    for arm in arms:
        aligned = aligned_variant(arm)
        cells = [f"{findings.estimate('foreign', arm, 'plain', DEVIATION).mean:.0e}"]
        for metric in (SKILL, OWN):
            cells += [findings.estimate("foreign", arm, variant, metric).text() for variant in ("plain", aligned)]
        rows.append((TITLES[arm], *cells, judged(findings.difference("foreign", arm, aligned, SKILL), 1)))
    return table((*head, "skill, aligned − plain, points"), rows)
