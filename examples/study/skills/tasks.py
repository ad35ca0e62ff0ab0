"""Two classification tasks with eight classes each, for the encoders of part 8.

``topics``: from which chapter of the Python language reference a passage is. ``modules``: in which module a function
or class is, by its name and the first sentence of its documentation.
"""

from __future__ import annotations

import importlib
import pydoc_data.topics
from collections.abc import Callable, Mapping
from functools import cache
from typing import NamedTuple

from mergekit_symalign.demo.data import Split, split_of

from ..pairs import MODULES, WORDS, summary

CLASSES = 8


class Example(NamedTuple):
    text: str
    label: int


@cache
def topics(split: Split) -> list[Example]:
    """Passages of the eight longest chapters."""
    chapters = sorted(pydoc_data.topics.topics.values(), key=len, reverse=True)[:CLASSES]
    return [
        Example(passage, label)
        for label, chapter in enumerate(chapters)
        for passage in _passages(chapter)
        if split_of(passage) == split
    ]


@cache
def modules(split: Split) -> list[Example]:
    """Functions and classes of eight modules of the pinned packages; one that several have belongs to the first."""
    found: dict[str, Example] = {}
    for label, module in enumerate(map(importlib.import_module, MODULES)):
        for name in sorted(dir(module)):
            said = summary(getattr(module, name, None))
            if not name.startswith("_") and said and name not in found:
                found[name] = Example(f"{name.replace('_', ' ')}: {said}", label)
    return [example for name, example in found.items() if split_of(name) == split]


def by_class(examples: list[Example]) -> list[list[Example]]:
    """The examples of each class that has some."""
    return [group for label in range(CLASSES) if (group := [e for e in examples if e.label == label])]


def _passages(chapter: str) -> list[str]:
    words = chapter.split()
    return [" ".join(words[i : i + WORDS]) for i in range(0, len(words) - WORDS, WORDS)]


TASKS: Mapping[str, Callable[[Split], list[Example]]] = {"topics": topics, "modules": modules}
