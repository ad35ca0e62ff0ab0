"""Pairs of texts that belong together, for the encoders of part 4: two kinds that ask for different knowledge."""

from __future__ import annotations

import importlib
import inspect
from functools import cache

from mergekit_symalign.demo.data import Split, split_of

from .data import text

Pair = tuple[str, str]
WORDS = 16
MODULES = (
    "numpy",
    "scipy.linalg",
    "scipy.optimize",
    "scipy.signal",
    "scipy.special",
    "scipy.stats",
    "torch",
    "torch.nn",
)


@cache
def passages(split: Split) -> list[Pair]:
    """Neighbouring pieces of the Python language reference."""
    words = text("reference", split).split()
    pieces = [" ".join(words[i : i + WORDS]) for i in range(0, len(words) - WORDS, WORDS)]
    return list(zip(pieces[::2], pieces[1::2], strict=False))


@cache
def functions(split: Split) -> list[Pair]:
    """Names of functions and classes of the pinned packages, and the first sentence of their documentation."""
    pairs = {}
    for module in map(importlib.import_module, MODULES):
        for name in sorted(dir(module)):
            said = summary(getattr(module, name, None))
            if not name.startswith("_") and said and split_of(name) == split:
                pairs[name] = (name.replace("_", " "), said)
    return list(pairs.values())


def summary(entry: object) -> str:
    """The first prose line of a docstring, without signatures."""
    lines = (inspect.getdoc(entry) or "").splitlines() if callable(entry) else []
    return next((line for line in lines if len(line.split()) > 3 and "(" not in line), "")


KINDS = {"passages": passages, "functions": functions}
