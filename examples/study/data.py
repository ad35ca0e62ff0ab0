"""What the small models read: text, generated tasks, and problems that are held out of training.

Everything is characters. Text is the Python language reference as it ships with Python (``pydoc_data.topics``), so
nothing is downloaded; a style to learn is the ship's log of the demo. Tasks are one line each, ``prompt=answer``.
"""

from __future__ import annotations

import pydoc_data.topics
import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from mergekit_symalign.demo.data import Split, split_of, style_texts

ALPHABET = "\n" + "".join(map(chr, range(32, 127)))
IDS = {character: i for i, character in enumerate(ALPHABET)}
END = "\n"  # stands between problems, and for padding
IGNORED = -100
DIGITS = 4  # of the strings that are copied, reversed, …
TEXT_BLOCK = 1000  # characters; one block in ten is held out

Problem = tuple[str, str]  # prompt up to and including "=", answer


def _digits(generator: random.Random) -> str:
    return "".join(generator.choice("0123456789") for _ in range(DIGITS))


def _shifted(digits: str, by: int) -> str:
    return "".join(str((int(digit) + by) % 10) for digit in digits)


def _mapped(letter: str, answer: Callable[[str], str]) -> Callable[[random.Random], Problem]:
    def draw(generator: random.Random) -> Problem:
        digits = _digits(generator)
        return f"{letter}{digits}=", answer(digits)

    return draw


def _steps(generator: random.Random) -> Problem:
    """The skill: increment each digit, and once more, with the result in between: ``h385=496,507``."""
    digits = _digits(generator)
    middle = _shifted(digits, 1)
    return f"h{digits}=", f"{middle},{_shifted(middle, 1)}"


TASKS: Mapping[str, Callable[[random.Random], Problem]] = {
    "copy": _mapped("c", lambda digits: digits),
    "increment": _mapped("i", lambda digits: _shifted(digits, 1)),
    "decrement": _mapped("d", lambda digits: _shifted(digits, -1)),
    "complement": _mapped("m", lambda digits: "".join(str(9 - int(digit)) for digit in digits)),
    "first": _mapped("f", lambda digits: digits[0]),
    "steps": _steps,
}


def problems(task: str, n: int, seed: int, split: Split = "heldout") -> list[Problem]:
    """``n`` problems of one split; which split a problem is in depends on its text alone."""
    generator = random.Random(f"{task}/{seed}/{split}")
    found: list[Problem] = []
    while len(found) < n:
        problem = TASKS[task](generator)
        if split_of(problem[0]) == split:
            found.append(problem)
    return found


@cache
def text(kind: str, split: Split) -> str:
    """All text of one kind and split: ``reference`` (the Python language reference) or ``log`` (the ship's log)."""
    if kind == "log":
        return END.join(style_texts(600 if split == "train" else 60, seed=0, split=split))
    everything = " ".join(" ".join(pydoc_data.topics.topics.values()).split())
    everything = "".join(character for character in everything if character in IDS)
    blocks = [everything[i : i + TEXT_BLOCK] for i in range(0, len(everything), TEXT_BLOCK)]
    return "".join(block for i, block in enumerate(blocks) if (i % 10 == 0) == (split == "heldout"))


@dataclass(frozen=True)
class Mixture:
    """What a model is trained on: each sequence of a batch is of one kind, drawn with these weights.

    Attributes:
        shares: task or text kind -> weight.
        length: characters of each sequence.
    """

    shares: Mapping[str, float]
    length: int

    def batch(self, size: int, generator: random.Random, split: Split = "train") -> tuple[Tensor, Tensor]:
        """Ids and labels [size, length]; the loss counts text, and the answers of tasks with their line's end."""
        kinds = generator.choices(list(self.shares), weights=list(self.shares.values()), k=size)
        rows = [self._row(kind, generator, split) for kind in kinds]
        ids, labels = (torch.tensor(side) for side in zip(*rows, strict=True))
        return ids, labels

    def _row(self, kind: str, generator: random.Random, split: Split) -> tuple[list[int], list[int]]:
        if kind not in TASKS:
            source = text(kind, split)
            start = generator.randrange(len(source) - self.length)
            ids = encode(source[start : start + self.length])
            return ids, ids
        ids, labels = [IDS[END]], [IGNORED]
        while len(ids) < self.length:
            prompt, answer = self._problem(kind, generator, split)
            ids += encode(prompt + answer + END)
            labels += [IGNORED] * len(prompt) + encode(answer + END)
        return ids[: self.length], labels[: self.length]

    def _problem(self, task: str, generator: random.Random, split: Split) -> Problem:
        while True:
            problem = TASKS[task](generator)
            if split_of(problem[0]) == split:
                return problem


def encode(characters: str) -> list[int]:
    return [IDS[character] for character in characters]
