"""The tables of sections 7 and 8."""

from __future__ import annotations

from collections.abc import Sequence

from ..estimates import Estimate
from ..findings import Findings, Metric, plain_number
from ..skills.comparison import ALONE, BASE, MERGE
from ..skills.costs import COST, MEASURED
from ..skills.settings import Mix
from ..store import Row
from .markdown import judged, listing, opening, paragraphs, table
from .skill_numbers import (
    AVERAGE,
    DATA_FREE,
    REGMEAN,
    TASK_ARITHMETIC,
    TIES,
    best,
    closed,
    loss,
    mixes,
    parents,
    scanned,
)

SLIGHT = 0.005  # nats that nobody would notice

TITLES = {
    AVERAGE: "average (`linear`)",
    TASK_ARITHMETIC: "`task_arithmetic`",
    TIES: "`ties`, density 0.2",
    "ties-half": "`ties`, density 0.5",
    "dare-ties": "`dare_ties`",
    "della": "`della`",
    "sce": "`sce`",
    "fisher": "`fisher`, 60 texts",
    "fisher-normalized": "`fisher`, 60 texts, `normalize_fisher: model`",
    REGMEAN: "`regmean`, 60 texts",
    "regmean-8": "`regmean`, 8 texts",
    "regmean-prompts": "`regmean`, prompts of the package",
    "regmean-unscaled": "`regmean`, 60 texts, `off_diagonal: 1`",
    DATA_FREE: "`regmean_task_arithmetic`, no data",
    "regmean-vectors-little-ridge": "`regmean_task_arithmetic`, no data, `ridge: 0.001`",
    "regmean-vectors-much-ridge": "`regmean_task_arithmetic`, no data, `ridge: 1`",
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


def alone(findings: Findings) -> str:
    kinds = list(dict.fromkeys(kind for mix in mixes(findings) for kind in mix.kinds))
    rows = []
    for arm in (BASE, *kinds):
        cells = [findings.estimate(ALONE, arm, "-", metric).text(3) for metric in _losses(findings, kinds)]
        rows.append(("base" if arm == BASE else f"fine-tune: {KINDS[arm]}", *cells))
    return table(("model, alone", *_heads(findings, kinds)), rows)


def mix(findings: Findings, mix: Mix) -> str:
    kinds = list(mix.kinds)
    rows = []
    for name, title in TITLES.items():
        found, chosen = scanned(findings, mix, name), best(findings, mix, name)
        for arm in found:
            if len(found) > 1 and arm not in (chosen, f"{name} lambda=1.0"):
                continue
            rows.append((titled(title, arm, arm == chosen and len(found) > 1), *_cells(findings, mix, arm, kinds)))
    own = Estimate.of(list(parents(findings, mix).values())).text(3)
    head = (skills_of(mix) + _weights(mix), *_heads(findings, kinds), "mean", "− average", "gap closed, %", "merge, s")
    last = ("each model on its own kind", *[""] * len(_heads(findings, kinds)), own, "", "100", "")
    return table(head, [*rows, last])


def aligned(findings: Findings) -> list[str]:
    """What alignment adds to each way of merging, on the first mix."""
    mix = mixes(findings)[0]
    found = {
        arm: findings.difference(MERGE, mix.name, arm, loss(mix), plain)
        for arm, plain in ALIGNED.items()
        if findings.has(MERGE, mix.name, arm)
    }
    rows = [(TITLES[arm], judged(difference, -1, 3)) for arm, difference in found.items()]
    return [_worth(list(found.values())), table(("method", "aligned − plain"), rows)] if rows else []


def _worth(differences: Sequence[Estimate]) -> str:
    """What alignment adds, in one sentence: a difference that nobody would notice is none, however sure it is."""
    largest = max(abs(difference.mean) for difference in differences)
    if largest < SLIGHT:
        return f"Alignment changes nothing worth having on the first of these mixes: at most {largest:.4f} nats."
    verdict = opening(difference.verdict(-1) for difference in differences)
    return f"What alignment adds, on the first of these mixes (lower is better): {verdict}"


def costs(findings: Findings) -> str:
    """What commands cost; nothing if that was not measured."""
    rows = []
    for (part, _, arm, variant), row in findings.rows.items():
        if part == COST:
            what = f"measure: {variant}" if arm == MEASURED else TITLES[variant.partition(" ")[0]]
            rows.append((what, f"{row['seconds']:.0f}", f"{row['peak_bytes'] / 1e9:.1f}", _size(row)))
    said = """\
Cost of one command, start of Python included, with the machine to itself (memory: the peak of what is resident, files
that are read included):"""
    return paragraphs(said, table(("command", "seconds", "peak memory, GB", "file, GB"), rows)) if rows else ""


def titled(title: str, arm: str, is_best: bool) -> str:
    _, _, value = arm.partition(" ")
    name, _, number = value.partition("=")
    shown = f"{title}, `{name}: {number}`" if value else title
    return f"{shown} (best)" if is_best else shown


def skills_of(mix: Mix) -> str:
    return f"{ {2: 'two', 3: 'three'}[len(mix.kinds)] } models ({listing([KINDS[kind] for kind in mix.kinds])})"


def _weights(mix: Mix) -> str:
    equal = len(set(mix.weights)) == 1
    return "" if equal else f", weights {listing([f'{weight:g}' for weight in mix.weights])}"


def _heads(findings: Findings, kinds: list[str]) -> list[str]:
    return [KINDS[kind] for kind in kinds] + (["other text"] if _other(findings) else [])


def _losses(findings: Findings, kinds: list[str]) -> list[Metric]:
    return [plain_number(f"{kind}_loss") for kind in kinds] + ([plain_number("other_loss")] if _other(findings) else [])


def _other(findings: Findings) -> bool:
    return any("other_loss" in row for row in findings.rows.values())


def _cells(findings: Findings, mix: Mix, arm: str, kinds: list[str]) -> list[str]:
    cells = [findings.estimate(MERGE, mix.name, arm, metric).text(3) for metric in _losses(findings, kinds)]
    cells.append(findings.estimate(MERGE, mix.name, arm, loss(mix)).text(3))
    cells.append("" if arm == AVERAGE else judged(findings.difference(MERGE, mix.name, arm, loss(mix), AVERAGE), -1, 3))
    cells.append(closed(findings, mix, arm).text(0))
    return [*cells, findings.estimate(MERGE, mix.name, arm, plain_number("merge_seconds")).text(0)]


def _size(row: Row) -> str:
    return f"{row['bytes'] / 1e9:.2f}" if "bytes" in row else ""
