"""Every command says what it does, and shows one call that is right."""

from __future__ import annotations

import re
import shlex

import click
import pytest
from click.testing import CliRunner

from mergekit_symalign.cli import _refusing, main

COMMANDS = sorted(main.commands)


def _help(*arguments: str) -> str:
    done = CliRunner().invoke(main, [*arguments, "--help"], catch_exceptions=False)
    assert done.exit_code == 0
    return done.output


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_an_example_that_it_understands(command: str) -> None:
    """Its names and options are the command's own: click reads the whole line, short of running it."""
    (example,) = re.findall(r"^ *Example: (mergekit-symalign .*)$", _help(command), flags=re.M)
    program, name, *arguments = shlex.split(example)
    assert (program, name) == ("mergekit-symalign", command)
    own = main.commands[command]
    context = own.make_context(name, arguments, resilient_parsing=False, parent=click.Context(main))
    required = {p.name for p in own.params if p.required}
    assert all(context.params[p] not in (None, ()) for p in required if p)


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_begins_with_what_it_does(command: str) -> None:
    first = (main.commands[command].help or "").strip().splitlines()[0]
    assert re.match(r"[A-Z][a-z]+ ", first), first
    assert main.commands[command].get_short_help_str(200).rstrip(".")


def test_the_program_itself_has_an_example() -> None:
    shown = _help()
    (name,) = re.findall(r"Example: mergekit-symalign (\w+) ", shown)
    assert name in COMMANDS
    assert all(re.search(rf"^  {command} ", shown, flags=re.M) for command in COMMANDS)


def test_a_command_that_cannot_run_here_has_an_example_too() -> None:
    assert "Example" in (_refusing("solve", "lacks something").help or "")
