"""Section 9: skills that move between models of different initialisations."""

from __future__ import annotations

from collections.abc import Mapping

from ..apart_merges import NONE
from ..apart_skills import GRADFIX, THESEUS
from ..estimates import Estimate
from ..findings import Findings, percent, plain_number
from .markdown import judged, paragraphs, table

ACCURACY, SKILL, KEPT = percent("skill_accuracy"), plain_number("skill_loss"), plain_number("text_loss")
ALIGNED = "rotation"
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
    lead = f"""\
**Skills across initialisations, {title}.** A learns the installed Python's language reference beside its own text, and
what changed is added to B, which has another initialisation ({pairs} models B). Numbers are of held-out text: the share
of tokens that are the likeliest, their loss, and the loss of Tiny Shakespeare. B is in A's coordinates."""
    return [paragraphs(lead), _table(findings, part, titles), *_worth(findings, part, titles)]


def _worth(findings: Findings, part: str, titles: Mapping[str, str]) -> list[str]:
    """What the two experiments of the literature add to an alignment."""
    said = []
    for arm in (x for x in titles if findings.has(part, x, GRADFIX)):
        gain = _difference(findings, part, (arm, GRADFIX), (arm, "into"))
        said.append(f"the mask of GradFix, alignment {titles[arm]}: {judged(gain, 1, unit=' points')}")
    if findings.has(part, THESEUS) and findings.has(part, ALIGNED, "into"):
        gain = _difference(findings, part, (THESEUS, "into"), (ALIGNED, "into"))
        said.append(f"Theseus against {titles[ALIGNED]}: {judged(gain, 1, unit=' points')}")
    return [f"What the experiments add, in points of right tokens: {'; '.join(said)}."] if said else []


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
        "right tokens against plain",
    )
    return table(head, rows, text=2)


def _cells(findings: Findings, part: str, arm: str, variant: str) -> tuple[str, str, str]:
    accuracy, skill, kept = (findings.estimate(part, arm, variant, x) for x in (ACCURACY, SKILL, KEPT))
    return accuracy.text(1), skill.text(2), kept.text(2)


def _against(findings: Findings, part: str, arm: str, variant: str) -> str:
    """Points more than the plain copy, pair by pair."""
    return "" if (arm, variant) == (NONE, "into") else _judged(findings, part, arm, variant)


def _judged(findings: Findings, part: str, arm: str, variant: str) -> str:
    return judged(_difference(findings, part, (arm, variant), (NONE, "into")), 1)


def _difference(findings: Findings, part: str, ours: tuple[str, str], other: tuple[str, str]) -> Estimate:
    """Points of right tokens, pair by pair."""
    one, plain = (findings.per_seed(part, *which, ACCURACY) for which in (ours, other))
    return Estimate.of([x - plain[n] for n, x in one.items() if n in plain])
