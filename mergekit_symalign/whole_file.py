"""Files that appear under their names only when they are whole."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

_WAITS = (0.05, 0.1, 0.2, 0.4, 0.8)  # seconds


@contextmanager
def written_whole(path: Path) -> Iterator[Path]:
    """A name beside ``path`` to write to; it becomes ``path`` when all is written, and is removed on an error.

    Raises:
        OSError: with the name of ``path``, if it cannot be replaced: Windows keeps files that a program has open.
    """
    scratch = path.with_name(f".{os.getpid()}-{path.name}")
    try:
        yield scratch
        _replace(scratch, path)
    finally:
        with suppress(OSError):  # Windows keeps it while it is open; the error that brought us here says more
            scratch.unlink(missing_ok=True)


def _replace(scratch: Path, path: Path) -> None:
    """Virus scanners and indexers on Windows open a new file for a moment: then try again."""
    for wait in (*_WAITS, None):
        try:
            scratch.replace(path)
            return
        except OSError as error:
            if wait is None or not isinstance(error, PermissionError):
                raise OSError(error.errno, f"cannot be replaced ({error.strerror})", str(path)) from error
            time.sleep(wait)
