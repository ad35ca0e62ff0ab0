"""What models are called in pictures and tables: as on a model card, not where they lie."""

from __future__ import annotations

import re
import tempfile
from collections.abc import Sequence
from pathlib import Path

from mergekit_symalign.hub.address import repo_in_cache


def short_names(references: Sequence[str]) -> list[str]:
    """Hub ids as they are, and of local models the folder's name; with the folder around it where two are the same."""
    names = [_joined(reference, 1) for reference in references]
    return [_joined(r, 2) if names.count(name) > 1 else name for r, name in zip(references, names, strict=True)]


def in_a_table(reference: str) -> str:
    """As the user wrote it, unless it lies in a temporary directory."""
    temporary = Path(tempfile.gettempdir()).resolve()
    paths = (Path(part.partition("@")[0]) for part in reference.split("+"))
    lies_there = any(path.is_absolute() and temporary in path.resolve().parents for path in paths)
    return short_names([reference])[0] if lies_there else reference


def _joined(reference: str, parts: int) -> str:
    """``model``, ``model@revision``, ``model+adapter``, each with the last ``parts`` of its path."""
    return "+".join(_short(part, parts) for part in reference.split("+"))


def _short(name: str, parts: int) -> str:
    path, at, revision = name.partition("@")
    if (cached := repo_in_cache(path)) is not None:
        return cached
    if not _is_local(path):
        return name
    found = Path(path).expanduser().resolve()
    return "/".join(found.parts[1:][-parts:]) + at + revision


def _is_local(path: str) -> bool:
    """Whether this is a folder or can only be one; everything else is an id of the hub."""
    return Path(path).exists() or Path(path).is_absolute() or re.fullmatch(r"[\w.-]+(/[\w.-]+)?", path) is None
