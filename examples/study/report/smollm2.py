"""Section 5: SmolLM2."""

from __future__ import annotations

from ..estimates import Estimate
from ..findings import Findings, Metric, percent, plain_number
from .claims import HOROI, ZHANG, Claim, answer
from .markdown import VARIANT_TITLES, headline, judged, paragraphs, table

FIXED = {"anchor": "SmolLM2-135M-Instruct", "skill": "skill (arithmetic, the demo's adapter)"}
TUNED = {"target": "target (ship's log)", "second": "second fine-tune (Python language reference)"}
MERGES = {"transfer": "target + (skill − SmolLM2)", "average": "average of target and second fine-tune"}
ARITHMETIC, LOG, REFERENCE = percent("arithmetic"), plain_number("log_loss"), plain_number("reference_loss")
HEAD = ("arithmetic, %", "ship's log, nats/token", "Python reference, nats/token")
DIGITS = (1, 4, 4)


def LOSS(row: dict[str, float]) -> float:  # noqa: N802
    """Mean of the losses on what the two averaged models were trained on."""
    return (LOG(row) + REFERENCE(row)) / 2


# What each merge is judged by: in words, the metric, the sign of an improvement, digits, unit.
JUDGED: dict[str, list[tuple[str, Metric, int, int, str]]] = {
    "transfer": [
        ("the skill", ARITHMETIC, 1, 1, " points"),
        ("the loss on the target's text", LOG, -1, 4, " nats/token"),
    ],
    "average": [("the loss of the average", LOSS, -1, 4, " nats/token")],
}


def tried(findings: Findings) -> list[str]:
    """The aligned variants that were measured with both merges for two seeds or more."""
    return [v for v in ("weights", "activations") if min(len(_seeds(findings, merge, v)) for merge in MERGES) > 1]


def finished(findings: Findings) -> bool:
    """Whether both merges were measured with and without alignment, with error bars."""
    return "weights" in tried(findings) and all(len(_seeds(findings, merge, "plain")) > 1 for merge in MERGES)


def section(findings: Findings) -> str:
    settings = findings.settings
    return paragraphs(
        "## 5 SmolLM2",
        _verdict(findings),
        f"""\
Two fine-tunes of all weights of SmolLM2-135M-Instruct: {settings["steps"]} steps with {settings["batch"]} sequences of
{settings["tokens"]} tokens, learning rate {settings["learning_rate"]:g}, {len(_seeds(findings, "transfer", "weights"))}
seeds (they decide which windows of text are read). That is short. SmolLM2 and the skill are the same for all seeds.
*Alignment and merge*: two runs of MergeKit, one rewrites the target in the other model's coordinates.""",
        _alone(findings),
        *(_merges(findings, merge) for merge in MERGES),
    )


def claims(findings: Findings) -> list[Claim]:
    rows = []
    for variant in tried(findings):
        for (what, metric, sign, digits, unit), paper in zip(
            (JUDGED["transfer"][0], JUDGED["average"][0]), (HOROI, ZHANG), strict=True
        ):
            merge = "transfer" if paper == HOROI else "average"
            difference = findings.difference("merge", merge, variant, metric)
            claim = f"aligning the target ({variant}) improves {what} (SmolLM2-135M)"
            rows.append((paper, claim, answer(difference, sign), judged(difference, sign, digits, unit)))
    return rows


def _verdict(findings: Findings) -> str:
    parts = []
    for merge, measures in JUDGED.items():
        for variant in tried(findings):
            differences = [(m, findings.difference("merge", merge, variant, m[1])) for m in measures]
            said = headline(
                f"{merge}: {VARIANT_TITLES[variant]}", {what: (d, sign) for (what, _, sign, _, _), d in differences}
            )
            numbers = "; ".join(judged(d, sign, digits, unit) for (_, _, sign, digits, unit), d in differences)
            share = findings.symmetric_share("merge", merge, variant)
            parts.append(f"{said} ({numbers}), and removes {share.text(3)} % of the distance.")
    return " ".join(parts)


def _seeds(findings: Findings, merge: str, variant: str) -> dict[int, float]:
    return findings.per_seed("merge", merge, variant, ARITHMETIC)


def _abilities(findings: Findings, part: str, arm: str, variant: str) -> list[str]:
    metrics = zip((ARITHMETIC, LOG, REFERENCE), DIGITS, strict=True)
    estimates = [(findings.estimate(part, arm, variant, metric), digits) for metric, digits in metrics]
    return [e.text(digits) if e.n > 1 else f"{e.mean:.{digits}f}" for e, digits in estimates]


def _alone(findings: Findings) -> str:
    return table(
        ("model", *HEAD), [(title, *_abilities(findings, "alone", arm, "-")) for arm, title in (FIXED | TUNED).items()]
    )


def _merges(findings: Findings, merge: str) -> str:
    rows = []
    for variant in ("plain", *tried(findings)):
        removed: Estimate = findings.symmetric_share("merge", merge, variant)
        moved = findings.estimate("merge", merge, variant, percent("moved_neurons"))
        seconds = findings.estimate("merge", merge, variant, plain_number("merge_seconds"))
        cells = (removed.text(3), moved.text(2), seconds.text(0))
        rows.append((VARIANT_TITLES[variant], *_abilities(findings, "merge", merge, variant), *cells))
    head = (MERGES[merge], *HEAD, "removed of the distance, %", "neurons moved, %", "alignment and merge, s")
    return table(head, rows)
