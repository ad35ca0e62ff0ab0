"""What the papers say, and what this study can say to it."""

from __future__ import annotations

from ..estimates import Estimate
from ..findings import ALONE, DEVIATION, OWN, SKILL, SKILL_LOSS, Findings
from ..lineage import FINE_TUNED
from .drift import changes, exact_variants, measured
from .markdown import DRIFT_TITLES, judged, paragraphs, table

ANSWERS = {"better": "confirmed here", "worse": "contradicted here"}
HOROI, ZHANG = "Horoi et al.", "Zhang et al."
Claim = tuple[str, str, str, str]  # paper, claim, answer, numbers


def section(findings: Findings, others: list[Claim]) -> str:
    rows = [*_transfer_claims(findings), _more_drift(findings), _full_rotation(findings), *_kinds(findings)]
    rows += [_average(findings), *others]
    return paragraphs("## The papers' claims", _count(rows), table_of(rows))


def _count(rows: list[Claim]) -> str:
    answers = ("confirmed here", "in part", "contradicted here")
    confirmed, partly, contradicted = (sum(row[2] == answer for row in rows) for answer in answers)
    return f"""\
At this scale {confirmed} of {len(rows)} claims are confirmed, {partly} in part, and {contradicted} are contradicted.
The others could not be confirmed. Each number is aligned minus plain, with its standard error."""


def table_of(rows: list[Claim]) -> str:
    return table(("claim", "paper", "at this scale", "numbers"), [(c, p, a, n) for p, c, a, n in rows], text=4)


def answer(difference: Estimate, favourable: int) -> str:
    return ANSWERS.get(difference.verdict(favourable), f"not confirmed ({difference.verdict(favourable)})")


def _transfer_claims(findings: Findings) -> list[Claim]:
    rows = []
    for variant in ("weights", "activations"):
        before = f"aligning the target ({variant}) before the skill vector is added"
        if variant not in exact_variants(findings):
            rows.append((HOROI, f"{before} helps", "not tested", "not in this run"))
            continue
        own = findings.difference("merge", FINE_TUNED, variant, OWN)
        rows.append((HOROI, f"{before} raises the skill", *_skill(findings, variant)))
        rows.append(
            (HOROI, f"{before} keeps more of its own abilities", answer(own, 1), judged(own, 1, unit=" points"))
        )
    return rows


def _skill(findings: Findings, variant: str) -> tuple[str, str]:
    """The answer by the loss on the skill's answers, which tells more than exact match where few are right."""
    share, loss = (findings.difference("merge", FINE_TUNED, variant, metric) for metric in (SKILL, SKILL_LOSS))
    return answer(loss, -1), f"{judged(loss, -1, 2, ' nats/character')}; {judged(share, 1, unit=' points')}"


def _more_drift(findings: Findings) -> Claim:
    shown = [
        f"{what} at {DRIFT_TITLES[arm]}, {variant}: {d.text(2, signed=True)} ({verdict})"
        for variant in exact_variants(findings)
        for what, arm, d, verdict in changes(findings, measured(findings), variant)
    ]
    better = any("(better)" in entry for entry in shown)
    return (
        HOROI,
        "alignment pays where target and reference have drifted apart",
        "in part" if better else "not confirmed",
        "; ".join(shown) or "no difference shown at any drift",
    )


def _full_rotation(findings: Findings) -> Claim:
    change = findings.difference("merge", FINE_TUNED, "full", ALONE)
    moved = findings.estimate("merge", FINE_TUNED, "full", DEVIATION)
    return (
        f"{HOROI}; {ZHANG}",
        "one orthogonal matrix for query and key keeps the function (here: under RoPE)",
        "contradicted here" if change.verdict(1) == "worse" or moved.mean > 0.1 else "not contradicted here",
        f"largest logit moved by {moved.text()} standard deviations; the target's own tasks, alone: "
        f"{judged(change, 1, unit=' points')}",
    )


def _kinds(findings: Findings) -> list[Claim]:
    rows = []
    for kind in ("rotation", "scale", "permutation"):
        rows.append((HOROI, f"{kind} alone raises the skill", *_skill(findings, kind)))
    if findings.has("distance"):
        gaps = {
            arm: findings.difference("distance", arm, "rotation", lambda row: row["total_distance"], "permutation")
            for arm in measured(findings)
        }
        said = "; ".join(
            f"{DRIFT_TITLES[arm]} {gap.text(3, signed=True)} ({gap.verdict(-1)})" for arm, gap in gaps.items()
        )
        verdicts = {gap.verdict(-1) for gap in gaps.values()}
        held = "confirmed here" if verdicts == {"better"} else "in part" if "better" in verdicts else "not confirmed"
        rows.append((ZHANG, "rotation lowers the distance more than permutation", held, said))
    return rows


def _average(findings: Findings) -> Claim:
    shown = {arm: findings.barrier_difference(arm, "weights") for arm in measured(findings)}
    verdicts = [difference.verdict(-1) for difference in shown.values()]
    held = "confirmed here" if set(verdicts) == {"better"} else "in part" if "better" in verdicts else "not confirmed"
    return (ZHANG, "matching lowers the loss of an average (barrier, nats, small Llama models)", held, _by_drift(shown))


def _by_drift(differences: dict[str, Estimate]) -> str:
    """One difference for each drift; less is better."""
    return "; ".join(
        f"{DRIFT_TITLES[arm]} {d.text(3, signed=True)} ({d.verdict(-1)})" for arm, d in differences.items()
    )
