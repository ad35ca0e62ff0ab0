"""README's table: two fine-tunes of one base in one model, by kind of model."""

from __future__ import annotations

from collections.abc import Mapping

from ..estimates import Estimate
from ..findings import Findings
from . import vits
from .markdown import listing, paragraphs, table
from .skill_numbers import AVERAGE, DATA_FREE, REGMEAN, TASK_ARITHMETIC, TIES, best, gain, mixes
from .skill_tables import skills_of

METHODS = {
    TASK_ARITHMETIC: "`task_arithmetic`, best `lambda`",
    TIES: "`ties`, best `lambda`",
    "fisher": "`fisher`, 60 texts of each kind",
    REGMEAN: "`regmean`, 60 texts of each kind",
    DATA_FREE: "`regmean_task_arithmetic`, no data",
}
IN_VITS = {
    TASK_ARITHMETIC: "task-arithmetic",
    "fisher": "fisher",
    REGMEAN: "regmean",
    DATA_FREE: "regmean-task-vectors",
}


def paragraph(
    language: Findings | None, encoders: Findings | None, images: Findings | None, where: str
) -> tuple[str, ...]:
    """The table and how to read it; nothing where no such merges were measured.

    Args:
        language, encoders, images: results of parts 7, 8 and 6.
        where: the page that has the rest.
    """
    columns: dict[str, Mapping[str, Estimate]] = {}
    models = []
    for name, found in (("SmolLM2-135M", language), ("MiniLM", encoders)):
        if found is not None:
            columns[f"{name}, {found.settings['steps']} steps"] = _gains(found)
            models.append(f"{name} on {skills_of(mixes(found)[0]).removeprefix('two models ').strip('()')}")
    if columns and images is not None:
        gaps = vits.against_average(images)
        columns["ViT"] = {name: gaps[own] for name, own in IN_VITS.items() if own in gaps}
        models.append("a small ViT on the digits 0 to 4 and 5 to 9")
    if not columns:
        return ()
    rows = [(title, *(_cell(of.get(name)) for of in columns.values())) for name, title in METHODS.items()]
    head = ("two fine-tunes in one model: loss against their average", *columns)
    said = f"""\
Differences in nats on held-out inputs of both kinds (lower is better). The models: {listing(models)}.
Rivals are at the best of several values of `lambda`. Statistics come from each model's own kind of data; for the ViT
from 256 images. The rest, what each merge forgets, and its cost: [{where}]({where})."""
    return table(head, rows), paragraphs(said)


def _gains(findings: Findings) -> dict[str, Estimate]:
    """Of each method at its best value, against the average."""
    mix = mixes(findings)[0]
    found = {name: best(findings, mix, name) for name in METHODS}
    return {name: gain(findings, mix, arm, AVERAGE) for name, arm in found.items() if arm is not None}


def _cell(difference: Estimate | None) -> str:
    return "" if difference is None else f"{difference.text(3, signed=True)}: {difference.verdict(-1)}"
