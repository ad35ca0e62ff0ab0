"""Section 4: two encoders averaged."""

from __future__ import annotations

from ..findings import Findings, Metric, percent, plain_number
from .claims import ZHANG, Claim, answer
from .markdown import judged, opening, paragraphs, table

TITLES = {
    "plain": "no matching",
    "permutation": "permutation only (neurons and heads)",
    "rotation": "rotation only",
    "rotation-and-scale": "rotation and scale",
    "weights": "all of them",
    "first-half": "all of them, first half of the layers",
    "last-half": "all of them, last half of the layers",
}
ACCURACIES = {"passages": percent("passages"), "functions": percent("functions")}
PASSAGES, FUNCTIONS = plain_number("passages_loss"), plain_number("functions_loss")
SECONDS = plain_number("merge_seconds")


def LOSS(row: dict[str, float]) -> float:  # noqa: N802
    """Mean of the losses on both kinds of pairs."""
    return (PASSAGES(row) + FUNCTIONS(row)) / 2


def finished(findings: Findings) -> bool:
    """Whether every average was measured."""
    rates = findings.settings["rates"]
    return all(findings.has("average", rate, variant) for rate in rates for variant in TITLES)


def section(findings: Findings) -> str:
    settings = findings.settings
    return paragraphs(
        "## 4 Fusion of encoders",
        _verdict(findings),
        f"""\
Both encoders come from all-MiniLM-L6-v2 (22 million parameters, BERT). One was trained on neighbouring passages of the
Python language reference, the other on names of functions and what their documentation says. Each took
{settings["steps"]} steps with {settings["batch"]} pairs, for {len(settings["seeds"])} seeds. The learning rates were
{settings["rates"]["mild"]:g} (*mild*) and {settings["rates"]["hot"]:g} (*hot*). Accuracy is the share of
{settings["candidates"]} held-out texts that find their partner (fewer candidates where there are not that many).
*Loss* is the mean of the contrastive losses on both kinds, in nats.""",
        _alone(findings),
        *(_averages(findings, rate) for rate in settings["rates"]),
    )


def claims(findings: Findings) -> list[Claim]:
    rows: list[Claim] = []
    for rate in findings.settings["rates"]:
        gain = findings.difference("average", rate, "weights", LOSS)
        rows.append(
            (ZHANG, f"matching improves the average of two encoders ({rate})", answer(gain, -1), judged(gain, -1, 5))
        )
        for half in ("first-half", "last-half"):
            gap = findings.difference("average", rate, half, LOSS)
            held = (
                answer(gap, -1) if gain.verdict(-1) == "better" else "not testable (all layers together change nothing)"
            )
            claim = f"matching the {half.replace('-', ' ')} of the layers is enough ({rate})"
            rows.append((ZHANG, claim, held, judged(gap, -1, 5)))
    return rows


def _verdict(findings: Findings) -> str:
    parts, verdicts = [], []
    for rate in findings.settings["rates"]:
        loss = findings.difference("average", rate, "weights", LOSS)
        share = findings.symmetric_share("average", rate, "weights")
        verdicts.append(loss.verdict(-1))
        parts.append(
            f"After {rate} training it changes the loss by {loss.text(5, signed=True)} nats ({verdicts[-1]}), and "
            f"removes {share.text(3)} % of the distance."
        )
    lead = "Here two fine-tuned encoders are averaged, with and without matching (lower loss is better)."
    return " ".join((opening(verdicts), lead, *parts))


def _alone(findings: Findings) -> str:
    rows = []
    for arm in findings.arms("alone"):
        metrics: list[tuple[Metric, int]] = [(ACCURACIES["passages"], 1), (ACCURACIES["functions"], 1), (LOSS, 3)]
        rows.append((arm, *(findings.estimate("alone", arm, "-", metric).text(digits) for metric, digits in metrics)))
    return table(("encoder", "passages, %", "functions, %", "loss"), rows)


def _averages(findings: Findings, rate: str) -> str:
    head = (f"average, {rate}", "passages, %", "functions, %", "loss", "difference to no matching")
    rows = []
    for variant, title in TITLES.items():
        cells = [findings.estimate("average", rate, variant, metric).text() for metric in ACCURACIES.values()]
        cells.append(findings.estimate("average", rate, variant, LOSS).text(3))
        cells.append("" if variant == "plain" else judged(findings.difference("average", rate, variant, LOSS), -1, 5))
        cells.append("" if variant == "plain" else findings.symmetric_share("average", rate, variant).text(3))
        cells.append(findings.estimate("average", rate, variant, SECONDS).text())
        rows.append((title, *cells))
    return table((*head, "removed of the distance, %", "merge, s"), rows)
