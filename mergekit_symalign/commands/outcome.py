"""How every command ends: exit codes, errors in one line, and when progress bars are drawn (docs/commands.md)."""

from __future__ import annotations

import errno
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import click
from safetensors import SafetensorError

from mergekit_symalign.errors import (
    AlignmentFileError,
    CheckpointError,
    HostError,
    HubFailureError,
    OtherModelsError,
    OtherStatisticsError,
    StatisticsFileError,
    SymalignError,
    ValueInTensorError,
    WorkerError,
)

_NOT_THE_CALL = (
    CheckpointError,
    ValueInTensorError,
    AlignmentFileError,
    StatisticsFileError,
    HubFailureError,
    HostError,
    WorkerError,
)
"""What another call does not help against: damaged files, no connection, workers that die, an unknown MergeKit."""
_WRONG_NAME = (OtherModelsError, OtherStatisticsError)
_PATHS = frozenset(
    (errno.ENOENT, errno.EEXIST, errno.ENOTDIR, errno.EISDIR, errno.EACCES, errno.EPERM, errno.EROFS, errno.ELOOP)
) | {errno.ENAMETOOLONG}
"""What is wrong with a path that the user can give otherwise, in contrast to a full or broken disk."""
_OUT_OF_MEMORY = ("out of memory", "can't allocate memory", "not enough memory")


class BadInput(click.ClickException):
    """A command cannot start with what it was given."""

    exit_code = 2


class Command(click.Command):
    """One of our commands: whatever it raises is explained as far as it can be, bars are drawn on a terminal only."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        try:
            return super().parse_args(ctx, args)
        except (ValueError, IndexError) as error:  # MergeKit's option types
            raise click.UsageError(f"the value of an option cannot be read ({error})", ctx) from error

    def invoke(self, ctx: click.Context) -> Any:
        with readable(), _library_bars(bars(ctx.params.get("quiet", False))):
            return super().invoke(ctx)


@contextmanager
def readable() -> Iterator[None]:
    """Errors in one line, with their exit code. What cannot be explained stays as it is."""
    try:
        yield
    except Exception as error:
        shown = explained(error)
        if shown is None:
            raise
        raise shown from error


def explained(error: Exception) -> click.ClickException | None:
    """The error as it is shown; None if nobody expected it, so that its traceback is what helps.

    Exit code 2 says that another call would do, 1 that it would not.
    """
    if isinstance(error, click.ClickException) and isinstance(error.__cause__, SymalignError):
        return explained(error.__cause__)  # from a merge inside a command (graph/error_translation.py)
    if isinstance(error, SymalignError):
        final = isinstance(error, _NOT_THE_CALL) and not isinstance(error, _WRONG_NAME)
        return click.ClickException(str(error)) if final else BadInput(str(error))
    if isinstance(error, OSError):
        kind = BadInput if error.errno in _PATHS else click.ClickException
        return kind(f"{error.filename or 'writing'}: {error.strerror or error}")
    if isinstance(error, SafetensorError):  # inputs are checked before: this is a file that could not be written
        return click.ClickException(f"writing: {error}")
    if _is_out_of_memory(error):
        return click.ClickException(
            f"out of memory: {_first_line(error)}. Close other programs, or use a device or a machine with more memory."
        )
    return None


def _is_out_of_memory(error: Exception) -> bool:
    return isinstance(error, MemoryError) or (
        isinstance(error, RuntimeError) and any(words in str(error).lower() for words in _OUT_OF_MEMORY)
    )


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")


def bars(quiet: bool) -> bool:
    """Whether to draw progress bars: on a terminal only."""
    return not quiet and sys.stderr.isatty()


@contextmanager
def _library_bars(shown: bool) -> Iterator[None]:
    """Whether transformers and huggingface_hub draw theirs."""
    from transformers.utils import logging

    if shown or not logging.is_progress_bar_enabled():
        yield
        return
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.enable_progress_bar()
