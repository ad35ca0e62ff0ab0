"""Sections 7 and 8: models with different skills, merged with and without data."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass

from ..estimates import Estimate
from ..findings import Findings, Metric, plain_number
from ..skills.arms import arms
from ..skills.comparison import ALONE, BASE, MERGE
from ..skills.costs import COST, MEASURED
from ..skills.settings import Mix
from ..store import Row
from .markdown import judged, listing, opening, paragraphs, table

AVERAGE, TASK_ARITHMETIC, TIES = "average", "task-arithmetic", "ties"
REGMEAN, DATA_FREE = "regmean", "regmean-vectors"
RIVALS = (AVERAGE, TASK_ARITHMETIC, TIES)
TITLES = {
    AVERAGE: "average (`linear`)",
    TASK_ARITHMETIC: "`task_arithmetic`",
    TIES: "`ties`, density 0.2",
    "ties-half": "`ties`, density 0.5",
    "dare-ties": "`dare_ties`",
    "della": "`della`",
    "sce": "`sce`",
    "fisher": "`fisher`, 60 texts",
    REGMEAN: "`regmean`, 60 texts",
    "regmean-8": "`regmean`, 8 texts",
    "regmean-prompts": "`regmean`, prompts of the package",
    "regmean-unscaled": "`regmean`, 60 texts, `off_diagonal: 1`",
    DATA_FREE: "`regmean_task_arithmetic`, no data",
    "regmean-vectors-measured": "`regmean_task_arithmetic`, 60 texts",
    "regmean-vectors-measured-8": "`regmean_task_arithmetic`, 8 texts",
    "regmean-vectors-prompts": "`regmean_task_arithmetic`, prompts of the package",
    "aligned-average": "aligned average (`rotation_match`)",
    "aligned-task-arithmetic": "`aligned_task_arithmetic`",
    "aligned-ties": "`aligned_ties`, density 0.2",
    "aligned-fisher": "`aligned_fisher`, permutations only",
    "aligned-regmean": "`aligned_regmean`, 60 texts",
    "aligned-regmean-vectors": "`aligned_regmean_task_arithmetic`, no data",
}
SPOKEN = {REGMEAN: "RegMean from 60 texts of each kind", DATA_FREE: "The same solve on task vectors, without any data,"}
ALIGNED = {
    "aligned-average": AVERAGE,
    "aligned-task-arithmetic": f"{TASK_ARITHMETIC} lambda=1.0",
    "aligned-ties": f"{TIES} lambda=1.0",
    "aligned-fisher": "fisher",
    "aligned-regmean": REGMEAN,
    "aligned-regmean-vectors": DATA_FREE,
}
KINDS = {
    "log": "ship's log",
    "arithmetic": "arithmetic",
    "reference": "Python reference",
    "file": "text file",
    "topics": "topics",
    "modules": "modules",
}


@dataclass(frozen=True)
class Part:
    """One of the two sections: what its models are, and what their losses are counted in."""

    number: int
    title: str
    unit: str
    about: Callable[[Findings], str]


def mixes(findings: Findings) -> list[Mix]:
    return [Mix(tuple(m["kinds"]), tuple(m["weights"]), m["arms"]) for m in findings.settings["mixes"]]


def loss(mix: Mix) -> Metric:
    """The loss on what the models of a mix were trained on, weighted as they are."""
    return lambda row: sum(w * float(row[f"{kind}_loss"]) for kind, w in zip(mix.kinds, mix.weights, strict=True))


def scanned(findings: Findings, mix: Mix, name: str) -> list[str]:
    """All values of an arm that is scanned, or the arm itself, where they were measured."""
    named = [arm.name for arm in arms(mix.arms) if arm.name == name or re.match(rf"{re.escape(name)} \S+=", arm.name)]
    return [arm for arm in named if findings.has(MERGE, mix.name, arm)]


def best(findings: Findings, mix: Mix, name: str) -> str | None:
    """The value of a scan with the lowest loss over all seeds, chosen on the very texts that it is measured on."""
    found = scanned(findings, mix, name)
    return min(found, key=lambda arm: findings.estimate(MERGE, mix.name, arm, loss(mix)).mean, default=None)


def finished(findings: Findings) -> bool:
    """Whether every arm of every mix was measured for all seeds, and the costs."""
    complete = all(
        len(findings.per_seed(MERGE, mix.name, arm.name, loss(mix))) == len(findings.settings["seeds"])
        for mix in mixes(findings)
        for arm in arms(mix.arms)
    )
    return complete and findings.has(COST)


def closed(findings: Findings, mix: Mix, arm: str) -> Estimate:
    """Per cent of the way from the average's loss down to each model's own loss on its own kind."""
    ours, average = (findings.per_seed(MERGE, mix.name, a, loss(mix)) for a in (arm, AVERAGE))
    parents = _parents(findings, mix)
    return Estimate.of([100 * (average[s] - x) / (average[s] - parents[s]) for s, x in ours.items()])


def section(findings: Findings, part: Part) -> str:
    tables = [_alone(findings), *(_mix(findings, mix) for mix in mixes(findings))]
    return paragraphs(
        f"## {part.number} {part.title}",
        _verdict(findings, part),
        part.about(findings),
        *tables,
        *_aligned(findings),
        _costs(findings),
    )


def gain(findings: Findings, mix: Mix, ours: str, rival: str) -> Estimate:
    """Loss of an arm minus the loss of the rival at its best value."""
    against = best(findings, mix, rival)
    if against is None:
        raise ValueError(f"{rival} was not measured for {mix.name}. Run the study before its report.")
    return findings.difference(MERGE, mix.name, ours, loss(mix), against=against)


def _language(findings: Findings) -> str:
    settings = findings.settings
    return f"""\
All models are fine-tunes of all weights of SmolLM2-135M-Instruct on one kind of text each: {settings["steps"]} steps
with {settings["batch"]} sequences of {settings["tokens"]} tokens, learning rate {settings["learning_rate"]:g},
{len(settings["seeds"])} seeds (they decide which windows and texts are read). Losses are in nats per token, on
{settings["heldout"]} held-out texts of each kind. *Other text* are prompts that no model was trained on: what the
merge forgets (half of the package's own; the other half serves as *prompts of the package*). Statistics come from
training texts of each model's own kind. {_reading()}"""


def _encoders(findings: Findings) -> str:
    settings = findings.settings
    return f"""\
All models are all-MiniLM-L6-v2 (22 million parameters, BERT), fine-tuned on one classification task with eight classes
each: {settings["steps"]} steps with {settings["batch"]} texts, learning rate {settings["learning_rate"]:g},
{len(settings["seeds"])} seeds. *Topics*: from which chapter of the Python language reference a passage is. *Modules*:
in which module of NumPy, SciPy or PyTorch a function is. Losses are in nats, on {settings["heldout"]} held-out texts of
each task (fewer where there are not that many). Each task has a head of its own: a merged encoder is measured with the
head of that task's own model. {_reading()}"""


def _reading() -> str:
    return """\
*Gap closed* is how far a merge goes from the average (0 %) to each model on its own kind (100 %), by the mean loss.
*Best* is the value with the lowest mean over all seeds, chosen on the very texts that it is measured on, which favours
the method. Weights are equal unless a table says otherwise."""


LANGUAGE = Part(7, "Skills of three language models in one", "nats per token", _language)
ENCODERS = Part(8, "Tasks of two encoders in one", "nats", _encoders)


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
        rows.append((_titled(TITLES[name].split(",")[0], arm, arm != name), needed, *cells))
    parents = Estimate.of(list(_parents(findings, mix).values())).text(3)
    rows.append(("each model on its own kind", "", parents, "100"))
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


def _verdict(findings: Findings, part: Part) -> str:
    first = mixes(findings)[0]
    found = {(ours, rival): gain(findings, first, ours, rival) for ours in (REGMEAN, DATA_FREE) for rival in RIVALS}
    said = [f"Here {_skills(first)} are merged into one model (lower loss is better)."]
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


def _skills(mix: Mix) -> str:
    return f"{ {2: 'two', 3: 'three'}[len(mix.kinds)] } models ({listing([KINDS[kind] for kind in mix.kinds])})"


def _alone(findings: Findings) -> str:
    kinds = list(dict.fromkeys(kind for mix in mixes(findings) for kind in mix.kinds))
    rows = []
    for arm in (BASE, *kinds):
        cells = [findings.estimate(ALONE, arm, "-", metric).text(3) for metric in _losses(findings, kinds)]
        rows.append(("base" if arm == BASE else f"fine-tune: {KINDS[arm]}", *cells))
    return table(("model, alone", *_heads(findings, kinds)), rows)


def _heads(findings: Findings, kinds: list[str]) -> list[str]:
    return [KINDS[kind] for kind in kinds] + (["other text"] if _other(findings) else [])


def _losses(findings: Findings, kinds: list[str]) -> list[Metric]:
    return [plain_number(f"{kind}_loss") for kind in kinds] + ([plain_number("other_loss")] if _other(findings) else [])


def _other(findings: Findings) -> bool:
    return any("other_loss" in row for row in findings.rows.values())


def _mix(findings: Findings, mix: Mix) -> str:
    kinds = list(mix.kinds)
    rows = []
    for name, title in TITLES.items():
        found, chosen = scanned(findings, mix, name), best(findings, mix, name)
        for arm in found:
            if len(found) > 1 and arm not in (chosen, f"{name} lambda=1.0"):
                continue
            rows.append((_titled(title, arm, arm == chosen and len(found) > 1), *_cells(findings, mix, arm, kinds)))
    parents = Estimate.of(list(_parents(findings, mix).values())).text(3)
    head = (_skills(mix) + _weights(mix), *_heads(findings, kinds), "mean", "− average", "gap closed, %", "merge, s")
    last = ("each model on its own kind", *[""] * len(_heads(findings, kinds)), parents, "", "100", "")
    return table(head, [*rows, last])


def _aligned(findings: Findings) -> list[str]:
    """What alignment adds to each way of merging, on the first mix."""
    mix = mixes(findings)[0]
    found = {
        arm: findings.difference(MERGE, mix.name, arm, loss(mix), plain)
        for arm, plain in ALIGNED.items()
        if findings.has(MERGE, mix.name, arm)
    }
    rows = [(TITLES[arm], judged(difference, -1, 3)) for arm, difference in found.items()]
    said = "What alignment adds, on the first of these mixes (lower is better). Fine-tunes of one base hardly need it."
    return [said, table(("method", "aligned − plain"), rows)] if rows else []


def _titled(title: str, arm: str, is_best: bool) -> str:
    _, _, value = arm.partition(" ")
    name, _, number = value.partition("=")
    shown = f"{title}, `{name}: {number}`" if value else title
    return f"{shown} (best)" if is_best else shown


def _weights(mix: Mix) -> str:
    equal = len(set(mix.weights)) == 1
    return "" if equal else f", weights {listing([f'{weight:g}' for weight in mix.weights])}"


def _cells(findings: Findings, mix: Mix, arm: str, kinds: list[str]) -> list[str]:
    cells = [findings.estimate(MERGE, mix.name, arm, metric).text(3) for metric in _losses(findings, kinds)]
    cells.append(findings.estimate(MERGE, mix.name, arm, loss(mix)).text(3))
    cells.append("" if arm == AVERAGE else judged(findings.difference(MERGE, mix.name, arm, loss(mix), AVERAGE), -1, 3))
    cells.append(closed(findings, mix, arm).text(0))
    return [*cells, findings.estimate(MERGE, mix.name, arm, plain_number("merge_seconds")).text(0)]


def _parents(findings: Findings, mix: Mix) -> dict[int, float]:
    """Per seed the weighted loss of each model on its own kind."""
    each = [findings.per_seed(ALONE, kind, "-", plain_number(f"{kind}_loss")) for kind in mix.kinds]
    return {seed: sum(w * x[seed] for w, x in zip(mix.weights, each, strict=True)) for seed in each[0]}


def _costs(findings: Findings) -> str:
    rows = []
    for (part, _, arm, variant), row in findings.rows.items():
        if part == COST:
            what = f"measure: {variant}" if arm == MEASURED else TITLES[variant.partition(" ")[0]]
            rows.append((what, f"{row['seconds']:.0f}", f"{row['peak_bytes'] / 1e9:.1f}", _size(row)))
    said = """\
Cost of one command, start of Python included, with the machine to itself (memory: the peak of what is resident, files
that are read included):"""
    return paragraphs(said, table(("command", "seconds", "peak memory, GB", "file, GB"), rows))


def _size(row: Row) -> str:
    return f"{row['bytes'] / 1e9:.2f}" if "bytes" in row else ""
