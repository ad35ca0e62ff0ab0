"""Section 9: models without a common base."""

from __future__ import annotations

from ..apart_merges import LEARNED, NONE
from ..apart_older import OLDER
from ..apart_published import LEARNED as THEIRS_LEARNED
from ..apart_published import MATCHED as THEIRS
from ..estimates import ONE_SEED, Estimate
from ..findings import Findings, plain_number
from .apart_skills import skills
from .markdown import judged, listing, opening, paragraphs, table

TITLES = {
    NONE: "none",
    "blocks": "blocks only",
    "git-rebasin": "Git Re-Basin",
    "permutation": "`residual: permutation`",
    "rotation": "`residual: rotation`",
    "activations": "`residual: rotation`, `objective: activations`",
    "general": "`residual: rotation`, `value_output: general`",
    LEARNED: "`mergekit-symalign learn`",
    THEIRS: "published code, from weights (no checkpoint)",
    THEIRS_LEARNED: "published code, learned (no checkpoint)",
}
SHAPES = {"gpt2": "GPT-2", "llama": "Llama"}
PUBLISHED = {NONE: "2.02", "activations": "1.43", THEIRS: "0.34", THEIRS_LEARNED: "0.02"}  # Theus et al., table 2
BARRIER, SECONDS = plain_number("barrier"), plain_number("seconds")
GOALS = {"rotation": 0.30, LEARNED: 0.02}


def finished(findings: Findings) -> bool:
    """Whether a pair of one shape was measured without alignment, with blocks and with the rotation."""
    return any(all(findings.has(shape, arm) for arm in (NONE, "blocks", "rotation")) for shape in SHAPES)


def section(findings: Findings) -> str:
    said = paragraphs(
        "## 9 Models without a common base",
        _verdict(findings),
        _models(findings),
        *(part for shape in SHAPES if findings.has(shape, NONE) for part in _shape(findings, shape)),
        _goals(findings),
        *_older(findings),
        *skills(findings, SHAPES, TITLES),
    )
    return said.replace(ONE_SEED, "one pair only")


def _verdict(findings: Findings) -> str:
    """What the rotation does to the barrier, and the numbers by shape."""
    shapes = [shape for shape in SHAPES if findings.has(shape, "rotation")]
    words = opening(gain(findings, shape, "rotation").verdict(-1) for shape in shapes)
    said = []
    for shape in shapes:
        numbers = [
            f"{TITLES[arm]} {findings.estimate(shape, arm, '-', BARRIER).text(3)}"
            for arm in (NONE, "rotation", LEARNED)
            if findings.has(shape, arm)
        ]
        said.append(f"{SHAPES[shape]}: {listing(numbers)}")
    left = listing(
        [f"{_left(findings, x, 'blocks').text()} % ({SHAPES[x]})" for x in shapes if findings.has(x, "blocks")]
    )
    return f"""\
{words} Models of two initialisations, averaged, are worse than either. This is the barrier by alignment in nats, the
largest rise of the loss above the straight line between the two (lower is better). {". ".join(said)}. Aligning blocks
alone leaves {left} of the barrier."""


def gain(findings: Findings, part: str, arm: str) -> Estimate:
    """Barrier of an arm minus the one without alignment, pair by pair."""
    ours, plain = (findings.per_seed(part, x, "-", BARRIER) for x in (arm, NONE))
    return Estimate.of([x - plain[n] for n, x in ours.items() if n in plain])


def measured(findings: Findings, part: str) -> list[str]:
    """Arms of a part, in the order of the tables."""
    return [arm for arm in TITLES if findings.has(part, arm)]


def _models(findings: Findings) -> str:
    settings = findings.settings
    gpt2, llama, training = settings["shapes"]["gpt2"], settings["shapes"]["llama"], settings["training"]
    return f"""\
Two shapes, each trained from several initialisations on Tiny Shakespeare with a tokenizer of
{settings["vocabulary"]} tokens, embeddings untied: GPT-2 with {gpt2["n_layer"]} layers, width {gpt2["n_embd"]},
{gpt2["n_head"]} heads and {gpt2["n_inner"]} neurons, and Llama with {llama["num_hidden_layers"]} layers, width
{llama["hidden_size"]}, {llama["num_attention_heads"]} query heads, {llama["num_key_value_heads"]} KV heads and
{llama["intermediate_size"]} neurons. Each took at most {training["steps"]} steps of {training["batch"]} windows of
{training["length"]} tokens, and keeps its weights with the lowest loss on {settings["held_out"]:.0%} of the text.
Losses are of another {settings["held_out"]:.0%}, at 11 points from one model to the other. Three models give three
pairs, so pairs share models, and a standard error over pairs is smaller than one over independent pairs would be. Every
aligned model is an ordinary checkpoint, written by a merge, and computes what it did. Activations and the descent read
{settings["prompts"]} pieces of the training text. Seconds (s) are of one thread, on a machine that others used too."""


def _shape(findings: Findings, shape: str) -> list[str]:
    plain = [row for (part, _, arm, _), row in findings.rows.items() if (part, arm) == (shape, NONE)]
    ends = {row["path"][end] for row in plain for end in (0, -1)}
    count = "one pair of two models" if len(plain) == 1 else f"{len(plain)} pairs of {len(ends)} models"
    lead = f"""\
**{SHAPES[shape]}, {count}.** Barrier in nats (lower is better). The models alone have losses of
{listing([f"{x:.3f}" for x in sorted(ends)])}."""
    return [lead, _table(findings, shape, published=shape == "gpt2")]


def _table(findings: Findings, part: str, *, published: bool) -> str:
    numbers = sorted({seed for p, seed, *_ in findings.rows if p == part})
    rows = []
    for arm in measured(findings, part):
        found = findings.per_seed(part, arm, "-", BARRIER)
        cells = [f"{found[n]:.3f}" if n in found else "" for n in numbers]
        difference = "" if arm == NONE else judged(gain(findings, part, arm), -1, 3)
        left = "" if arm == NONE else _left(findings, part, arm).text()
        timed = "" if arm == NONE else findings.estimate(part, arm, "-", SECONDS).text(0)
        mean = findings.estimate(part, arm, "-", BARRIER).text(3)
        rows.append(
            (TITLES[arm], *cells, mean, difference, left, timed, *((PUBLISHED.get(arm, ""),) if published else ()))
        )
    head = (
        "alignment",
        *(f"seed {n}" if part == OLDER else f"pair {n + 1}" for n in numbers),
        "mean",
        "against none",
        "left, %",
        "s",
    )
    return table((*head, *(("published",) if published else ())), rows)


def _goals(findings: Findings) -> str:
    """What was wanted of the first shape, and what came out, as shares of the barrier without alignment."""
    said, nats = [], []
    for arm, goal in GOALS.items():
        if findings.has("gpt2", arm):
            rise = findings.estimate("gpt2", arm, "-", BARRIER)
            nats.append(
                f"{TITLES[arm]} {rise.text(3)} (at most {goal:.2f}: {'met' if rise.mean <= goal else 'missed'})"
            )
            found, wanted = _left(findings, "gpt2", arm), 100 * goal / float(PUBLISHED[NONE])
            met = "met" if found.mean <= wanted else "missed"
            said.append(f"{TITLES[arm]} {found.text()} % (at most {wanted:.1f} %: {met})")
    return f"""\
*Published* is table 2 of Theus et al. 2025, for GPT-2 models of this shape with the vocabulary of GPT-2 and longer
training; so their barriers are higher to begin with. Their merge replaces the norms and multiplies query with key and
value with output, so no checkpoint of the architecture comes out. Their code ran on the same models and windows, its
learned matrices without the noise that they start from. The goals were {GOALS["rotation"]:.2f} from weights and
{GOALS[LEARNED]:.2f} learned where none is {PUBLISHED[NONE]}. In nats: {"; ".join(nats)}. As shares of the barrier
without alignment, which is lower here: {"; ".join(said)}."""


def _left(findings: Findings, part: str, arm: str) -> Estimate:
    """Per cent of the barrier without alignment, pair by pair."""
    ours, plain = (findings.per_seed(part, x, "-", BARRIER) for x in (arm, NONE))
    return Estimate.of([100 * x / plain[n] for n, x in ours.items() if n in plain])


def _older(findings: Findings) -> list[str]:
    if not findings.has(OLDER, NONE):
        return []
    lead = """\
**The arm *another initialisation* of section 2**, whose models read digits and text by characters. Barrier in nats per
character on the base's mixture (lower is better); a column is a seed."""
    return [lead, _table(findings, OLDER, published=False)]
