"""Output to whatever the commands are connected with."""

from __future__ import annotations

import sys

import click


def show_any_name() -> None:
    """Names of models may hold letters that the output has no code for (pipes on Windows): they appear as ``?``."""
    reconfigure = getattr(sys.stdout, "reconfigure", None)
    if reconfigure is not None:
        reconfigure(errors="replace")


def say(what: str) -> None:
    """One line for one step, beside the table that goes to standard output."""
    click.echo(f"… {what}", err=True)
