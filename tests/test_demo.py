"""What the demo says while it works, and what it keeps from the user: the libraries' warnings."""

from __future__ import annotations

import io
import json
import logging
import shlex
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import click
import pytest
import torch
from click.testing import CliRunner
from models import make_model, word_tokenizer
from transformers.utils import logging as transformers_logging

from mergekit_symalign.cli import main
from mergekit_symalign.demo import run
from mergekit_symalign.demo.data import arithmetic_problems, style_texts
from mergekit_symalign.demo.evaluate import Loaded, answers, matching_share, mean_loss
from mergekit_symalign.demo.progress import Tick, measuring
from mergekit_symalign.demo.source import quiet

MODELS = ["anchor", "skill", "target", "twin", "plain-target", "plain-twin", "aligned-twin"]
NOISE = "a library's warning"


def _warn() -> None:
    """What transformers, torch and huggingface_hub do."""
    warnings.warn(NOISE, UserWarning, stacklevel=1)
    warnings.warn(NOISE, FutureWarning, stacklevel=1)
    for name in ("transformers", "huggingface_hub", "torch", "mergekit"):
        logging.getLogger(f"{name}.module").warning(NOISE)
    transformers_logging.get_logger("transformers.module").warning_once(NOISE)


@pytest.fixture
def fast(monkeypatch: pytest.MonkeyPatch) -> None:
    """The demo without its models, and with libraries that warn at every step."""

    def folder(*args: Any, **options: Any) -> Path:
        _warn()
        return Path("folder")

    def counted(loaded: object, items: Sequence[object], tick: Tick) -> float:
        _warn()
        tick(len(items))
        return 0.5

    for name in ("unpack_smollm2", "adapted", "write_twin", "load"):
        monkeypatch.setattr(run, name, folder)
    monkeypatch.setattr(
        run, "_mergekit_yaml", lambda: [sys.executable, "-c", f"import sys; print({NOISE!r}, file=sys.stderr)"]
    )
    monkeypatch.setattr(run, "logit_deviation", lambda *_: 1e-5)
    monkeypatch.setattr(run, "matching_share", counted)
    monkeypatch.setattr(run, "mean_loss", counted)


@pytest.mark.usefixtures("fast")
def test_off_a_terminal_every_step_is_one_line(tmp_path: Path) -> None:
    done = CliRunner().invoke(main, ["demo", "--out", str(tmp_path / "out")], catch_exceptions=False)
    assert done.exit_code == 0
    lines = done.stderr.splitlines()
    assert all(line.startswith("… ") for line in lines)
    assert [line for line in lines if "merging" in line] == [
        f"… merging {name} (mergekit-yaml {name}.yml {name})" for name in MODELS[4:]
    ]
    assert [line for line in lines if "measuring" in line] == [
        f"… measuring {name} ({i} of 7)" for i, name in enumerate(MODELS, 1)
    ]
    assert done.stdout.startswith("Twin and target")
    table, _, command = done.stdout.partition("\n\nThe command")
    assert table.count("\n") == 3 + len(MODELS)
    program, name, *arguments = shlex.split(command.splitlines()[-1])
    assert (program, name) == ("mergekit-symalign", "compare")
    asked = main.commands["compare"].make_context("compare", arguments, parent=click.Context(main)).params
    assert all(path.exists() for path in (*map(Path, asked["configs"]), *asked["data"]))
    answers = [json.loads(line) for line in asked["data"][1].read_text("utf-8").splitlines()]
    assert len(answers) == run.PROBLEMS
    assert all(answer.keys() == {"prompt", "answer"} for answer in answers)


@pytest.mark.usefixtures("fast")
def test_on_a_terminal_a_bar_names_the_model_and_ends_full(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run.run_demo(tmp_path / "out", bar=True)
    said = capsys.readouterr().err
    assert "… measuring" not in said
    assert "measuring aligned-twin" in said
    assert "%|" in said


@pytest.mark.usefixtures("fast")
@pytest.mark.parametrize("terminal", [True, False])
def test_the_command_draws_a_bar_on_a_terminal_only(
    terminal: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []
    monkeypatch.setattr("mergekit_symalign.commands.outcome.sys", SimpleNamespace(stderr=_Stream(terminal)))
    monkeypatch.setattr("mergekit_symalign.commands.demo.run_demo", lambda out, *, bar: seen.append(bar))
    CliRunner().invoke(main, ["demo", "--out", str(tmp_path)], catch_exceptions=False)
    assert seen == [terminal]


class _Stream(io.StringIO):
    def __init__(self, terminal: bool) -> None:
        super().__init__()
        self._terminal = terminal

    def isatty(self) -> bool:
        return self._terminal


@pytest.mark.usefixtures("fast")
def test_no_warning_of_a_library_is_shown_and_afterwards_all_are(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        run.run_demo(tmp_path / "out")
        assert not found
        assert not caplog.records
        out, err = capfd.readouterr()
        assert NOISE not in out + err
        logging.getLogger("torch.module").warning(NOISE)
        warnings.warn(NOISE, UserWarning, stacklevel=1)
    assert NOISE in caplog.text
    assert len(found) == 1


def test_what_a_failing_merge_says_is_shown(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(run, "_mergekit_yaml", lambda: [sys.executable, "-c", "import sys; sys.exit('no such model')"])
    with pytest.raises(click.ClickException, match="failed with exit code 1"):
        run._merge(tmp_path / "c.yml", tmp_path / "plain-twin", tmp_path / "cache")
    assert "no such model" in capsys.readouterr().err
    assert "no such model" in (tmp_path / "plain-twin.log").read_text("utf-8")


@pytest.mark.parametrize("fails", [True, False])
def test_quiet_restores_what_it_changed(fails: bool) -> None:
    before = (logging.root.manager.disable, transformers_logging.is_progress_bar_enabled(), list(warnings.filters))
    with pytest.raises(KeyError) if fails else warnings.catch_warnings(), quiet():
        assert not transformers_logging.is_progress_bar_enabled()
        if fails:
            raise KeyError
    after = (logging.root.manager.disable, transformers_logging.is_progress_bar_enabled(), list(warnings.filters))
    assert after == before


def test_counting_changes_no_number_and_counts_every_item() -> None:
    tokenizer = word_tokenizer(97)
    tokenizer.pad_token = tokenizer.eos_token
    loaded = Loaded(make_model("llama", 0).eval(), tokenizer)
    problems, texts, counted = arithmetic_problems(5, 1), style_texts(3, 1), list[int]()
    torch.manual_seed(0)
    assert answers(loaded, problems, 2, counted.append) == answers(loaded, problems, 2)
    assert matching_share(loaded, problems, 2, counted.append) == matching_share(loaded, problems, 2)
    assert mean_loss(loaded, texts, counted.append) == mean_loss(loaded, texts)
    assert counted == [2, 2, 1, 2, 2, 1, 3]


def test_a_bar_that_is_counted_to_its_end_is_full() -> None:
    with measuring(["a", "b"], 3, bar=True) as watched:
        for name in ("a", "b"):
            tick = watched.begin(name)
            tick(2)
            tick(1)
        assert watched._bar.n == watched._bar.total == 6
