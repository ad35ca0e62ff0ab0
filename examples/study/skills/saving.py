"""Directories that appear when they are complete, also where several processes make the same one."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path


def saved(folder: Path, write: Callable[[Path], object]) -> Path:
    """``folder``, made by ``write`` unless it is there; of two that make it at once, the first one's stays."""
    if not folder.exists():
        unfinished = folder.with_name(f"{folder.name}.unfinished-{os.getpid()}")
        shutil.rmtree(unfinished, ignore_errors=True)
        write(unfinished)
        try:
            unfinished.rename(folder)
        except OSError:
            if not folder.exists():
                raise
            shutil.rmtree(unfinished)
    return folder
