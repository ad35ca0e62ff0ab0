"""Sections 7 and 8: models with different skills, merged with and without data."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from ..findings import Findings
from . import skill_tables as tables
from .markdown import listing, opening, paragraphs
from .skill_numbers import (
    AVERAGE,
    DATA_FREE,
    REGMEAN,
    TASK_ARITHMETIC,
    TIES,
    closed,
    finished,
    gain,
    mixes,
)
from .skill_tables import skills_of

__all__ = ["ENCODERS", "LANGUAGE", "finished", "section"]

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
{_seeds(settings)} (they decide which windows and texts are read). Losses are in nats per token, on
{settings["heldout"]} held-out texts of each kind. *Other text* are prompts that no model was trained on: what the
merge forgets (half of the package's own; the other half serves as *prompts of the package*). Statistics come from
training texts of each model's own kind. {_measured_on(findings)} {_reading()}"""


def _encoders(findings: Findings) -> str:
    settings = findings.settings
    return f"""\
All models are all-MiniLM-L6-v2 (22 million parameters, BERT), fine-tuned on one classification task with eight classes
each: {settings["steps"]} steps with {settings["batch"]} texts, learning rate {settings["learning_rate"]:g},
{_seeds(settings)}. *Topics*: from which chapter of the Python language reference a passage is. *Modules*:
in which module of NumPy, SciPy or PyTorch a function is. Losses are in nats, on {settings["heldout"]} held-out texts of
each task (fewer where there are not that many). Each task has a head of its own: a merged encoder is measured with the
head of that task's own model. {_measured_on(findings)} {_reading()}"""


def _seeds(settings: Mapping[str, Any]) -> str:
    count = len(settings["seeds"])
    return f"{count} seed{'s' * (count > 1)}"


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


LANGUAGE = Part(7, "Skills of language models in one", "nats per token", _language)

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
