"""Errors as MergeKit's commands show them: one readable line, exit code 1."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import click

from mergekit_symalign.errors import SymalignError


@contextmanager
def readable_errors() -> Iterator[None]:
    """Inside a command line, turn our errors into click's, which are printed without a traceback."""
    try:
        yield
    except SymalignError as error:
        if click.get_current_context(silent=True) is None:
            raise
        raise click.ClickException(str(error)) from error
