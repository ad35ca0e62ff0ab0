"""Parts of docs/performance.md that are written from files of results, between two marks."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

PAGE = Path(__file__).parent.parent.parent / "docs" / "performance.md"


def of_files(folder: Path, tables: Callable[[Mapping[str, Any], str], str]) -> str:
    """What every file of results gives, from what it holds and its name; empty if there is none."""
    return "\n".join(tables(json.loads(file.read_text("utf-8")), file.name) for file in sorted(folder.glob("*.json")))


def between(marks: tuple[str, str], text: str, written: str) -> str:
    """A page with another part between two marks."""
    begin, end = marks
    before, _, rest = text.partition(begin)
    _, _, after = rest.partition(end)
    return before + begin + written + end + after
