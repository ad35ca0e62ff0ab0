"""The text of an alignment file, as data that validate themselves: nothing of it is believed before it was checked.

A file may come from a stranger. Its text is measured first. Then a parser reads it that admits each key once and finite
numbers only. Then it is compared with the types below.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import AfterValidator, Field, ValidationError

from mergekit_symalign.sealed.text import (
    EXACT,
    Data,
    Float,
    Int,
    Text,
    Word,
    digest,
    first_of,
    loaded,
    require_format,
    shown,
)

FORMAT = 3
MOST_TEXT = 8 << 20  # characters; an alignment of 126 layers has half a million
_REPEATS = 1024  # of a matrix along the heads of an axis
_HUGE = 1e30  # of facts, whose sums must stay finite
_COUNTED = ("neurons", "experts", "kv_heads", "query_heads")
_OWN = frozenset(("layer", "block"))  # what a report says itself of each block


def _plain_facts(facts: Mapping[str, Any]) -> Mapping[str, Any]:
    """What reports sum, compare and take roots of."""
    for name, value in facts.items():
        if name in _OWN:
            raise ValueError(f"{name} is not a fact that a solve reports")
        if isinstance(value, str) != (name == "objective" or name.endswith("_route")):
            raise ValueError(f"{name} cannot be {shown(repr(value))}")
        if not isinstance(value, str) and not 0 <= value <= (EXACT if isinstance(value, int) else _HUGE):
            raise ValueError(f"{name} cannot be {shown(repr(value))}")
    for name in _COUNTED:
        moved = facts.get(f"{name}_moved", _HUGE if name in facts else 0)
        if moved > facts.get(name, 0):
            raise ValueError(f"{name} and {name}_moved do not belong together")
    return facts


_Setting = bool | Int | Float | Text | None
_Facts = Annotated[dict[Word, int | Float | Word], Field(max_length=64), AfterValidator(_plain_facts)]
Reference = tuple[Word, Annotated[int, Field(ge=1, le=_REPEATS)]]  # a tensor's name, and how often its rows repeat
Step = tuple[Word, Annotated[list[Reference], Field(max_length=8)]]
Blocks = dict[Word, dict[Word, list[Step]]]


class OriginData(Data):
    """`Origin`, as it is written."""

    anchor: Text
    model: Text
    anchor_fingerprint: Word
    model_fingerprint: Word
    family: Word
    sizes: dict[Word, Int]
    settings: dict[Word, _Setting] = Field(default_factory=dict)
    versions: dict[Word, Word] = Field(default_factory=dict)
    settings_by_block: dict[Word, dict[Word, _Setting]] = Field(default_factory=dict)


class FirstContent(Data):
    """Format 1: the digest covers the numbers only."""

    format: int
    origin: OriginData
    blocks: Blocks
    facts: dict[Word, _Facts] = Field(default_factory=dict)
    sha256: Word


class Content(FirstContent):
    """Format 2: the digest covers this text, which has a digest of each tensor. Format 3 has more kinds of steps."""

    tensors: dict[Word, tuple[Word, list[int], Word]]


def parsed(text: str) -> FirstContent:
    """The content of a file's text.

    Raises:
        NewerFormatError: if a later version wrote it.
        ValueError: if it is anything else than what this version or an earlier one writes.
    """
    raw = loaded(text, MOST_TEXT, "alignment")
    version = require_format(raw, FORMAT)
    try:
        content = (FirstContent if version == 1 else Content).model_validate_json(text)
    except ValidationError as error:
        raise ValueError(first_of(error)) from None
    if isinstance(content, Content) and digest(raw) != content.sha256:
        raise ValueError("they differ from what was saved")
    if foreign := {*content.facts, *content.origin.settings_by_block} - content.blocks.keys():
        raise ValueError(f"they describe {shown(min(foreign))}, which is not a block of the file")
    return content


def finite_facts(facts: Mapping[str, Any]) -> dict[str, Any]:
    """Facts as a file may hold them: without numbers that are not finite, and with what rounding made negative as 0."""
    return {
        name: value if isinstance(value, str) else max(value, type(value)(0))
        for name, value in facts.items()
        if isinstance(value, str) or math.isfinite(value)
    }
