"""A repository's README.md in which every file has a section of its own, and all else stays as others wrote it."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import yaml

LIBRARY = "mergekit-symalign"
_FRONT = re.compile(r"\A---\r?\n(.*?\r?\n)?---\r?\n", re.DOTALL)
_SPECIAL = re.compile(r"([\\`*_{}\[\]()#+!|<>~$&])")
_INTRODUCTION = (
    "Files for [MergeKit](https://github.com/arcee-ai/mergekit) with the package `mergekit-symalign`, which aligns "
    "models by the exact symmetries of their architecture before they are merged."
)


def with_section(readme: str | None, repo: str, file: str, facts: Mapping[str, Any], section: str) -> str:
    """A README.md with one file's section in it: in the place of an older one, or at the end.

    Args:
        readme: what is there; None: nothing.
        repo: of the README.
        file: that the section is about.
        facts: of the front matter: lists by key. They join those of a README that has our library's name.
        section: Markdown.
    """
    start, end = (f"<!-- {of}mergekit-symalign: {file} -->" for of in ("", "end of "))
    own = f"{start}\n{section.strip()}\n{end}"
    if readme is None:
        return f"{_front({'library_name': LIBRARY, **facts})}# {plain(repo)}\n\n{_INTRODUCTION}\n\n{own}\n"
    readme = _with_facts(readme, facts)
    there = re.compile(f"{re.escape(start)}.*?{re.escape(end)}", re.DOTALL)
    if there.search(readme):
        return there.sub(lambda _: own, readme, count=1)
    return f"{readme.rstrip()}\n\n{own}\n"


def plain(text: str) -> str:
    """A name as Markdown shows it, whatever characters it has."""
    return _SPECIAL.sub(r"\\\1", text)


def table(rows: Sequence[tuple[str, str]]) -> str:
    """A table of two columns without a head; cells are Markdown."""
    return "\n".join(["| | |", "|---|---|", *(f"| {name} | {value} |" for name, value in rows)])


def _front(facts: Mapping[str, Any]) -> str:
    return f"---\n{yaml.safe_dump(dict(facts), sort_keys=False, allow_unicode=True)}---\n"


def _with_facts(readme: str, facts: Mapping[str, Any]) -> str:
    """Front matter that is ours takes up new tags and models; that of others stays as it is."""
    found = _FRONT.match(readme)
    try:
        known = yaml.safe_load(found[1] or "") if found else None
    except yaml.YAMLError:
        known = None
    if found is None or not isinstance(known, dict) or known.get("library_name") != LIBRARY:
        return readme
    joined = {key: list(dict.fromkeys([*_listed(known.get(key)), *values])) for key, values in facts.items()}
    if all(joined[key] == _listed(known.get(key)) for key in facts):
        return readme
    return _front({**known, **joined}) + readme[found.end() :]


def _listed(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [] if value is None else [value]
