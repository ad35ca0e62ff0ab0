"""Section 9: skills that move between models of different initialisations."""

from __future__ import annotations

from collections.abc import Mapping

from ..apart_merges import NONE
from ..apart_skills import GRADFIX, SHARES, THESEUS
from ..estimates import Estimate
from ..findings import Findings, Metric, percent, plain_number
from .markdown import judged, paragraphs, table

ACCURACY, SKILL, KEPT = percent("skill_accuracy"), plain_number("skill_loss"), plain_number("text_loss")
ALIGNED = "rotation"
WORTH, COSTLY = 3.0, 0.1  # points of right tokens; nats of the first text
HOME = {
    "anchor": "A",
    "skilled": "A + skill, fine-tuned",
    "version": "A trained on",
    "version-skilled": "A trained on + skill vector (the ceiling)",
}
VARIANTS = {"into": "B + skill vector", "midpoint": "midpoint of A and B + skill vector", GRADFIX: "B + masked vector"}


def skills(findings: Findings, shapes: Mapping[str, str], titles: Mapping[str, str]) -> list[str]:
    """The tables of every shape whose skills were measured."""
    return [
        part
        for shape, title in shapes.items()
        if _measured(findings, shape)
        for part in _one(findings, shape, title, titles)
    ]


def _measured(findings: Findings, shape: str) -> bool:
    return findings.has(_part(shape), NONE, "into")


def _part(shape: str) -> str:
    return f"{shape}-skills"


def _one(findings: Findings, shape: str, title: str, titles: Mapping[str, str]) -> list[str]:
    part = _part(shape)
    pairs = len(findings.per_seed(part, NONE, "into", ACCURACY))
    number = "one model B" if pairs == 1 else f"{pairs} models B"
    lead = f"""\
**Skills across initialisations, {title}.** A learns the installed Python's language reference beside its own text, and
what changed is added to B, which has another initialisation ({number}). Numbers are of held-out text: the share
of tokens that are the likeliest, their loss, and the loss of Tiny Shakespeare. B is in A's coordinates."""
    return [paragraphs(lead), _table(findings, part, titles), *_worth(findings, part, titles)]


def _worth(findings: Findings, part: str, titles: Mapping[str, str]) -> list[str]:
    """Where the vector is worth adding, and what the two experiments of the literature add to an alignment."""
    best = [_best(findings, part, variant, titles) for variant in SHARES]
    ceiling = findings.estimate(part, "version-skilled", "home", ACCURACY).text()
    said = f"Right tokens at best: in the midpoint {best[1]}, in B {best[0]}; the ceiling is {ceiling} %."
    masks = [f"{titles[arm]} {_mask(findings, part, arm)}" for arm in titles if findings.has(part, arm, GRADFIX)]
    if masks:
        said += f" The mask of GradFix, against the vector without it: {'; '.join(masks)}."
    if findings.has(part, THESEUS) and findings.has(part, ALIGNED, "into"):
        gain = _difference(findings, part, (THESEUS, "into"), (ALIGNED, "into"))
        said += f" Theseus against {titles[ALIGNED]}: {judged(gain, 1, unit=' points')}."
        said += " Neither is worth a feature by these numbers." if gain.mean < WORTH and _costly(findings, part) else ""
    return [said]


def _best(findings: Findings, part: str, variant: str, titles: Mapping[str, str]) -> str:
    """The alignment with which most tokens are right, and their share."""
    found = {arm: findings.estimate(part, arm, variant, ACCURACY) for arm in titles if findings.has(part, arm, variant)}
    arm = max(found, key=lambda name: found[name].mean)
    return f"{titles[arm]}, {found[arm].text()} %"


def _mask(findings: Findings, part: str, arm: str) -> str:
    gain, cost = (_difference(findings, part, (arm, GRADFIX), (arm, "into"), x) for x in (ACCURACY, KEPT))
    return f"{gain.text(signed=True)} points, and {cost.text(2, signed=True)} nats on Tiny Shakespeare"


def _costly(findings: Findings, part: str) -> bool:
    """Whether every mask makes the first text worse by more than `COSTLY`."""
    arms = [arm for p, _, arm, variant in findings.rows if (p, variant) == (part, GRADFIX)]
    return all(_difference(findings, part, (arm, GRADFIX), (arm, "into"), KEPT).mean > COSTLY for arm in arms)


def _table(findings: Findings, part: str, titles: Mapping[str, str]) -> str:
    rows = [(text, "", *_cells(findings, part, name, "home"), "") for name, text in HOME.items()]
    rows.append(("B", "", *_cells(findings, part, "model", "alone"), ""))
    for variant, text in VARIANTS.items():
        for arm in (x for x in titles if findings.has(part, x, variant)):
            rows.append(
                (text, titles[arm], *_cells(findings, part, arm, variant), _against(findings, part, arm, variant))
            )
    if findings.has(part, THESEUS):
        cells = _cells(findings, part, THESEUS, "into")
        rows.append((VARIANTS["into"], "Theseus", *cells, _against(findings, part, THESEUS, "into")))
    head = (
        "model",
        "alignment",
        "right tokens, %",
        "skill, nats",
        "Tiny Shakespeare, nats",
        "right tokens against none",
    )
    return table(head, rows, text=2)


def _cells(findings: Findings, part: str, arm: str, variant: str) -> tuple[str, str, str]:
    accuracy, skill, kept = (findings.estimate(part, arm, variant, x) for x in (ACCURACY, SKILL, KEPT))
    return accuracy.text(1), skill.text(2), kept.text(2)


def _against(findings: Findings, part: str, arm: str, variant: str) -> str:
    """Points more than the plain vector in the same place, pair by pair."""
    plain = (NONE, variant if variant in SHARES else "into")
    return "" if (arm, variant) == plain else judged(_difference(findings, part, (arm, variant), plain), 1)


def _difference(
    findings: Findings, part: str, ours: tuple[str, str], other: tuple[str, str], metric: Metric = ACCURACY
) -> Estimate:
    """One arm and variant minus another, pair by pair."""
    one, plain = (findings.per_seed(part, *which, metric) for which in (ours, other))
    return Estimate.of([x - plain[n] for n, x in one.items() if n in plain])
