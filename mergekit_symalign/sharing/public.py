"""A file as strangers may see it: its models under names that they know, and no folder of this machine."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from mergekit_symalign.alignment_file import AlignmentFile, renamed
from mergekit_symalign.errors import HubError
from mergekit_symalign.hub.address import problem_of_repo, repo_in_cache
from mergekit_symalign.statistics.file import StatisticsFile, renamed_statistics

Exists = Callable[[str], bool]
_NAMELESS = ("", ".", "..", "~")


@dataclass(frozen=True)
class Role:
    """A model that a file belongs to.

    Attributes:
        role: ``anchor`` or ``model``.
        known: its name in the file.
        name: the one that is published.
        on_the_hub: whether that is a repository.
    """

    role: str
    known: str
    name: str
    on_the_hub: bool


def role_of(role: str, known: str, given: str | None, exists: Exists) -> Role:
    """The name to publish for a model.

    Args:
        role: ``anchor`` or ``model``.
        known: the name in the file.
        given: what the user wants it to be called.
        exists: whether the Hub has a repository of this name.

    Raises:
        HubError: if the user gives what is no repository.
    """
    if given is None:
        name = "+".join(_without_folders(part, exists) for part in known.split("+"))
        repo = name.partition("@")[0]
        return Role(role, known, name, problem_of_repo(repo) is None and (name == known or exists(repo)))
    if (problem := problem_of_repo(given.partition("@")[0])) is not None:
        raise HubError(f"--{role} {given}", problem, f"Write --{role} user/repo")
    return Role(role, known, given, on_the_hub=True)


def public_alignment(file: AlignmentFile, anchor: str, model: str, path: Path) -> AlignmentFile:
    """The same alignment under other names, without folders in its settings; itself if nothing changes.

    Args:
        file: what to publish.
        anchor, model: the names.
        path: for a new file.
    """
    origin = file.origin
    by_block = {block: _settings(of) for block, of in origin.settings_by_block.items()}
    new = replace(origin, anchor=anchor, model=model, settings=_settings(origin.settings), settings_by_block=by_block)
    return file if new == origin else renamed(file, path, new)


def public_statistics(file: StatisticsFile, model: str, path: Path) -> StatisticsFile:
    """The same statistics under another name; itself if nothing changes. Shards are called after ``path``."""
    same = model == file.origin.model
    if same and (len(set(file.places.values())) < 2 or file.path.name.startswith(path.name)):
        return file
    return renamed_statistics(file, path, file.origin.model_copy(update={"model": model}))


def _settings(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Without the folders of files, such as those of prompts."""
    return {name: _last(value) if isinstance(value, str) else value for name, value in settings.items()}


def _without_folders(name: str, exists: Exists) -> str:
    """One part of a reference to a model (``model``, ``model@revision``)."""
    path, at, revision = name.partition("@")
    if (cached := repo_in_cache(path)) is not None:
        return cached
    if problem_of_repo(path) is None and not Path(path).exists() and exists(path):
        return name
    last = _last(path)
    return ("model" if last in _NAMELESS else last) + at + revision


def _last(path: str) -> str:
    """The last part of a path of any system."""
    return re.split(r"[/\\]", path.rstrip("/\\"))[-1]
