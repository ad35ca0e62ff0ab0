"""The study's comparison of ways of merging: its data, its rows, and the page that follows from them."""

from __future__ import annotations

import json
import random
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "examples"))

from study.findings import Findings  # noqa: E402
from study.models import State, load_state, new_model, save  # noqa: E402
from study.report import skill_numbers, skill_tables  # noqa: E402
from study.report import skills as report  # noqa: E402
from study.settings import Settings  # noqa: E402
from study.skills import comparison as parts  # noqa: E402
from study.skills.arms import GROUPS, arms  # noqa: E402
from study.skills.comparison import Comparison, Job  # noqa: E402
from study.skills.costs import timed  # noqa: E402
from study.skills.jobs import lacking, measure_all  # noqa: E402
from study.skills.peak import peak  # noqa: E402
from study.skills.saving import saved  # noqa: E402
from study.skills.settings import Mix, Skills  # noqa: E402
from study.skills.tasks import CLASSES, TASKS, by_class  # noqa: E402
from study.skills.texts import KINDS, drawn, prompts, texts  # noqa: E402
from study.store import Store  # noqa: E402

SMALL = Settings.read("small")
SETTINGS = ("skills", "skill-encoders")
RESULTS = ROOT / "examples" / "study" / "results"


@pytest.mark.parametrize("name", SETTINGS)
def test_weights_of_a_mix_add_up(name: str) -> None:
    mixes = Skills.read(name).mixes
    assert all(sum(mix.weights) == pytest.approx(1) for mix in mixes)
    assert len({mix.name for mix in mixes}) == len(mixes)


@pytest.mark.parametrize("group", GROUPS)
def test_groups_hold_what_the_page_compares(group: str) -> None:
    names = [arm.name for arm in arms(group)]
    assert len(set(names)) == len(names)
    assert {"average", "regmean", "regmean-vectors", "task-arithmetic lambda=1.0", "ties lambda=1.0"} <= set(names)


def test_every_arm_has_a_title() -> None:
    assert {arm.name.partition(" ")[0] for arm in arms("all")} == set(skill_tables.TITLES)


def test_adding_methods_get_weight_one_each() -> None:
    arm = next(arm for arm in arms("few") if arm.name == "task-arithmetic lambda=1.0")
    config = arm.config(Path("base"), [Path("a"), Path("b")], (0.5, 0.5), [])
    assert [entry["parameters"] for entry in config["models"]] == [{"weight": 1.0}, {"weight": 1.0}]
    assert config["base_model"] == "base"
    assert config["parameters"] == {"lambda": 1.0}


def test_each_model_gets_its_own_statistics() -> None:
    arm = next(arm for arm in arms("few") if arm.name == "regmean")
    config = arm.config(Path("base"), [Path("a"), Path("b")], (0.3, 0.7), [Path("x"), Path("y")])
    assert [entry["parameters"]["statistics"] for entry in config["models"]] == ["x", "y"]
    assert "base_model" not in config


@pytest.mark.parametrize("kind", KINDS)
def test_heldout_texts_are_never_trained_on(kind: str, tmp_path: Path) -> None:
    file = tmp_path / "text.txt"
    generator = random.Random(0)
    file.write_text(" ".join(str(generator.random()) for _ in range(2000)), "utf-8")
    train, heldout = (set(texts(kind, split, file)) for split in ("train", "heldout"))
    assert len(heldout) >= 8
    assert not train & heldout
    assert set(drawn(kind, "train", 8, 0, file)) <= train


def test_prompts_for_statistics_are_not_the_other_text() -> None:
    assert len(prompts(0)) > 30
    assert not set(prompts(0)) & set(prompts(1))


def test_texts_of_no_kind_are_refused() -> None:
    with pytest.raises(ValueError, match=r"no texts of the kind file.*--text FILE"):
        texts("file", "train")


@pytest.mark.parametrize("task", TASKS)
def test_tasks_have_examples_of_every_class_on_both_sides(task: str) -> None:
    train, heldout = TASKS[task]("train"), TASKS[task]("heldout")
    assert not {example.text for example in train} & {example.text for example in heldout}
    assert [group[0].label for group in by_class(train)] == list(range(CLASSES))
    assert all(len(group) >= 4 for group in by_class(heldout))


@pytest.mark.parametrize("name", SETTINGS)
def test_results_are_of_the_settings_in_the_repository(name: str) -> None:
    file = RESULTS / f"{name}.json"
    if not file.exists():
        pytest.skip(f"{name} was not measured yet")
    assert Store.open(file, Skills.read(name)).rows


@dataclass(frozen=True)
class Tiny:
    """Untrained models of the small study in place of SmolLM2."""

    settings: Skills
    work: Path
    device: str = "cpu"
    labelled: bool = False

    def base(self) -> Path:
        return saved(self.work / "base", lambda folder: save(new_model(SMALL, 0), folder))

    def folder(self, kind: str, seed: int) -> Path:
        return self.work / f"{kind}-{seed}"

    def train(self, kind: str, seed: int) -> Path:
        return saved(self.folder(kind, seed), lambda folder: save(new_model(SMALL, len(kind) + seed), folder))

    def calibration(self, kind: str, n: int, seed: int) -> list[dict[str, Any]]:
        return [{"text": line} for line in drawn(kind, "train", n, seed)]

    def losses(self, state: State, seed: int) -> dict[str, float]:
        return {"norm": float(sum(x.double().square().sum() for x in state.values())) ** 0.5}


@pytest.fixture
def comparison(tmp_path: Path) -> Comparison:
    settings = replace(Skills.read("skills"), seeds=(0,), mixes=(Mix(("log", "arithmetic"), (0.5, 0.5), "few"),))
    return Comparison(Tiny(settings, tmp_path / "work"))


def test_a_row_is_the_merge_of_the_configuration(comparison: Comparison) -> None:
    comparison.models.base()
    states = [load_state(comparison.models.train(kind, 0)) for kind in ("log", "arithmetic")]
    mean = {name: (x + states[1][name]) / 2 for name, x in states[0].items()}
    row = comparison.row(Job(parts.MERGE, 0, "log+arithmetic", "average"))
    assert row["norm"] == pytest.approx(comparison.models.losses(mean, 0)["norm"], rel=1e-6)
    assert row["merge_seconds"] > 0


def test_rows_are_kept_and_lost_models_made_again(comparison: Comparison, tmp_path: Path) -> None:
    store = Store.open(tmp_path / "r.json", comparison.models.settings)
    jobs = list(comparison.trained())
    assert lacking(jobs, store)
    measure_all(jobs, comparison, store, workers=1)
    first = json.loads((tmp_path / "r.json").read_text("utf-8"))
    folder = comparison.models.folder("log", 0)
    before = load_state(folder)
    folder.rename(tmp_path / "lost")
    assert not lacking(jobs, store)
    measure_all(jobs, comparison, store, workers=1)
    assert json.loads((tmp_path / "r.json").read_text("utf-8")) == first
    assert all(torch.equal(x, before[name]) for name, x in load_state(folder).items())


def test_of_two_that_write_a_directory_the_first_stays(tmp_path: Path) -> None:
    def write(folder: Path) -> None:
        folder.mkdir()
        (folder / "file").write_text("second", "utf-8")
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / "file").write_text("first", "utf-8")

    assert (saved(tmp_path / "out", write) / "file").read_text("utf-8") == "first"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_peak_memory_is_the_most_that_was_resident() -> None:
    before = peak()
    some = torch.ones(20_000_000)
    assert peak() >= before
    assert peak() > some.nbytes


def test_a_command_that_fails_has_no_cost() -> None:
    with pytest.raises(RuntimeError, match="no-such-command failed"):
        timed(["no-such-command"])


def _findings(loss: float) -> Findings:
    """Two seeds in which every arm has one loss, and RegMean another."""
    settings = json.loads(json.dumps({"seeds": [0, 1], "costs": True, "mixes": [vars(Skills.read("skills").mixes[0])]}))
    rows: dict[tuple[Any, ...], dict[str, Any]] = {}
    for seed in (0, 1):
        for kind in ("base", "log", "arithmetic"):
            rows["alone", seed, kind, "-"] = {"log_loss": 0.5, "arithmetic_loss": 0.5 + 0.01 * seed, "other_loss": 3.0}
        for i, arm in enumerate(arms("all")):
            x = loss if arm.name == "regmean" else 1.0 + i / 100
            rows["merge", seed, "log+arithmetic", arm.name] = {
                "log_loss": x, "arithmetic_loss": x + 0.01 * seed, "other_loss": 3.0, "merge_seconds": 1.0,
            }  # fmt: skip
    rows["cost", 0, "log+arithmetic", "regmean"] = {"seconds": 3.0, "peak_bytes": 2e9}
    return Findings(settings, {"torch": "2"}, rows)


PART = report.Part(7, "SmolLM2", "nats/token", lambda findings: "About.")


def test_section_follows_the_numbers() -> None:
    lower, higher = (report.section(_findings(loss), PART) for loss in (0.75, 2.0))
    assert lower.startswith("## 7 SmolLM2\n\n**Better")
    assert "−0.250" in lower
    assert "+1.000" in higher


def test_gap_closed_is_the_way_from_the_average_to_the_parents() -> None:
    findings = _findings(0.75)
    (mix,) = skill_numbers.mixes(findings)
    assert skill_numbers.closed(findings, mix, "regmean").mean == pytest.approx(50)  # from 1.0 half the way to 0.5
    assert skill_numbers.closed(findings, mix, "average").mean == 0


def test_best_value_of_a_scan_has_the_lowest_loss() -> None:
    findings = _findings(1.0)
    (mix,) = skill_numbers.mixes(findings)
    key = ("merge", 0, mix.name, "ties lambda=2.0")
    better = replace(findings, rows={**findings.rows, key: {**findings.rows[key], "log_loss": 0.1}})
    assert skill_numbers.best(findings, mix, "ties") == "ties lambda=1.0"
    assert skill_numbers.best(better, mix, "ties") == "ties lambda=2.0"
    assert skill_numbers.best(findings, mix, "regmean") == "regmean"


def test_section_waits_for_every_row() -> None:
    findings = _findings(1.0)
    assert skill_numbers.finished(findings)
    key = ("merge", 1, "log+arithmetic", "ties lambda=1.5")
    assert not skill_numbers.finished(replace(findings, rows={k: row for k, row in findings.rows.items() if k != key}))


def test_a_row_that_fails_is_left_out_and_the_others_are_kept(
    comparison: Comparison, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    store = Store.open(tmp_path / "r.json", comparison.models.settings)
    jobs = [Job(parts.ALONE, 0, "base", "-"), Job(parts.MERGE, 0, "log+arithmetic", "average")]
    comparison.models.base()
    measure_all(reversed(jobs), comparison, store, workers=1)  # the merge has no models yet
    assert "merge 0 log+arithmetic average FAILED: " in capsys.readouterr().out
    assert [key[0] for key in store.rows] == [parts.ALONE]
    assert lacking(jobs, store)
