"""The text of an alignment file, as data that validate themselves: nothing of it is believed before it was checked.

A file may come from a stranger. Its text is measured first. Then a parser reads it that admits each key once and finite
numbers only. Then it is compared with the types below.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Mapping
from typing import Annotated, Any, NoReturn

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError

FORMAT = 3
MOST_TEXT = 8 << 20  # characters; an alignment of 126 layers has half a million
_DEPTH = 16  # of brackets; a file has 7
_REPEATS = 1024  # of a matrix along the heads of an axis
_EXACT = 2**53  # whole numbers that every reader of JSON keeps
_HUGE = 1e30  # of facts, whose sums must stay finite
_COUNTED = ("neurons", "experts", "kv_heads", "query_heads")
_OWN = frozenset(("layer", "block"))  # what a report says itself of each block
_BRACKETS = re.compile(r'"(?:[^"\\]|\\.)*"|[\[{]|[\]}]', re.DOTALL)


class NewerFormatError(ValueError):
    """A later version wrote this."""


def _without_controls(text: str) -> str:
    if any(ord(c) < 32 or 127 <= ord(c) < 160 for c in text):
        raise ValueError("it has control characters")
    return text


def _plain_facts(facts: Mapping[str, Any]) -> Mapping[str, Any]:
    """What reports sum, compare and take roots of."""
    for name, value in facts.items():
        if name in _OWN:
            raise ValueError(f"{name} is not a fact that a solve reports")
        if isinstance(value, str) != (name == "objective" or name.endswith("_route")):
            raise ValueError(f"{name} cannot be {shown(repr(value))}")
        if not isinstance(value, str) and not 0 <= value <= (_EXACT if isinstance(value, int) else _HUGE):
            raise ValueError(f"{name} cannot be {shown(repr(value))}")
    for name in _COUNTED:
        moved = facts.get(f"{name}_moved", _HUGE if name in facts else 0)
        if moved > facts.get(name, 0):
            raise ValueError(f"{name} and {name}_moved do not belong together")
    return facts


_Text = Annotated[str, Field(max_length=4096), AfterValidator(_without_controls)]
_Word = Annotated[str, Field(max_length=128), AfterValidator(_without_controls)]
_Float = Annotated[float, Field(allow_inf_nan=False)]
_Int = Annotated[int, Field(ge=-_EXACT, le=_EXACT)]
_Setting = bool | _Int | _Float | _Text | None
_Facts = Annotated[dict[_Word, int | _Float | _Word], Field(max_length=64), AfterValidator(_plain_facts)]
Reference = tuple[_Word, Annotated[int, Field(ge=1, le=_REPEATS)]]  # a tensor's name, and how often its rows repeat
Step = tuple[_Word, Annotated[list[Reference], Field(max_length=8)]]
Blocks = dict[_Word, dict[_Word, list[Step]]]


class _Data(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid", frozen=True)


class OriginData(_Data):
    """`Origin`, as it is written."""

    anchor: _Text
    model: _Text
    anchor_fingerprint: _Word
    model_fingerprint: _Word
    family: _Word
    sizes: dict[_Word, _Int]
    settings: dict[_Word, _Setting] = Field(default_factory=dict)
    versions: dict[_Word, _Word] = Field(default_factory=dict)
    settings_by_block: dict[_Word, dict[_Word, _Setting]] = Field(default_factory=dict)


class FirstContent(_Data):
    """Format 1: the digest covers the numbers only."""

    format: int
    origin: OriginData
    blocks: Blocks
    facts: dict[_Word, _Facts] = Field(default_factory=dict)
    sha256: _Word


class Content(FirstContent):
    """Format 2: the digest covers this text, which has a digest of each tensor. Format 3 has more kinds of steps."""

    tensors: dict[_Word, tuple[_Word, list[int], _Word]]


def parsed(text: str) -> FirstContent:
    """The content of a file's text.

    Raises:
        NewerFormatError: if a later version wrote it.
        ValueError: if it is anything else than what this version or an earlier one writes.
    """
    raw = _loaded(text)
    version = raw.get("format")
    if type(version) is not int or version < 1:
        raise ValueError("it gives no format")
    if version > FORMAT:
        raise NewerFormatError(f"its format is {version}, newer than the {FORMAT} that this version reads")
    try:
        content = (FirstContent if version == 1 else Content).model_validate_json(text)
    except ValidationError as error:
        raise ValueError(_first_of(error)) from None
    if isinstance(content, Content) and digest(raw) != content.sha256:
        raise ValueError("they differ from what was saved")
    if foreign := {*content.facts, *content.origin.settings_by_block} - content.blocks.keys():
        raise ValueError(f"they describe {shown(min(foreign))}, which is not a block of the file")
    return content


def digest(content: Mapping[str, Any]) -> str:
    """SHA-256 of everything but the entry that holds it, whatever the order of the keys."""
    rest = {key: value for key, value in content.items() if key != "sha256"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def finite_facts(facts: Mapping[str, Any]) -> dict[str, Any]:
    """Facts as a file may hold them: without numbers that are not finite, and with what rounding made negative as 0."""
    return {
        name: value if isinstance(value, str) else max(value, type(value)(0))
        for name, value in facts.items()
        if isinstance(value, str) or math.isfinite(value)
    }


def shown(text: object, most: int = 60) -> str:
    """What a file says, or a parser says of it, fit for a message: not longer, and without control characters."""
    plain = "".join(c if c.isprintable() else "?" for c in str(text)[: most + 1])
    return plain if len(plain) <= most else plain[:most] + "…"


def _loaded(text: str) -> dict[str, Any]:
    if len(text) > MOST_TEXT:
        raise ValueError(f"they have {len(text)} characters, more than the {MOST_TEXT} that any alignment needs")
    if _depth(text) > _DEPTH:
        raise ValueError(f"they are nested more than {_DEPTH} deep")
    raw = json.loads(text, object_pairs_hook=_once_each, parse_constant=_no_number)
    if not isinstance(raw, dict):
        raise ValueError("they are not a JSON object")
    return raw


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


def _first_of(error: ValidationError) -> str:
    first = error.errors(include_url=False, include_input=False)[0]
    return f"{shown('.'.join(map(str, first['loc'])))}: {shown(first['msg'], 200)}"
