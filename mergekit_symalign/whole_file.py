"""Files that appear under their names only when they are whole."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def written_whole(path: Path) -> Iterator[Path]:
    """A name beside ``path`` to write to; it becomes ``path`` when all is written, and is removed on an error."""
    scratch = path.with_name(f".{os.getpid()}-{path.name}")
    try:
        yield scratch
        scratch.replace(path)
    finally:
        scratch.unlink(missing_ok=True)
