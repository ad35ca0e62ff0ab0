"""The sizes of a study, read from ``full.yml`` or ``small.yml``."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

HERE = Path(__file__).parent


@dataclass(frozen=True)
class Lesson:
    """How long and on what a model is trained.

    Attributes:
        shares: weights of the kinds of sequences (`data.TASKS` and texts).
        steps: batches; the learning rate warms up over `warmup` of them and falls to a tenth along a cosine.
        learning_rate: of AdamW, at its peak.
    """

    shares: dict[str, float]
    steps: int
    learning_rate: float
    warmup: int = 10


@dataclass(frozen=True)
class Settings:
    """Everything that a result depends on, apart from the machine.

    Attributes:
        seeds: one independent run of everything for each.
        model: what the config of the Llama model has beyond the vocabulary.
        batch, length: sequences per step, characters per sequence.
        base, reference, target, reasoner: the four lessons of part 1.
        branches: shares of the base training (per cent) at which targets branch off.
        hot_factor, long_factor: learning rate and steps of the two targets that are trained harder.
        mixing: weights of the target in the averages from which the barrier is read.
        problems: held-out problems per task; sequences: held-out sequences per loss.
    """

    name: str
    seeds: tuple[int, ...]
    model: dict[str, int]
    batch: int
    length: int
    base: Lesson
    reference: Lesson
    target: Lesson
    reasoner: Lesson
    branches: tuple[int, ...]
    hot_factor: float
    long_factor: int
    mixing: tuple[float, ...]
    problems: int
    sequences: int

    @staticmethod
    def read(name: str) -> Settings:
        """The settings in ``<name>.yml`` beside this file.

        Raises:
            FileNotFoundError: if there is no such file.
        """
        content: dict[str, Any] = yaml.safe_load((HERE / f"{name}.yml").read_text("utf-8"))
        lessons = {key: Lesson(**content[key]) for key in ("base", "reference", "target", "reasoner")}
        lists = {key: tuple(content[key]) for key in ("seeds", "branches", "mixing")}
        return Settings(name=name, **content | lessons | lists)
