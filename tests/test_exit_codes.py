"""How commands end: exit codes as in docs/commands.md, one line instead of a traceback, bars on a terminal only."""

from __future__ import annotations

import errno
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import pytest
import torch
from click.testing import CliRunner, Result
from models import make_model, save, word_tokenizer
from safetensors import SafetensorError
from transformers.utils import logging

from mergekit_symalign import errors
from mergekit_symalign.cli import main
from mergekit_symalign.commands import outcome
from mergekit_symalign.commands.outcome import Command, explained
from mergekit_symalign.errors import SymalignError

ARGUMENTS: dict[str, list[str]] = {
    "demo": [],
    "inspect": ["a", "b"],
    "measure": ["a", "-o", "c.safetensors", "--calibration", "t.txt"],
    "solve": ["a", "b", "-o", "c"],
    "learn": ["a", "b", "--data", "t", "-o", "c"],
    "check-family": [__file__],
    "families": [],
    "apply": ["f", "a", "-o", "c"],
    "verify": ["a", "b"],
    "barrier": ["a", "b", "--text", "t"],
    "push": ["f", "me/files"],
    "compare": ["--average", "a", "b", "--data", "t"],
}
"""Each of our commands, with what it needs to be called; yaml is MergeKit's."""
FINAL = {
    "CheckpointError",
    "ValueInTensorError",
    "AlignmentFileError",
    "StatisticsFileError",
    "HubFailureError",
    "HostError",
    "WorkerError",
}
FAMILY = [
    kind
    for kind in vars(errors).values()
    if isinstance(kind, type) and issubclass(kind, SymalignError) and kind is not SymalignError
]
CASES: list[tuple[Exception, int]] = [
    *((kind("here", "it is wrong", "Correct it"), 1 if kind.__name__ in FINAL else 2) for kind in FAMILY),
    (OSError(errno.ENOSPC, "No space left on device", "out/model.safetensors"), 1),
    (OSError(errno.EIO, "Input/output error", "out"), 1),
    (PermissionError(errno.EACCES, "Permission denied", "out"), 2),
    (FileNotFoundError(errno.ENOENT, "No such file or directory", "in"), 2),
    (OSError(errno.ENAMETOOLONG, "File name too long", "out"), 2),
    (OSError(errno.EROFS, "Read-only file system", "out"), 2),
    (SafetensorError("Error while serializing: I/O error"), 1),
    (MemoryError(), 1),
    (torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."), 1),
    (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"), 1),
    (click.UsageError("--a and --b exclude each other"), 2),
]


def test_every_command_is_one_of_these() -> None:
    assert main.commands.keys() == ARGUMENTS.keys() | {"yaml"}
    assert all(isinstance(main.commands[name], Command) for name in ARGUMENTS)


def _raising(name: str, error: Exception, monkeypatch: pytest.MonkeyPatch) -> Result:
    def fail(**_: Any) -> None:
        raise error

    monkeypatch.setattr(main.commands[name], "callback", fail)
    return CliRunner().invoke(main, [name, *ARGUMENTS[name]])


@pytest.mark.parametrize("name", sorted(ARGUMENTS))
def test_errors_are_one_line_with_an_exit_code(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for error, code in CASES:
        done = _raising(name, error, monkeypatch)
        assert done.exit_code == code, (error, done.output)
        assert isinstance(done.exception, SystemExit)
        assert done.output.splitlines()[-1].startswith("Error: "), done.output


@pytest.mark.parametrize("name", sorted(ARGUMENTS))
@pytest.mark.parametrize("error", [KeyError("k"), RuntimeError("index out of range"), AssertionError(), TypeError("t")])
def test_what_nobody_expected_keeps_its_traceback(name: str, error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    assert _raising(name, error, monkeypatch).exception is error


@pytest.mark.parametrize("name", sorted(ARGUMENTS.keys() - {"demo", "check-family", "families", "push"}))
def test_a_model_that_is_not_there_is_exit_code_2(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "t").write_text("some text\n", "utf-8")
    arguments = [{"a": "./nothing-here", "b": "./nor-here"}.get(x, x) for x in ARGUMENTS[name]]
    done = CliRunner().invoke(main, [name, *arguments])
    assert done.exit_code == 2, done.output
    assert "Error: model ./nothing-here" in done.output
    assert [path.name for path in tmp_path.iterdir()] == ["t"]


@pytest.mark.parametrize("name", ["inspect", "solve", "apply"])
def test_an_option_that_cannot_be_read_is_exit_code_2(name: str) -> None:
    done = CliRunner().invoke(main, [name, *ARGUMENTS[name], "--out-shard-size", "much"])
    assert done.exit_code == 2, done.output
    assert "Traceback" not in done.output


def test_an_error_from_a_merge_inside_a_command_keeps_its_exit_code() -> None:
    """`barrier` runs a merge, which tells click of its errors as mergekit-yaml does, with exit code 1."""
    for error, code in ((errors.ConfigError("a", "b", "c"), 2), (errors.CheckpointError("a", "b", "c"), 1)):
        told = click.ClickException(str(error))
        told.__cause__ = error
        shown = explained(told)
        assert shown is not None
        assert (shown.exit_code, shown.message) == (code, str(error))


# Bars


@pytest.fixture(scope="module")
def commands(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[str]]:
    """A call of each command that does all of its work."""
    folder = tmp_path_factory.mktemp("models")
    paths = [str(save(make_model("llama", i, num_hidden_layers=1), folder / str(i))) for i in range(2)]
    for path in paths:
        word_tokenizer(97).save_pretrained(path)
    (folder / "t.txt").write_text("w1 w2 w3 w4 w5\nw6 w7 w8\n", "utf-8")
    file = str(folder / "alignment.safetensors")
    return {
        "inspect": ["inspect", *paths],
        "solve": ["solve", *paths, "-o", file],
        "apply": ["apply", file, paths[1], "-o", str(folder / "applied")],
        "verify": ["verify", *paths, "--random", "--tokens", "32"],
        "barrier": ["barrier", *paths, "--text", str(folder / "t.txt"), "--points", "2"],
    }


def test_no_bars_off_a_terminal(commands: dict[str, list[str]]) -> None:
    """In the order above: what `solve` writes, `apply` reads."""
    for name, call in commands.items():
        done = CliRunner().invoke(main, call)
        assert done.exit_code == (1 if name == "verify" else 0), done.output
        assert "it/s" not in done.output, name
        assert "%|" not in done.output, name


@pytest.mark.parametrize(("name", "title"), [("inspect", "Inspecting"), ("solve", "Solving"), ("verify", "Layers")])
def test_bars_on_a_terminal(
    name: str, title: str, commands: dict[str, list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert title in _on_a_terminal(commands[name], monkeypatch)
    assert title not in _on_a_terminal([*commands[name], "--quiet"], monkeypatch)


def _on_a_terminal(call: list[str], monkeypatch: pytest.MonkeyPatch) -> str:
    class Terminal:
        """`sys` for the one place that asks; CliRunner puts its own stderr into the real one."""

        def __getattr__(self, name: str) -> Any:
            return getattr(sys, name)

        class stderr:  # noqa: N801
            isatty: Callable[[], bool] = staticmethod(lambda: True)

    monkeypatch.setattr(outcome, "sys", Terminal())
    return CliRunner().invoke(main, call).output


def test_bars_of_transformers_are_switched_off_and_on_again(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[bool] = []
    monkeypatch.setattr(main.commands["demo"], "callback", lambda **_: seen.append(logging.is_progress_bar_enabled()))
    assert logging.is_progress_bar_enabled()
    assert CliRunner().invoke(main, ["demo"]).exit_code == 0
    assert seen == [False]
    assert logging.is_progress_bar_enabled()
