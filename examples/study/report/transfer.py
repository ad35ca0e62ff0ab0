"""Section 1: skill transfer after plain fine-tuning."""

from __future__ import annotations

from ..findings import ALONE, COMPLEMENT, DEVIATION, LOG_LOSS, OWN, SKILL, SKILL_LOSS, Findings
from ..lineage import FINE_TUNED as ARM
from .markdown import VARIANT_TITLES, headline, judged, paragraphs, table


def tried(findings: Findings, arm: str = ARM) -> list[str]:
    """The aligned variants of an arm that were measured, in the order of the titles."""
    return [v for v in VARIANT_TITLES if v != "plain" and findings.has("merge", arm, v)]


def section(findings: Findings) -> str:
    return paragraphs(
        "## 1 Skill transfer",
        _verdict(findings),
        """\
Base → reference and target by separate fine-tuning; reference → reasoner by training on the skill (two steps in a
row, the first one written down). Each merge is target + (reasoner − reference), both with weight 1, in the
coordinates of the reference. *Own tasks*: mean exact match on the three tasks of the base and the target's own;
*ship's log*: text of the target's style.""",
        _abilities(findings),
        "![Skill and own tasks of the merges](figures/transfer.png)",
        "Differences to the merge without alignment, seed by seed:",
        _differences(findings),
        _function(findings),
    )


def _verdict(findings: Findings) -> str:
    parts = []
    for variant in ("weights", "activations", "full"):
        if not findings.has("merge", ARM, variant):
            continue
        skill, loss, own = (findings.difference("merge", ARM, variant, m) for m in (SKILL, SKILL_LOSS, OWN))
        said = {"the skill": (skill, 1), "the loss on its answers": (loss, -1), "the own tasks": (own, 1)}
        parts.append(
            f"{headline(VARIANT_TITLES[variant], said)}: skill {judged(skill, 1, 1, ' points')}, "
            f"{judged(loss, -1, 2, ' nats/character')}; own tasks {judged(own, 1, 1, ' points')}."
        )
    share = findings.symmetric_share("merge", ARM, "weights")
    parts.append(
        f"Exact alignment from weights removes {share.text(2)} % of the distance between target and reference."
    )
    return " ".join(parts)


def _abilities(findings: Findings) -> str:
    metrics = ((SKILL, 1), (SKILL_LOSS, 2), (OWN, 1), (COMPLEMENT, 1), (LOG_LOSS, 3))
    rows = [("alone", arm, "-", arm if arm != ARM else "target") for arm in ("base", "reference", ARM, "reasoner")]
    rows += [("merge", ARM, v, f"merged, {VARIANT_TITLES[v]}") for v in ("plain", *tried(findings))]
    return table(
        (
            "model",
            "skill, %",
            "skill, nats/character",
            "own tasks, %",
            "target's task, %",
            "ship's log, nats/character",
        ),
        [
            (title, *(findings.estimate(part, arm, variant, metric).text(digits) for metric, digits in metrics))
            for part, arm, variant, title in rows
        ],
    )


def _differences(findings: Findings) -> str:
    metrics = ((SKILL, 1, 1), (SKILL_LOSS, 2, -1), (OWN, 1, 1), (LOG_LOSS, 3, -1))
    return table(
        ("alignment", "skill, points", "skill, nats/character", "own tasks, points", "ship's log, nats/character"),
        [
            (
                VARIANT_TITLES[variant],
                *(
                    judged(findings.difference("merge", ARM, variant, metric), sign, digits)
                    for metric, digits, sign in metrics
                ),
            )
            for variant in tried(findings)
        ],
    )


def _function(findings: Findings) -> str:
    """What the aligned target alone still computes."""
    exact = max(findings.per_seed("merge", ARM, "weights", DEVIATION).values())
    full = findings.estimate("merge", ARM, "full", DEVIATION)
    before, after = (findings.estimate("merge", ARM, variant, ALONE) for variant in ("plain", "full"))
    return (
        f"The target itself, before anything is merged: exact alignment moves its logits by at most {exact:.1e} "
        "standard deviations in any seed (rounding); `rotation: full` moves them by "
        f"{full.text(1)}, and its own tasks go from {before.text()} % to {after.text()} %."
    )
