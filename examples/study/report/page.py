"""docs/evidence.md and README's paragraph as text."""

from __future__ import annotations

from ..estimates import CONFIDENCE
from ..findings import OWN, SKILL, Findings
from . import claims, drift, foreign, transfer
from .markdown import paragraphs

BEGIN, END = "<!-- evidence: written by make study -->", "<!-- end of evidence -->"


def page(findings: Findings) -> str:
    """The whole of docs/evidence.md."""
    return (
        paragraphs(
            "# Evidence: when does alignment pay, and how much?",
            _scale(findings),
            _reading(findings),
            claims.section(findings, []),
            transfer.section(findings),
            drift.section(findings),
            foreign.section(findings),
        )
        + "\n"
    )


def readme_paragraph(findings: Findings) -> str:
    """What README says, between its two marks."""
    share = findings.symmetric_share("merge", transfer.ARM, "weights")
    skill = findings.difference("merge", transfer.ARM, "weights", SKILL)
    own = findings.difference("foreign", "all-three", "weights", OWN)
    return paragraphs(
        BEGIN,
        f"Two fine-tunes of one base: on small Llama models trained for the purpose ({skill.n} seeds), {share.text(2)} % of their "
        f"distance is a difference of coordinates, and alignment from weights changes a transferred skill by "
        f"{skill.text(signed=True)} points ({skill.verdict(1)}). If instead a tool has left the target in other coordinates "
        f"(rotated values, sorted neurons, reordered heads), the aligned merge keeps {own.text(signed=True)} points more of what the "
        "target can do than the plain one. All numbers, by how far the models have drifted: [docs/evidence.md](docs/evidence.md).",
        END,
    )


def replaced(readme: str, paragraph: str) -> str:
    """README with its paragraph replaced.

    Raises:
        ValueError: if README has lost the marks.
    """
    if BEGIN not in readme or END not in readme:
        raise ValueError(f"README.md has no {BEGIN} … {END}. Put both lines where the paragraph belongs.")
    before, rest = readme.split(BEGIN, 1)
    return before + paragraph + rest.split(END, 1)[1]


def _scale(findings: Findings) -> str:
    sizes, base = findings.settings["model"], findings.settings["base"]
    return (
        "Written by `make study` from `examples/study/results/`; a test compares every number. The papers measured models of 8 "
        f"billion parameters. Here: Llama models with {sizes['num_hidden_layers']} layers, width {sizes['hidden_size']}, "
        f"{sizes['num_attention_heads']} query heads and {sizes['num_key_value_heads']} KV heads of {sizes['head_dim']} "
        f"coordinates, 780 thousand parameters, {base['steps']} steps of base training with {findings.settings['batch']} "
        f"sequences of {findings.settings['length']} characters, {len(findings.settings['seeds'])} seeds. What such models "
        "show need not hold for large ones; what is exact (functions kept or broken) does."
    )


def _reading(findings: Findings) -> str:
    env = findings.environment
    return (
        f"Numbers are means over seeds ± standard errors. Differences are taken seed by seed; *better* and *worse* mean that the "
        f"{CONFIDENCE:.0%} interval (Student's t) leaves out zero, so about one in twenty such words is chance. "
        "Everything is deterministic: the same seeds give the same numbers on the same machine and versions "
        f"(here Python {env['python']}, torch {env['torch']}, one thread). Merges are MergeKit configurations "
        "(`examples/study/merges/`), run by MergeKit's `run_merge` in one process."
    )
