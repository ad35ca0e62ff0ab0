"""Section 5: SmolLM2. One run, so numbers without error bars, and no claim."""

from __future__ import annotations

from collections.abc import Sequence

from ..findings import Findings, Row
from .markdown import VARIANT_TITLES, paragraphs, table

MODELS = {
    "anchor": "SmolLM2-135M-Instruct",
    "skill": "skill (arithmetic, the demo's adapter)",
    "target": "target (ship's log)",
    "second": "second fine-tune (Python language reference)",
}
MERGES = {
    "transfer": "target + (skill − SmolLM2)",
    "average": "average of target and second fine-tune",
}


def finished(findings: Findings) -> bool:
    """Whether both merges were measured with and without alignment."""
    return all(findings.has("merge", merge, variant) for merge in MERGES for variant in ("plain", "weights"))


def section(findings: Findings) -> str:
    settings = findings.settings
    return paragraphs(
        "## 5 SmolLM2",
        _verdict(findings),
        f"""\
Two fine-tunes of all weights of SmolLM2-135M-Instruct: {settings["steps"]} steps with {settings["batch"]} sequences of
{settings["tokens"]} tokens, learning rate {settings["learning_rate"]:g}. That is short, and one run: numbers without
error bars, an illustration and no evidence for a claim.""",
        _alone(findings),
        *(_merges(findings, merge) for merge in MERGES),
    )


def _verdict(findings: Findings) -> str:
    shares = [f"{_share(findings, merge, 'weights'):.3f} %" for merge in MERGES]
    plain, aligned = (_row(findings, "merge", "transfer", v) for v in ("plain", "weights"))
    return (
        f"Exact alignment from weights removes {shares[0]} of the distance from the target to SmolLM2 and "
        f"{shares[1]} of that to "
        f"another fine-tune; arithmetic after the transfer is {100 * plain['arithmetic']:.1f} % without alignment and "
        f"{100 * aligned['arithmetic']:.1f} % with it."
    )


def _row(findings: Findings, part: str, arm: str, variant: str) -> Row:
    return next(row for (p, _, a, v), row in findings.rows.items() if (p, a, v) == (part, arm, variant))


def _share(findings: Findings, merge: str, variant: str) -> float:
    ours, plain = (_row(findings, "merge", merge, v)["total_distance"] for v in (variant, "plain"))
    return float(100 * (1 - ours / plain))


def _abilities(row: Row) -> Sequence[str]:
    return f"{100 * row['arithmetic']:.1f}", f"{row['log_loss']:.4f}", f"{row['reference_loss']:.4f}"


HEAD = ("arithmetic, %", "ship's log, nats/token", "Python reference, nats/token")


def _alone(findings: Findings) -> str:
    return table(
        ("model", *HEAD), [(title, *_abilities(_row(findings, "alone", name, "-"))) for name, title in MODELS.items()]
    )


def _merges(findings: Findings, merge: str) -> str:
    rows = []
    for variant, title in VARIANT_TITLES.items():
        if findings.has("merge", merge, variant):
            row = _row(findings, "merge", merge, variant)
            removed = f"{_share(findings, merge, variant):.3f}"
            moved = f"{100 * row['moved_neurons']:.2f}"
            rows.append((title, *_abilities(row), removed, moved, f"{row['merge_seconds']:.0f}"))
    return table((MERGES[merge], *HEAD, "removed of the distance, %", "neurons moved, %", "merge, s"), rows)
