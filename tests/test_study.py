"""The study behind docs/evidence.md: its page says what its results say, and its parts do what the page claims."""

from __future__ import annotations

import json
import random
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch
from PIL import Image

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "examples"))

from study import coordinates, data  # noqa: E402
from study.again import again  # noqa: E402
from study.estimates import Estimate  # noqa: E402
from study.evaluation import deviation, exact_match  # noqa: E402
from study.findings import Findings, plain_number  # noqa: E402
from study.fusion import Encoders  # noqa: E402
from study.merging import Merger, variants  # noqa: E402
from study.models import load_state, new_model, save, tokenizer, with_state  # noqa: E402
from study.report import smollm2  # noqa: E402
from study.report.figures import checksum  # noqa: E402
from study.report.markdown import opening  # noqa: E402
from study.report.page import Study, _parameters, page, readme_paragraph  # noqa: E402
from study.settings import Settings  # noqa: E402
from study.smollm2 import FineTuning  # noqa: E402
from study.store import Store  # noqa: E402
from study.training import Trainer  # noqa: E402

RESULTS = ROOT / "examples" / "study" / "results"
SMALL = Settings.read("small")
HARMED = ("foreign", "all-three", "plain")


@pytest.fixture(scope="module")
def study() -> Study:
    return Study.read(RESULTS, "full")


def test_evidence_says_what_the_results_say(study: Study) -> None:
    assert (ROOT / "docs" / "evidence.md").read_text("utf-8") == page(study)


def test_readme_says_what_the_results_say(study: Study) -> None:
    assert readme_paragraph(study) in (ROOT / "README.md").read_text("utf-8")


def test_the_page_follows_the_numbers(study: Study) -> None:
    """One changed number in the results changes the page: nothing on it is written by hand."""
    key = ("merge", 0, "branch-100", "weights")
    row = study.main.rows[key]
    changed = {**row, "steps": row["steps"] + 0.1}
    main = replace(study.main, rows={**study.main.rows, key: changed})
    assert page(replace(study, main=main)) != page(study)
    assert readme_paragraph(replace(study, main=main)) != readme_paragraph(study)


@pytest.mark.parametrize(
    ("part", "arm", "variant"),
    [("fusion", "hot", "weights"), ("smollm2", "transfer", "plain"), ("vits", "simple", "match")],
)
def test_the_page_follows_the_numbers_of_the_other_parts(study: Study, part: str, arm: str, variant: str) -> None:
    findings = getattr(study, part)
    key = next(key for key in findings.rows if key[2:] == (arm, variant))
    changed = {name: x + 0.1 if isinstance(x, float) else x for name, x in findings.rows[key].items()}
    other = replace(findings, rows={**findings.rows, key: changed})
    assert page(replace(study, **{part: other})) != page(study)


def test_one_run_of_smollm2_claims_nothing_and_three_do(study: Study) -> None:
    once = study.smollm2
    assert once is not None
    first = {key: row for key, row in once.rows.items() if key[1] == 0}
    rows = {(part, seed, *rest): row for (part, _, *rest), row in first.items() for seed in range(3)}
    one, three = replace(once, rows=first), replace(once, rows=rows)
    assert smollm2.claims(one) == []
    assert "±" not in smollm2.section(one)
    assert {claim[0] for claim in smollm2.claims(three)} == {"Horoi et al.", "Zhang et al."}
    assert "±" in smollm2.section(three)
    assert smollm2.summary(one) == ""
    assert "alignment from weights" in smollm2.summary(three)


@pytest.mark.parametrize("figure", ["transfer", "drift", "foreign"])
def test_figures_are_those_of_the_results(study: Study, figure: str) -> None:
    with Image.open(ROOT / "docs" / "figures" / f"{figure}.png") as image:
        assert image.info["Description"] == checksum(study.main)


def test_opening_words_say_what_the_verdicts_say() -> None:
    assert opening(["no change", "no difference shown"]) == "**No difference.**"
    assert opening(["no change", "better"]) == "**Better.**"
    assert opening(["worse", "no difference shown"]) == "**Worse.**"
    assert opening(["worse", "better"]) == "**Better in some cases, worse in others.**"


def test_every_section_opens_with_words_for_a_user(study: Study) -> None:
    sections = re.split(r"^## ", page(study), flags=re.M)[1:]
    measured = [text for text in sections if text[0].isdigit()]
    opens = r"[^\n]+\n\n\*\*(No difference|Better|Worse|One seed only)"
    assert len(measured) == 6 + sum(part is not None for part in (study.skills, study.skill_encoders, study.apart))
    assert all(re.match(opens, text) for text in measured)
    assert not re.search(r"^[^\n]+\n\n\|", "\n".join(sections))  # no section starts with a table


def test_readme_has_one_row_for_each_kind_of_models(study: Study) -> None:
    text = readme_paragraph(study)
    rows = [line.split("|") for line in text[text.index("| your models") :].splitlines() if line.startswith("|")][2:]
    assert [cells[2].split("**")[1] for cells in rows] == ["No benefit.", "Yes.", "Not by itself.", "Yes,", "Yes,"]
    assert all(re.search(r" ± [\d.]+: (better|worse|no change|no difference shown) $", cells[4]) for cells in rows)
    assert all("(lower is better)" in cells[3] for cells in rows)


def test_readme_compares_ways_of_merging_by_kind_of_model(study: Study) -> None:
    """A column for each kind that was measured, also where a method is worse; a single seed is not judged."""
    text = readme_paragraph(study)
    lines = text[: text.index("| your models")].splitlines()
    table = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("|")]
    (_, *columns), _, *rows = table
    measured = {"SmolLM2": study.skills, "MiniLM": study.skill_encoders, "ViT": study.vits}
    assert [column.split("-")[0].split(",")[0] for column in columns] == [
        k for k, x in measured.items() if x is not None
    ]
    assert [row[0].split("`")[1] for row in rows] == [
        "task_arithmetic", "ties", "fisher", "regmean", "regmean_task_arithmetic",
    ]  # fmt: skip
    verdicts = r"(\+|−)[\d.]+( ± [\d.]+: (better|worse|no difference shown)|: one seed only)"
    assert all(re.fullmatch(verdicts, cell) for row in rows for cell in row[1:] if cell)
    assert any("worse" in cell for row in rows for cell in row[1:])


def test_advice_follows_the_numbers(study: Study) -> None:
    """With results in which the tools' changes did no harm, README recommends nothing."""
    plain = {seed: row for (part, seed, arm, variant), row in study.main.rows.items() if (part, arm, variant) == HARMED}
    same = {("foreign", seed, "all-three", "weights"): row for seed, row in plain.items()}
    unharmed = replace(study, main=replace(study.main, rows={**study.main.rows, **same}))
    assert "**Yes.**" in readme_paragraph(study)
    assert "**Yes.**" not in readme_paragraph(unharmed)


def test_number_of_parameters_is_that_of_the_model() -> None:
    assert _parameters(SMALL.model) == sum(x.numel() for x in new_model(SMALL, 0).parameters())


@pytest.mark.parametrize(
    ("name", "settings"),
    [("full", Settings.read("full")), ("fusion", Encoders.read()), ("smollm2", FineTuning.read())],
)
def test_results_are_of_the_settings_in_the_repository(name: str, settings: DataclassInstance) -> None:
    assert Store.open(RESULTS / f"{name}.json", settings).rows


def test_estimate_against_known_numbers() -> None:
    found = Estimate.of([1.0, 2.0, 3.0, 4.0, 5.0])
    assert (found.mean, found.n) == (3.0, 5)
    assert found.error == pytest.approx(0.70711, abs=1e-5)
    assert found.margin == pytest.approx(2.77645 * 0.70711, abs=1e-4)  # t for four degrees of freedom, from a table
    assert found.verdict(1) == "better"
    assert found.verdict(-1) == "worse"


@pytest.mark.parametrize(
    ("values", "verdict"),
    [([0.0, 0.0], "no change"), ([1.0, -1.0, 0.5], "no difference shown"), ([1.0], "one seed only")],
)
def test_verdicts_that_show_nothing(values: list[float], verdict: str) -> None:
    assert Estimate.of(values).verdict(1) == verdict


def test_barrier_and_paired_differences() -> None:
    def rows(seed: int, aligned: float) -> dict[tuple[object, ...], dict[str, object]]:
        return {
            ("alone", seed, "reference", "-"): {"base_loss": 1.0},
            ("alone", seed, "far", "-"): {"base_loss": 2.0},
            ("merge", seed, "far", "plain"): {"path": [1.25, 3.5, 1.0], "x": 1.0 + seed},
            ("merge", seed, "far", "weights"): {"path": [1.25, 1.5, 1.75 + aligned], "x": 2.0 + seed},
        }

    findings = Findings({"mixing": [0.25, 0.5, 0.75]}, {}, {**rows(0, 0.5), **rows(1, 0.25)})  # type: ignore[arg-type]
    assert findings.barrier("far", "plain") == {0: 2.0, 1: 2.0}
    assert findings.barrier("far", "weights") == {0: 0.5, 1: 0.25}
    assert findings.barrier_difference("far", "weights").mean == pytest.approx(-1.625)
    assert findings.difference("merge", "far", "weights", plain_number("x")) == Estimate(1.0, 0.0, 2)


def test_store_goes_on_and_refuses_other_settings(tmp_path: Path) -> None:
    identity = {"part": "alone", "seed": 0, "arm": "base", "variant": "-"}
    Store.open(tmp_path / "r.json", SMALL).measure(identity, lambda: {"x": 1.0})
    again = Store.open(tmp_path / "r.json", SMALL)
    assert again.measure(identity, lambda: pytest.fail("measured twice"))["x"] == 1.0
    with pytest.raises(ValueError, match="other settings"):
        Store.open(tmp_path / "r.json", replace(SMALL, batch=1))


@pytest.mark.parametrize("task", data.TASKS)
def test_heldout_problems_are_never_trained_on(task: str) -> None:
    train, heldout = (set(data.problems(task, 300, 0, split)) for split in ("train", "heldout"))
    assert not train & heldout


@pytest.mark.parametrize("name", coordinates.CHANGES)
def test_foreign_coordinates_keep_the_function(name: str) -> None:
    model = new_model(SMALL, 0).eval()
    state = {key: x * 3 if key.endswith("proj.weight") else x for key, x in model.state_dict().items()}
    changed = coordinates.CHANGES[name](state, SMALL)
    moved = deviation(with_state(SMALL, state), with_state(SMALL, changed), SMALL)
    same_weights = all(torch.equal(x, changed[key]) for key, x in state.items())
    assert same_weights == (name == "layout-round-trip")
    assert moved > 0.01 if name == "layout-left" else moved < 1e-4


def test_branch_from_a_snapshot_is_the_same_training() -> None:
    lesson = replace(SMALL.base, steps=6)
    trainer = Trainer(SMALL, lesson, "order")
    whole, kept = new_model(SMALL, 0), new_model(SMALL, 0)
    snapshot = trainer.train(kept, keep={0})[0]
    trainer.train(whole)
    branch = new_model(SMALL, 1)
    trainer.train(branch, snapshot)
    assert all(
        torch.equal(x, y) for x, y in zip(whole.state_dict().values(), branch.state_dict().values(), strict=True)
    )


def test_exact_match_is_that_of_greedy_answers() -> None:
    model = new_model(SMALL, 0)
    Trainer(SMALL, replace(SMALL.base, shares={"first": 1.0}, steps=60), "order").train(model)
    drawn = data.problems("first", 200, seed=0)
    ids = torch.tensor([data.encode(data.END + prompt) for prompt, _ in drawn])
    given = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=1, do_sample=False)[:, -1]
    right = [data.ALPHABET[i] == answer for i, (_, answer) in zip(given.tolist(), drawn, strict=True)]
    assert 0 < sum(right) < 200
    assert exact_match(model, "first", 200) == pytest.approx(sum(right) / 200)


def test_tokenizer_is_the_alphabet() -> None:
    source = data.text("reference", "heldout")[:200] + data.END
    assert tokenizer()(source)["input_ids"] == data.encode(source)


def _merger(folder: Path) -> Merger:
    names = enumerate(("reference", "target", "reasoner"))
    return Merger(
        {name: save(new_model(SMALL, i), folder / name) for i, name in names}, folder / "work", folder / "prompts.jsonl"
    )


def test_merges_are_those_of_the_command(
    tmp_path: Path, mergekit_yaml: Callable[..., subprocess.CompletedProcess[str]]
) -> None:
    here = _merger(tmp_path).merge("transfer", "weights")
    done = mergekit_yaml((tmp_path / "work" / "config.yml").read_text("utf-8"), tmp_path / "out")
    assert done.returncode == 0, done.stderr
    assert all(torch.equal(x, here[name]) for name, x in load_state(tmp_path / "out").items())


@pytest.mark.parametrize("variant", ["weights", "full"])
def test_plain_average_of_the_rewritten_target_is_the_aligned_average(variant: str, tmp_path: Path) -> None:
    merger = _merger(tmp_path)
    plain, aligned = (merger.merge("average", v, (0.25, 0.75)) for v in ("plain", variant))
    rewritten = merger.aligned(variant).merge("average", "plain", (0.25, 0.75))
    assert all(torch.allclose(x, rewritten[name], atol=1e-6) for name, x in aligned.items())
    assert not all(torch.allclose(x, rewritten[name], atol=1e-3) for name, x in plain.items())


def test_variants_know_their_parameters() -> None:
    from mergekit_symalign.methods import ALIGNMENT_NAMES

    known = ALIGNMENT_NAMES | {"objective", "calibration"}
    assert all(set(parameters or {}) <= known for parameters in variants().values())


def test_same_seed_same_data() -> None:
    mixture = data.Mixture(SMALL.target.shares, SMALL.length)
    one, other = (mixture.batch(8, random.Random("x")) for _ in range(2))
    assert all(torch.equal(x, y) for x, y in zip(one, other, strict=True))


@pytest.mark.parametrize(("found", "differences"), [(1.0, 0), (1.1, 1)])
def test_measured_again_tells_what_changed(
    found: float, differences: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The real repetition is part of `make study-small`; here a row that comes out otherwise, in another time."""
    identity = {"part": "alone", "seed": 0, "arm": "base", "variant": "-"}
    Store.open(tmp_path / "r.json", SMALL).measure(identity, lambda: {"x": 1.0, "merge_seconds": 1.0})

    def swept(settings: Settings, seeds: object, wanted: object, store: Store, work: Path) -> None:
        store.measure(identity, lambda: {"x": found, "merge_seconds": 2.0})

    monkeypatch.setattr("study.again.sweep", swept)
    rows, changed = again(SMALL, tmp_path / "r.json", tmp_path / "again")
    assert rows == 1
    assert changed == ["alone/0/base/-: x was 1.0, is 1.1"][:differences]


def test_results_are_readable_json() -> None:
    for path in RESULTS.glob("*.json"):
        assert json.loads(path.read_text("utf-8"))["rows"]
