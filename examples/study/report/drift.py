"""Section 2: the drift sweep."""

from __future__ import annotations

from collections.abc import Callable
from itertools import product

from ..estimates import CONFIDENCE, Estimate
from ..findings import ALONE, OWN, SKILL, SKILL_LOSS, Findings, Metric, percent, plain_number
from .markdown import DRIFT_TITLES, VARIANT_TITLES, in_order, judged, listing, opening, paragraphs, table

EXACT = ("weights", "activations")
# What an aligned merge is judged by: the sign of an improvement, and the difference to the merge without alignment.
MEASURES: dict[str, tuple[int, Callable[[Findings, str, str], Estimate]]] = {
    "the barrier (nats)": (-1, Findings.barrier_difference),
    "the skill after transfer (nats)": (
        -1,
        lambda findings, arm, variant: findings.difference("merge", arm, variant, SKILL_LOSS),
    ),
    "own tasks after transfer (points)": (
        1,
        lambda findings, arm, variant: findings.difference("merge", arm, variant, OWN),
    ),
}


def exact_variants(findings: Findings) -> list[str]:
    return [v for v in EXACT if findings.has("merge", "branch-100", v)]


def measured(findings: Findings) -> list[str]:
    """Drifts of which everything was measured for two seeds or more, in order: no number without an error bar."""
    variants = ("plain", *exact_variants(findings), "full")

    def seeds(arm: str) -> int:
        return min(len(findings.per_seed("merge", arm, v, SKILL)) for v in variants)

    return in_order(arm for arm in findings.arms("distance") if seeds(arm) > 1)


def section(findings: Findings) -> str:
    arms = measured(findings)
    return paragraphs(
        "## 2 By how the target drifted",
        _verdict(findings, arms),
        _changes(findings, arms),
        f"Lower is better for nats, higher for points. {_failures(findings, arms)} {_harm_of_full(findings, arms)}",
        _setting(findings),
        "![Share of the distance, barrier and transfer by drift](figures/drift.png)",
        _distances(findings, arms),
        _barriers(findings, arms),
        _transfers(findings, arms, "skill after transfer, %", (SKILL, 1, 1)),
        _transfers(findings, arms, "skill after transfer, nats/character", (SKILL_LOSS, -1, 2)),
        _transfers(findings, arms, "own tasks after transfer, %", (OWN, 1, 1)),
        _by_symmetry(findings, arms),
        _full(findings, arms),
    )


def changes(findings: Findings, arms: list[str], variant: str) -> list[tuple[str, str, Estimate, str]]:
    """(what, arm, difference, verdict) for barrier, skill (loss) and own tasks, wherever a difference is shown."""
    found = []
    for arm, (what, (sign, measured_by)) in product(arms, MEASURES.items()):
        if findings.has("merge", arm, variant):
            difference = measured_by(findings, arm, variant)
            if (verdict := difference.verdict(sign)) in ("better", "worse"):
                found.append((what, arm, difference, verdict))
    return found


def _verdict(findings: Findings, arms: list[str]) -> str:
    """How many differences there are, how many are shown, and how many chance alone would show."""
    variants = exact_variants(findings)
    shown = [verdict for variant in variants for *_, verdict in changes(findings, arms, variant)]
    n = len(MEASURES) * len(arms) * len(variants)
    return f"""\
{opening(shown)} Out of {n} differences between an aligned and a plain merge, {shown.count("better")} are better and
{shown.count("worse")} worse; chance alone would show about {(1 - CONFIDENCE) * n:.0f}. For all others no difference is
shown."""


def _changes(findings: Findings, arms: list[str]) -> str:
    """Every difference that is shown."""
    rows = [
        (VARIANT_TITLES[variant], DRIFT_TITLES[arm], what, f"{d.text(2, signed=True)}: {verdict}")
        for variant in exact_variants(findings)
        for what, arm, d, verdict in changes(findings, arms, variant)
    ]
    return table(("alignment", "target", "measure", "aligned − plain"), rows, text=3) if rows else ""


def _failures(findings: Findings, arms: list[str]) -> str:
    """Where the skill is lost in every merge, so that its loss tells little."""
    variants = ("plain", *exact_variants(findings))
    lost = [arm for arm in arms if all(findings.estimate("merge", arm, v, SKILL).mean < 1 for v in variants)]
    where = listing([f"*{DRIFT_TITLES[arm]}*" for arm in lost]) if lost else ""
    return f"No merge solves 1 % of the skill's problems at {where}. Nats there compare failures." if lost else ""


def _harm_of_full(findings: Findings, arms: list[str]) -> str:
    losses = {arm: findings.difference("merge", arm, "full", ALONE) for arm in arms}
    harmed = [f"*{DRIFT_TITLES[arm]}* ({d.text(signed=True)})" for arm, d in losses.items() if d.verdict(1) == "worse"]
    if not harmed:
        return "`rotation: full` harms the target's own tasks nowhere that these seeds can show."
    return f"""\
`rotation: full` is no symmetry under RoPE: it makes the target itself worse. Its own tasks change at
{listing(harmed)}, in points (higher is better)."""


def _setting(findings: Findings) -> str:
    settings = findings.settings
    return f"""\
The target branches off at a share of the base training. It goes on to the end of that training with other data, and
then learns what the target of section 1 learns. *Another initialisation*: the target descends from the next seed's
base, so that each base serves two seeds. *Hotter* multiplies the learning rate of that lesson by
{settings["hot_factor"]}, *longer* its steps by {settings["long_factor"]}. *Removed* is by how much alignment lowers
the Frobenius distance to the reference, over all tensors or over the query and key projections (*Q/K*). Negative
numbers raise it: matching from activations looks at the weights only as far as they agree. *Barrier* is how far the
loss on the base mixture rises above the straight line between reference and target, at the worst of
{len(settings["mixing"])} averages."""


def _distances(findings: Findings, arms: list[str]) -> str:
    variants = exact_variants(findings)
    head = ["target", "seeds", "distance to the reference"]
    for what in ("removed, %", "removed of Q/K, %", "neurons moved, %", "KV heads moved, %"):
        head += [f"{what} ({variant})" for variant in variants]
    rows = []
    for arm in arms:
        distance = findings.estimate("merge", arm, "plain", plain_number("total_distance"))
        cells = [str(distance.n), distance.text(2)]
        cells += [
            findings.symmetric_share("merge", arm, v, d).text(2) for d in ("total", "query_key") for v in variants
        ]
        cells += [
            findings.estimate("merge", arm, v, percent(f"moved_{what}")).text()
            for what in ("neurons", "heads")
            for v in variants
        ]
        rows.append((DRIFT_TITLES[arm], *cells))
    return table(head, rows)


def _barriers(findings: Findings, arms: list[str]) -> str:
    variants = exact_variants(findings)
    rows = []
    for arm in arms:
        plain = Estimate.of(list(findings.barrier(arm, "plain").values()))
        rows.append(
            (DRIFT_TITLES[arm], plain.text(3), *(judged(findings.barrier_difference(arm, v), -1, 3) for v in variants))
        )
    return table(("barrier, nats", "no alignment", *(f"{VARIANT_TITLES[v]}: difference" for v in variants)), rows)


def _transfers(findings: Findings, arms: list[str], what: str, measure: tuple[Metric, int, int]) -> str:
    """One ability after the transfer; ``measure`` is the metric, the sign of an improvement, and digits."""
    metric, favourable, digits = measure
    variants = exact_variants(findings)
    rows = []
    for arm in arms:
        differences = [findings.difference("merge", arm, v, metric) for v in variants]
        cells = [judged(difference, favourable, digits) for difference in differences]
        rows.append((DRIFT_TITLES[arm], findings.estimate("merge", arm, "plain", metric).text(digits), *cells))
    return table((what, "no alignment", *(f"{VARIANT_TITLES[v]}: difference" for v in variants)), rows)


def _by_symmetry(findings: Findings, arms: list[str]) -> str:
    """Share of the distance that each kind of symmetry removes by itself."""
    kinds = ("permutation", "rotation", "scale")
    if not findings.has("distance"):
        return ""
    rows = [
        (
            DRIFT_TITLES[arm],
            *(findings.symmetric_share("distance", arm, kind).text(2) for kind in kinds),
            findings.symmetric_share("merge", arm, "weights").text(2),
        )
        for arm in arms
    ]
    return table(("removed of the distance, %", *(VARIANT_TITLES[k] for k in kinds), "all of them"), rows)


def _full(findings: Findings, arms: list[str]) -> str:
    rows = [
        (
            DRIFT_TITLES[arm],
            findings.symmetric_share("merge", arm, "full").text(2),
            findings.estimate("merge", arm, "plain", ALONE).text(),
            findings.estimate("merge", arm, "full", ALONE).text(),
            judged(findings.difference("merge", arm, "full", SKILL), 1),
            judged(findings.difference("merge", arm, "full", OWN), 1),
        )
        for arm in arms
    ]
    head = ("`rotation: full`", "removed of the distance, %", "own tasks of the target alone, before, %", "after, %")
    return table((*head, "skill after transfer, points", "own tasks after transfer, points"), rows)
