"""The sizes of parts 7 and 8, read from ``skills.yml`` and ``skill-encoders.yml``."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from ..settings import HERE


@dataclass(frozen=True)
class Mix:
    """Models that are merged, and how.

    Attributes:
        kinds: what each model was trained on.
        weights: of the models; they add up to 1.
        arms: the group of arms that are measured (``merges/arms.yml``).
    """

    kinds: tuple[str, ...]
    weights: tuple[float, ...]
    arms: str

    @staticmethod
    def of(content: dict[str, Any]) -> Mix:
        kinds = tuple(content["kinds"])
        weights = tuple(content.get("weights", [1 / len(kinds)] * len(kinds)))
        return Mix(kinds, weights, content["arms"])

    @property
    def name(self) -> str:
        """Such as ``log+arithmetic``, or ``log:0.3+arithmetic:0.7`` where the weights differ."""
        if len(set(self.weights)) == 1:
            return "+".join(self.kinds)
        return "+".join(f"{kind}:{weight:g}" for kind, weight in zip(self.kinds, self.weights, strict=True))


@dataclass(frozen=True)
class Skills:
    """Everything that a result depends on, apart from the machine.

    Attributes:
        steps, batch, tokens: batches, sequences per batch, tokens per sequence of a fine-tune.
        learning_rate: of AdamW; it warms up over ten steps.
        heldout: texts of each kind from which losses are measured.
        costs: whether the commands are timed, each in a process of its own.
    """

    name: str
    seeds: tuple[int, ...]
    steps: int
    learning_rate: float
    batch: int
    tokens: int
    heldout: int
    costs: bool
    mixes: tuple[Mix, ...]

    @staticmethod
    def read(name: str, file: Path | None = None) -> Skills:
        """The settings in ``<name>.yml`` beside the study, or in another file."""
        content: dict[str, Any] = yaml.safe_load((file or HERE / f"{name}.yml").read_text("utf-8"))
        mixes = tuple(map(Mix.of, content["mixes"]))
        return Skills(name=name, **content | {"seeds": tuple(content["seeds"]), "mixes": mixes})

    @property
    def kinds(self) -> tuple[str, ...]:
        """All kinds that a model is trained on, in the order in which they are first named."""
        return tuple(dict.fromkeys(kind for mix in self.mixes for kind in mix.kinds))
