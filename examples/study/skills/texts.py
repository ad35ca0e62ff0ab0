"""What the models of part 7 are trained on, measured on, and what statistics are measured from."""

from __future__ import annotations

import json
import random
from functools import cache
from pathlib import Path
from typing import Any

from mergekit_symalign.activations.defaults import DEFAULT_PROMPTS
from mergekit_symalign.demo.data import Split, arithmetic_problems, style_texts

from ..data import text

KINDS = ("log", "arithmetic", "reference", "file")
LINES = 4  # problems in a text
LENGTH = 400  # characters of a piece of running text
BLOCK = 10  # one piece in ten is held out


@cache
def texts(kind: str, split: Split, file: Path | None = None) -> list[str]:
    """All texts of a kind and split: ``log``, ``arithmetic``, ``reference`` or ``file`` (a text file of the user's)."""
    if kind == "log":
        return style_texts(4000 if split == "train" else 400, seed=0, split=split)
    if kind == "arithmetic":
        return _problems(6000 if split == "train" else 400, split)
    if kind == "reference":
        return _pieces(text("reference", split))
    if kind == "file" and file is not None:
        pieces = _pieces(file.read_text("utf-8"))
        return [piece for i, piece in enumerate(pieces) if (i % BLOCK == 0) == (split == "heldout")]
    raise ValueError(f"there are no texts of the kind {kind}. Known: {', '.join(KINDS)} (file with --text FILE).")


def drawn(kind: str, split: Split, n: int, seed: int, file: Path | None = None) -> list[str]:
    """``n`` texts, or all that there are."""
    everything = texts(kind, split, file)
    return random.Random(seed).sample(everything, min(n, len(everything)))


def prompts(part: int) -> list[str]:
    """One half (0 or 1) of the package's own prompts: for statistics, or for the loss on other text."""
    lines = DEFAULT_PROMPTS.read_text("utf-8").splitlines()
    return [json.loads(line)["prompt"] for line in lines[part::2]]


def write_prompts(lines: list[dict[str, Any]], path: Path) -> Path:
    """A file of prompts for ``--calibration``."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), "utf-8")
    return path


def _problems(n: int, split: Split) -> list[str]:
    lines = [problem.prompt + problem.answer for problem in arithmetic_problems(n, seed=0, split=split)]
    return ["\n".join(lines[i : i + LINES]) for i in range(0, n, LINES)]


def _pieces(source: str) -> list[str]:
    return [source[i : i + LENGTH] for i in range(0, len(source) - LENGTH, LENGTH)]
