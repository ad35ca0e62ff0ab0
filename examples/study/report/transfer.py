"""Section 1: skill transfer after plain fine-tuning."""

from __future__ import annotations

from ..findings import ALONE, COMPLEMENT, DEVIATION, LOG_LOSS, OWN, SKILL, SKILL_LOSS, Findings
from ..lineage import FINE_TUNED as ARM
from .markdown import VARIANT_TITLES, judged, opening, paragraphs, table


def tried(findings: Findings, arm: str = ARM) -> list[str]:
    """The aligned variants of an arm that were measured, in the order of the titles."""
    return [v for v in VARIANT_TITLES if v != "plain" and findings.has("merge", arm, v)]


def section(findings: Findings) -> str:
    return paragraphs(
        "## 1 Skill transfer",
        _verdict(findings),
        "Differences to the merge without alignment, seed by seed:",
        _differences(findings),
        """\
Reference and target are separate fine-tunes of one base. The reasoner is the reference, trained on the skill: two
steps in a row, with the first one written down. Each merge is target + (reasoner − reference), both with weight 1, in
the coordinates of the reference. *Own tasks* is the mean exact match on the base's three tasks and the target's own.
*Ship's log* is text in the target's style.""",
        _abilities(findings),
        "![Skill and own tasks of the merges](figures/transfer.png)",
        _function(findings),
    )


def _verdict(findings: Findings) -> str:
    """What a user wants to know: does alignment from weights help ordinary fine-tunes of one base?"""
    skill, loss, own = (findings.difference("merge", ARM, "weights", m) for m in (SKILL, SKILL_LOSS, OWN))
    share = findings.symmetric_share("merge", ARM, "weights")
    verdicts = (skill.verdict(1), loss.verdict(-1), own.verdict(1))
    return f"""\
{opening(verdicts)} Here two models are ordinary fine-tunes of one base, and the skill of one goes to the other.
Alignment from weights changes the skill by {skill.text(signed=True)} points (higher is better). It changes the loss on
the skill's answers by {loss.text(2, signed=True)} nats per character (lower is better). It removes {share.text(2)} %
of the distance between target and reference, so there was little to align."""


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
