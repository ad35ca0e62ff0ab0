"""Sections 7 and 8: models with different skills, merged with and without data."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from ..estimates import Estimate
from ..findings import Findings, plain_number
from ..skills.comparison import MERGE
from ..skills.settings import Mix
from . import skill_tables as tables
from .markdown import listing, opening, paragraphs, table
from .skill_numbers import (
    AVERAGE,
    DATA_FREE,
    REGMEAN,
    TASK_ARITHMETIC,
    TIES,
    best,
    closed,
    finished,
    gain,
    loss,
    mixes,
    parents,
)
from .skill_tables import KINDS, TITLES, skills_of, titled

__all__ = ["ENCODERS", "LANGUAGE", "finished", "section", "short", "short_reading"]

RIVALS = (AVERAGE, TASK_ARITHMETIC, TIES)

SPOKEN = {REGMEAN: "RegMean from 60 texts of each kind", DATA_FREE: "The same solve on task vectors, without any data,"}


@dataclass(frozen=True)
class Part:
    """One of the two sections: what its models are, and what their losses are counted in."""

    number: int
    title: str
    unit: str
    about: Callable[[Findings], str]


def _language(findings: Findings) -> str:
    settings = findings.settings
    return f"""\
All models are fine-tunes of all weights of SmolLM2-135M-Instruct on one kind of text each: {settings["steps"]} steps
with {settings["batch"]} sequences of {settings["tokens"]} tokens, learning rate {settings["learning_rate"]:g},
{len(settings["seeds"])} seeds (they decide which windows and texts are read). Losses are in nats per token, on
{settings["heldout"]} held-out texts of each kind. *Other text* are prompts that no model was trained on: what the
merge forgets (half of the package's own; the other half serves as *prompts of the package*). Statistics come from
training texts of each model's own kind. {_measured_on(findings)} {_reading()}"""


def _encoders(findings: Findings) -> str:
    settings = findings.settings
    return f"""\
All models are all-MiniLM-L6-v2 (22 million parameters, BERT), fine-tuned on one classification task with eight classes
each: {settings["steps"]} steps with {settings["batch"]} texts, learning rate {settings["learning_rate"]:g},
{len(settings["seeds"])} seeds. *Topics*: from which chapter of the Python language reference a passage is. *Modules*:
in which module of NumPy, SciPy or PyTorch a function is. Losses are in nats, on {settings["heldout"]} held-out texts of
each task (fewer where there are not that many). Each task has a head of its own: a merged encoder is measured with the
head of that task's own model. {_measured_on(findings)} {_reading()}"""


def _measured_on(findings: Findings) -> str:
    versions = findings.environment
    return f"""\
Measured on {versions.get("accelerator", "a CPU")} with torch {versions["torch"]}; `make study-skills` measures it again
(`SKILLS="--device cuda --workers 6"` on a GPU)."""


def _reading() -> str:
    return """\
*Gap closed* is how far a merge goes from the average (0 %) to each model on its own kind (100 %), by the mean loss.
*Best* is the value with the lowest mean over all seeds, chosen on the very texts that it is measured on, which favours
the method. Weights are equal unless a table says otherwise."""


LANGUAGE = Part(7, "Skills of three language models in one", "nats per token", _language)

ENCODERS = Part(8, "Tasks of two encoders in one", "nats", _encoders)


def section(findings: Findings, part: Part) -> str:
    return paragraphs(
        f"## {part.number} {part.title}",
        _verdict(findings, part),
        part.about(findings),
        tables.alone(findings),
        *(tables.mix(findings, mix) for mix in mixes(findings)),
        *tables.aligned(findings),
        tables.costs(findings),
    )


def _verdict(findings: Findings, part: Part) -> str:
    first = mixes(findings)[0]
    found = {(ours, rival): gain(findings, first, ours, rival) for ours in (REGMEAN, DATA_FREE) for rival in RIVALS}
    said = [f"Here {skills_of(first)} are merged into one model (lower loss is better)."]
    for ours in (REGMEAN, DATA_FREE):
        against = [
            f"{found[ours, rival].text(3, signed=True)} against {_plain(rival)} ({found[ours, rival].verdict(-1)})"
            for rival in RIVALS
        ]
        share = closed(findings, first, ours).text(0)
        said.append(
            f"{SPOKEN[ours]} changes the loss, in {part.unit}, by {listing(against)}. It goes {share} % of the way "
            "from the average to what the models reach on their own data."
        )
    said.append("Rivals with a parameter are taken at their best value, chosen with hindsight.")
    return " ".join((opening(d.verdict(-1) for d in found.values()), *said))


def _plain(rival: str) -> str:
    return {AVERAGE: "the average", TASK_ARITHMETIC: "task arithmetic", TIES: "TIES"}[rival]


def short(findings: Findings) -> str:
    """README's table: the first mix, what each way of merging needs, and how far it goes."""
    mix = mixes(findings)[0]
    needs = {
        AVERAGE: "nothing",
        TIES: "the base",
        TASK_ARITHMETIC: "the base",
        DATA_FREE: "the base",
        REGMEAN: _texts(mix),
    }
    rows = []
    for name, needed in needs.items():
        arm = best(findings, mix, name)
        if arm is None:
            continue
        cells = (findings.estimate(MERGE, mix.name, arm, loss(mix)).text(3), closed(findings, mix, arm).text(0))
        rows.append((titled(TITLES[name].split(",")[0], arm, arm != name), needed, *cells))
    own = Estimate.of(list(parents(findings, mix).values())).text(3)
    rows.append(("each model on its own kind", "", own, "100"))
    return table(
        ("one model from two", "needs", "loss, nats per token (lower is better)", "gap closed, %"), rows, text=2
    )


def short_reading(findings: Findings, where: str) -> str:
    """What README says under its table."""
    mix = mixes(findings)[0]
    other = {name: best(findings, mix, name) for name in (AVERAGE, DATA_FREE, REGMEAN)}
    lost = {
        name: findings.difference(MERGE, mix.name, arm, plain_number("other_loss"), AVERAGE)
        for name, arm in other.items()
        if arm is not None and name != AVERAGE
    }
    forgetting = listing([f"{d.text(2, signed=True)} ({TITLES[name]})" for name, d in lost.items()])
    return f"""\
Two fine-tunes of SmolLM2-135M ({listing([KINDS[kind] for kind in mix.kinds])}),
{len(findings.settings["seeds"])} seeds.
*Gap closed* goes from the average (0 %) to each model on its own kind (100 %); rivals are at their best value. On other
text the loss changes, against the average, by {forgetting} nats per token.
[docs/evidence.md]({where}#7-skills-of-three-language-models-in-one) has the rest."""


def _texts(mix: Mix) -> str:
    return f"60 texts of each of {len(mix.kinds)} kinds"
