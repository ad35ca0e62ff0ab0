"""The names of our merge methods, and what to say about one that nobody has."""

from __future__ import annotations

from collections.abc import Collection
from difflib import SequenceMatcher

from mergekit_symalign.errors import UnknownMethodError

PREFIX = "aligned_"
ROTATION_MATCH = "rotation_match"
WITH_DATA = ("regmean", "fisher", "regmean_task_arithmetic", "ot_fusion")
_LIKE = 0.75  # similarity from which a name is taken for a misspelling of another one
_NEAR = 0.6  # similarity from which a name is worth mentioning
_SHOWN = 3


def is_ours(name: str) -> bool:
    return name in (ROTATION_MATCH, *WITH_DATA) or name.startswith(PREFIX)


def misspelt(name: str, known: Collection[str]) -> UnknownMethodError | None:
    """The error for a name that no method has, if one of ours is meant; None if it is MergeKit's business.

    Args:
        name: what was asked for.
        known: the names of all methods.
    """
    asked = name.strip().lower().replace("-", "_")
    nearest = max(known, key=lambda one: _likeness(asked, one), default="")
    if not is_ours(asked) and not (is_ours(nearest) and _likeness(asked, nearest) >= _LIKE):
        return None
    return UnknownMethodError(f"merge_method {name}", "there is no merge method of this name", _remedy(asked, known))


def _remedy(asked: str, known: Collection[str]) -> str:
    inner = asked.removeprefix(PREFIX)
    if inner in known and f"{PREFIX}{inner}" not in known:
        return f"Use {inner} itself, which has no aligned form"
    ours = sorted(filter(is_ours, known), key=lambda one: -_likeness(asked, one))
    near = [one for one in ours if _likeness(asked, one) >= _NEAR][:_SHOWN]
    return f"Did you mean {' or '.join(near)}?" if near else f"Known: {', '.join(sorted(ours))}"


def _likeness(one: str, other: str) -> float:
    return SequenceMatcher(None, one, other, autojunk=False).ratio()
