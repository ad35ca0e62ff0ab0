"""What the commands share: exit codes and progress bars."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import TypeVar

import click
from tqdm import tqdm

from mergekit_symalign.errors import CheckpointError, SymalignError, ValueInTensorError

Item = TypeVar("Item")


class BadInput(click.ClickException):
    """A command cannot start with what it was given."""

    exit_code = 2


@contextmanager
def readable() -> Iterator[None]:
    """Errors in one line: exit code 1 for damaged checkpoints and full disks, 2 for what the user can correct."""
    try:
        yield
    except (CheckpointError, ValueInTensorError) as error:
        raise click.ClickException(str(error)) from error
    except SymalignError as error:
        raise BadInput(str(error)) from error
    except OSError as error:
        raise click.ClickException(f"{error.filename or 'writing'}: {error.strerror or error}") from error


def bars(quiet: bool) -> bool:
    """Whether to draw progress bars: on a terminal only."""
    return not quiet and sys.stderr.isatty()


def progress(items: Iterable[Item], what: str, *, quiet: bool, total: int | None = None) -> Iterable[Item]:
    """The same items, with a bar."""
    shown: Iterable[Item] = tqdm(items, desc=what, total=total, disable=not bars(quiet), leave=False, ncols=79)
    return shown
