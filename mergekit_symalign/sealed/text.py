"""JSON from a stranger: measured first, then parsed with each key once and finite numbers, and known by its digest."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from typing import Annotated, Any, NoReturn

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError

EXACT = 2**53  # whole numbers that every reader of JSON keeps
_DEPTH = 16  # of brackets; a file has 7
_BRACKETS = re.compile(r'"(?:[^"\\]|\\.)*"|[\[{]|[\]}]', re.DOTALL)


class NewerFormatError(ValueError):
    """A later version wrote this."""


def _without_controls(text: str) -> str:
    if any(ord(c) < 32 or 127 <= ord(c) < 160 for c in text):
        raise ValueError("it has control characters")
    return text


Text = Annotated[str, Field(max_length=4096), AfterValidator(_without_controls)]
Word = Annotated[str, Field(max_length=128), AfterValidator(_without_controls)]
Float = Annotated[float, Field(allow_inf_nan=False)]
Int = Annotated[int, Field(ge=-EXACT, le=EXACT)]
Count = Annotated[int, Field(ge=0, le=EXACT)]


class Data(BaseModel):
    """What a file says, of exactly these types."""

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True)


def loaded(text: str, most: int, what: str) -> dict[str, Any]:
    """A JSON object.

    Args:
        text: to be parsed.
        most: characters.
        what: kind of file that never needs more.

    Raises:
        ValueError: if it is anything else, longer, or nested deeper than any file.
    """
    if len(text) > most:
        raise ValueError(f"they have {len(text)} characters, more than the {most} that any {what} needs")
    if _depth(text) > _DEPTH:
        raise ValueError(f"they are nested more than {_DEPTH} deep")
    raw = json.loads(text, object_pairs_hook=_once_each, parse_constant=_no_number)
    if not isinstance(raw, dict):
        raise ValueError("they are not a JSON object")
    return raw


def require_format(raw: Mapping[str, Any], newest: int) -> int:
    """
    Raises:
        NewerFormatError: if a later version wrote it.
        ValueError: if it gives no format.
    """
    version = raw.get("format")
    if type(version) is not int or version < 1:
        raise ValueError("it gives no format")
    if version > newest:
        raise NewerFormatError(f"its format is {version}, newer than the {newest} that this version reads")
    return version


def digest(content: Mapping[str, Any]) -> str:
    """SHA-256 of everything but the entry that holds it, whatever the order of the keys."""
    rest = {key: value for key, value in content.items() if key != "sha256"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def shown(text: object, most: int = 60) -> str:
    """What a file says, or a parser says of it, fit for a message: not longer, and without control characters."""
    plain = "".join(c if c.isprintable() else "?" for c in str(text)[: most + 1])
    return plain if len(plain) <= most else plain[:most] + "…"


def first_of(error: ValidationError) -> str:
    """The first thing that is wrong."""
    first = error.errors(include_url=False, include_input=False)[0]
    return f"{shown('.'.join(map(str, first['loc'])))}: {shown(first['msg'], 200)}"


def _depth(text: str) -> int:
    """How deep brackets are nested."""
    depth = deepest = 0
    for match in _BRACKETS.finditer(text):
        first = match[0][0]
        depth += (first in "[{") - (first in "]}")
        deepest = max(deepest, depth)
    return deepest


def _once_each(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        raise ValueError("a key is given twice")
    return result


def _no_number(name: str) -> NoReturn:
    raise ValueError(f"{name} is not a number")
