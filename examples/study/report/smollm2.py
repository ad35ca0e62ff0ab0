"""Section 5: SmolLM2."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import product

from ..estimates import Estimate
from ..findings import Findings, Metric, percent, plain_number
from ..smollm2 import PROMPTS
from .claims import HOROI, ZHANG, Claim, answer
from .drift import EXACT
from .markdown import VARIANT_TITLES, judged, opening, paragraphs, table

FIXED = {"anchor": "SmolLM2-135M-Instruct", "skill": "skill (arithmetic, the demo's adapter)"}
TUNED = {"target": "target (ship's log)", "second": "second fine-tune (Python language reference)"}
MERGES = {"transfer": "target + (skill − SmolLM2)", "average": "average of target and second fine-tune"}
ARITHMETIC, LOG, REFERENCE = percent("arithmetic"), plain_number("log_loss"), plain_number("reference_loss")
HEAD = ("arithmetic, %", "ship's log, nats/token", "Python reference, nats/token")
DIGITS = (1, 4, 4)


def LOSS(row: dict[str, float]) -> float:  # noqa: N802
    """Mean of the losses on what the two averaged models were trained on."""
    return (LOG(row) + REFERENCE(row)) / 2


@dataclass(frozen=True)
class Measure:
    """What a merge is judged by; ``favourable`` is the sign of an improvement."""

    name: str
    metric: Metric
    favourable: int
    digits: int
    unit: str

    def judged(self, difference: Estimate) -> str:
        if difference.n == 1:
            return f"{difference.text(self.digits, signed=True)}{self.unit}"
        return judged(difference, self.favourable, self.digits, self.unit)


JUDGED = {
    "transfer": [
        Measure("the skill", ARITHMETIC, 1, 1, " points"),
        Measure("the loss on the target's text", LOG, -1, 4, " nats/token"),
    ],
    "average": [Measure("the loss of the average", LOSS, -1, 4, " nats/token")],
}


def tried(findings: Findings) -> list[str]:
    """The aligned variants that were measured with both merges for as many seeds as any."""
    most = len(_seeds(findings, "transfer", "plain"))
    return [v for v in EXACT if most and min(len(_seeds(findings, merge, v)) for merge in MERGES) == most]


def finished(findings: Findings) -> bool:
    """Whether both merges were measured with and without alignment."""
    return "weights" in tried(findings)


def section(findings: Findings) -> str:
    settings = findings.settings
    n = len(_seeds(findings, "transfer", "weights"))
    runs = f"{n} seeds (they decide which windows of text are read)."
    one = "one run. Without error bars it is an illustration and no evidence for a claim."
    return paragraphs(
        "## 5 SmolLM2",
        summary(findings),
        _differences(findings),
        f"""\
Both models are fine-tunes of all weights of SmolLM2-135M-Instruct: {settings["steps"]} steps with {settings["batch"]}
sequences of {settings["tokens"]} tokens, learning rate {settings["learning_rate"]:g}, {runs if n > 1 else one} SmolLM2
and the skill are the same for all seeds. Activations are from {2 * PROMPTS} prompts, half from each text that is
trained on.""",
        _alone(findings),
        *(_merges(findings, merge) for merge in MERGES),
    )


def summary(findings: Findings) -> str:
    """What alignment does to the average, for a user; nothing from a single run."""
    (loss,) = JUDGED["average"]
    if len(_seeds(findings, "average", "plain")) < 2:
        return ""
    said = ["Here two fine-tunes of SmolLM2-135M-Instruct are averaged, or one gets a skill (lower loss is better)."]
    found = {v: findings.difference("merge", "average", v, loss.metric) for v in tried(findings)}
    for variant, d in found.items():
        change = f"{d.text(loss.digits, signed=True)}{loss.unit}"
        said.append(f"With {VARIANT_TITLES[variant]} the loss of the average changes by {change}.")
    words = [f"{opening([d.verdict(loss.favourable)])[:-3]} with {VARIANT_TITLES[v]}.**" for v, d in found.items()]
    return " ".join((*words, *said))


def claims(findings: Findings) -> list[Claim]:
    """None from a single run."""
    rows = []
    for variant, (merge, paper) in product(tried(findings), {"transfer": HOROI, "average": ZHANG}.items()):
        measure = JUDGED[merge][0]
        difference = findings.difference("merge", merge, variant, measure.metric)
        claim = f"aligning the target ({variant}) improves {measure.name} (SmolLM2-135M)"
        rows.append((paper, claim, answer(difference, measure.favourable), measure.judged(difference)))
    return rows if len(_seeds(findings, "transfer", "weights")) > 1 else []


def _differences(findings: Findings) -> str:
    """What each variant did to each merge, by what the merge is judged by."""
    rows = [
        (MERGES[merge], VARIANT_TITLES[variant], measure.name, measure.judged(difference))
        for merge, variant in product(MERGES, tried(findings))
        for measure in JUDGED[merge]
        for difference in [findings.difference("merge", merge, variant, measure.metric)]
    ]
    return table(("merge", "alignment", "measure", "aligned − plain"), rows, text=3)


def _seeds(findings: Findings, merge: str, variant: str) -> dict[int, float]:
    return findings.per_seed("merge", merge, variant, ARITHMETIC)


def _abilities(findings: Findings, part: str, arm: str, variant: str) -> list[str]:
    metrics = zip((ARITHMETIC, LOG, REFERENCE), DIGITS, strict=True)
    return [findings.estimate(part, arm, variant, metric).text(digits) for metric, digits in metrics]


def _alone(findings: Findings) -> str:
    return table(
        ("model", *HEAD), [(title, *_abilities(findings, "alone", arm, "-")) for arm, title in (FIXED | TUNED).items()]
    )


def _merges(findings: Findings, merge: str) -> str:
    rows = []
    for variant in ("plain", *tried(findings)):
        removed = findings.symmetric_share("merge", merge, variant)
        moved = findings.estimate("merge", merge, variant, percent("moved_neurons"))
        seconds = findings.estimate("merge", merge, variant, plain_number("merge_seconds"))
        cells = (removed.text(3), moved.text(2), seconds.text(0))
        rows.append((VARIANT_TITLES[variant], *_abilities(findings, "merge", merge, variant), *cells))
    head = (MERGES[merge], *HEAD, "removed of the distance, %", "neurons moved, %", "alignment and merge, s")
    return table(head, rows)
