"""docs/evidence.md and README's table as text, from the results files."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

from ..data import ALPHABET
from ..estimates import CONFIDENCE
from ..findings import SKILL, Findings
from . import advice, apart, claims, drift, foreign, fusion, skills, smollm2, together, transfer, vits
from .drift import exact_variants, measured
from .markdown import DRIFT_TITLES, listing, paragraphs

BEGIN, END = "<!-- evidence: written by make study -->", "<!-- end of evidence -->"


@dataclass(frozen=True)
class Study:
    """All results: parts 1 to 3, and where they were measured the others."""

    main: Findings
    fusion: Findings | None
    smollm2: Findings | None
    vits: Findings | None = None
    skills: Findings | None = None
    skill_encoders: Findings | None = None
    apart: Findings | None = None

    @staticmethod
    def read(folder: Path, name: str) -> Study:
        """The results in a directory; ``name`` is that of the settings of parts 1 to 3."""
        main = Findings.read(folder / f"{name}.json")
        parts = {
            "fusion": fusion,
            "smollm2": smollm2,
            "vits": vits,
            "skills": skills,
            "skill-encoders": skills,
            "apart": apart,
        }
        return Study(main, *(_finished(folder / f"{file}.json", part) for file, part in parts.items()))


def _finished(path: Path, part: ModuleType) -> Findings | None:
    """The results of a part, or None as long as one is missing that its section needs."""
    findings = Findings.read(path) if path.exists() else None
    return findings if findings is not None and part.finished(findings) else None


def page(study: Study) -> str:
    """The whole of docs/evidence.md."""
    main = study.main
    parts = [
        "# Evidence: when does alignment pay, and how much?",
        advice.rows(main, study.apart),
        advice.reading(main, study.apart),
        _scale(main),
        _reading(main),
        claims.section(main, _more_claims(study)),
        transfer.section(main),
        drift.section(main),
        foreign.section(main),
        "## 4 Fusion of encoders\n\nNot measured yet." if study.fusion is None else fusion.section(study.fusion),
        "## 5 SmolLM2\n\nNot measured yet." if study.smollm2 is None else smollm2.section(study.smollm2),
        "## 6 Vision transformers\n\nNot measured yet." if study.vits is None else vits.section(study.vits),
        *_skills(study),
        *([] if study.apart is None else [apart.section(study.apart)]),
        _limits(study),
        _again(study),
    ]
    return paragraphs(*parts) + "\n"


def _skills(study: Study) -> list[str]:
    """Sections 7 and 8, where they were measured."""
    found = {skills.LANGUAGE: study.skills, skills.ENCODERS: study.skill_encoders}
    return [skills.section(findings, part) for part, findings in found.items() if findings is not None]


def _more_claims(study: Study) -> list[claims.Claim]:
    """What parts 4 to 6 have to say, where they were measured."""
    encoders = [] if study.fusion is None else fusion.claims(study.fusion)
    tuned = [] if study.smollm2 is None else smollm2.claims(study.smollm2)
    return encoders + tuned + ([] if study.vits is None else vits.claims(study.vits))


def readme_paragraph(study: Study) -> str:
    """What README says, between its two marks."""
    where = "docs/evidence.md"
    first = together.paragraph(study.skills, study.skill_encoders, study.vits, where)
    given = (study.main, study.apart, where)
    return paragraphs(BEGIN, *first, advice.rows(*given), advice.reading(*given), END)


def replaced(readme: str, paragraph: str) -> str:
    """README with its paragraph replaced.

    Raises:
        ValueError: if README has lost the marks.
    """
    if BEGIN not in readme or END not in readme:
        raise ValueError(f"README.md has no {BEGIN} … {END}. Put both lines where the paragraph belongs.")
    before, rest = readme.split(BEGIN, 1)
    return before + paragraph + rest.split(END, 1)[1]


def _scale(main: Findings) -> str:
    sizes, settings = main.settings["model"], main.settings
    return f"""\
`make study` writes this page from `examples/study/results/`; a test compares every number. The papers measured models
of 8 billion parameters. Here they are Llama models with {sizes["num_hidden_layers"]} layers, width
{sizes["hidden_size"]}, {sizes["num_attention_heads"]} query heads and {sizes["num_key_value_heads"]} KV heads of
{sizes["head_dim"]} coordinates ({_parameters(sizes) / 1e6:.2f} million parameters),
{settings["base"]["steps"]} steps of base training with {settings["batch"]}
sequences of {settings["length"]} characters, {len(settings["seeds"])} seeds. What such models show need not hold for
large ones. What is exact does: a function that is kept or broken."""


def _parameters(sizes: dict[str, int]) -> int:
    """Weights of the Llama model: embedding and output, and in each layer projections, MLP and two norms."""
    hidden, d = sizes["hidden_size"], sizes["head_dim"]
    attention = 2 * hidden * d * (sizes["num_attention_heads"] + sizes["num_key_value_heads"])
    layer = attention + 3 * hidden * sizes["intermediate_size"] + 2 * hidden
    return 2 * len(ALPHABET) * hidden + sizes["num_hidden_layers"] * layer + hidden


def _reading(main: Findings) -> str:
    env = main.environment
    return f"""\
Numbers are means over seeds ± standard errors. Differences are taken seed by seed. *Better* and *worse* mean that the
{CONFIDENCE:.0%} interval (Student's t) leaves out zero, so about one in twenty such words is chance. *No difference
shown* is no proof that there is none. The same seeds give the same numbers, times apart, on the same machine and
versions (here Python {env["python"]}, torch {env["torch"]}, one thread; `make study-again` checks it).
Merges are MergeKit configurations
(`examples/study/merges/`), run by MergeKit's `run_merge` in one process instead of one process each."""


def _limits(study: Study) -> str:
    arms = measured(study.main)
    seeds = {arm: len(study.main.per_seed("merge", arm, "plain", SKILL)) for arm in arms}
    planned = ["other-start", "hot", "long", *(f"branch-{share}" for share in study.main.settings["branches"])]
    missing = [DRIFT_TITLES[arm] for arm in planned if arm not in arms]
    fewer = [f"{DRIFT_TITLES[arm]} ({n})" for arm, n in seeds.items() if n < len(study.main.settings["seeds"])]
    parts = [
        """\
These are small models and short trainings, so large models may behave differently. The tasks are strings of digits of
the study's own. A model of this size masters them within minutes on one core, and can then lose or keep them. The
tasks of `reasoning-gym` were not tried. The text is one document: nothing here is language as large models know it.
There is one way of training (AdamW), one shape of model, one weight of the skill vector (1). Branching off early means
training again from almost the start, not a long continued training as large models get.""",
        f"Fewer seeds than the others have: {listing(fewer)}." if fewer else "",
        f"Planned and not measured yet: {listing(missing)}." if missing else "",
        "" if "activations" in exact_variants(study.main) else "Matching from activations is not in these results.",
        """\
Parts 4 to 6 are short trainings on a CPU. Matching from activations in sections 6 and 9 was measured with version
0.1.0, where weights counted 1e-5 beside them ([activations.md](activations.md#how-much-weights-count)).""",
        "" if _has_activations(study.smollm2) else "Matching from activations was not measured on SmolLM2.",
    ]
    return "## Limits\n\n" + " ".join(part for part in parts if part)


def _has_activations(findings: Findings | None) -> bool:
    return findings is not None and "activations" in smollm2.tried(findings)


def _again(study: Study) -> str:
    apart = "`make study-apart TEXT=FILE` measures section 9 from a file of text." if study.apart is not None else ""
    return f"""\
## Measure it again

`make study` measures everything on this page. It goes on with what is missing in `examples/study/results/`; delete a
file there to measure it anew. `make study-again` measures the first seed of sections 1 and 3 again from nothing
and compares every number with the results. `make study-small` runs the same code on a fraction of the training, in
minutes. {apart}"""
