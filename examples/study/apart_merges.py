"""Part 9: a model in another one's coordinates, and the loss on the straight line between the two."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor
from transformers import PreTrainedModel

from mergekit_symalign.cli import main as symalign

from .merging import MERGES, run
from .models import State, load_state
from .store import Row

NONE, LEARNED = "none", "learned"
START = "general"  # of the descent
SAVED = "alignments"
SECONDS = "seconds.txt"  # that an alignment took, beside the aligned model
POINTS = 11  # on the line, both ends included


@dataclass(frozen=True)
class Pair:
    """Two models of one shape.

    Attributes:
        text: a file of training text, for activations and for the descent.
        length: tokens that the models read at most.
        work: where configurations, alignments and aligned models are written.
        learning: options of ``mergekit-symalign learn``.
    """

    anchor: Path
    model: Path
    text: Path
    work: Path
    length: int
    learning: Mapping[str, Any] = field(default_factory=dict)

    def aligned(self, arm: str) -> Path:
        """The model in the anchor's coordinates, an ordinary checkpoint; written now if it was not before."""
        if arm == NONE:
            return self.model
        folder = self.work / arm
        if not folder.exists():
            if arm == LEARNED:
                self.aligned(START)
            started = time.perf_counter()
            if arm == LEARNED:
                self._learn()
            unfinished = run(self.config(arm), self.work, folder.with_name(f"{arm}.unfinished"))
            (unfinished / SECONDS).write_text(f"{time.perf_counter() - started:.1f}", "utf-8")
            unfinished.rename(folder)
        return folder

    def config(self, arm: str) -> dict[str, Any]:
        """The configuration that writes it; the start of the descent is saved as an alignment too."""
        asked = {"alignment": str(self._learned)} if arm == LEARNED else _described()[arm]
        given = {"text": str(self.text), "length": self.length}
        filled = {name: given.get(x, x) if isinstance(x, str) else x for name, x in asked.items()}
        saved = {"save_alignment": str(self.work / SAVED)} if arm == START else {}
        models = [{"model": str(self.model)}]
        merge = {"merge_method": "rotation_match", "base_model": str(self.anchor), "models": models}
        return {**merge, "parameters": filled | saved, "dtype": "float32"}

    @property
    def _learned(self) -> Path:
        return self.work / f"{LEARNED}.safetensors"

    def _learn(self) -> None:
        """From the start that was saved."""
        if not self._learned.exists():
            init = self.work / SAVED / f"{self.model.name}.safetensors"
            options = [x for name, value in self.learning.items() for x in (f"--{name}", str(value))]
            files = ("--data", str(self.text), "--init", str(init), "-o", str(self._learned))
            symalign(["learn", str(self.anchor), str(self.model), *files, *options, "--quiet"], standalone_mode=False)

    def seconds(self, arm: str) -> float:
        """That the alignment took; of the descent with its start."""
        before = self.seconds(START) if arm == LEARNED else 0.0
        return 0.0 if arm == NONE else before + float((self.aligned(arm) / SECONDS).read_text("utf-8"))

    def barrier(self, arm: str, loss: Callable[[State], float]) -> Row:
        """Losses on the line from the anchor to the aligned model, and how far they rise above that line's ends."""
        aligned = self.aligned(arm)
        losses = path(load_state(self.anchor), load_state(aligned), loss)
        return {"barrier": rise(losses), "path": [round(x, 5) for x in losses], "seconds": self.seconds(arm)}


def arms() -> tuple[str, ...]:
    """All that bring one model to the other."""
    return (*_described(), LEARNED)


@cache
def _described() -> dict[str, dict[str, Any]]:
    return dict(yaml.safe_load((MERGES / "apart.yml").read_text("utf-8")))


def path(start: Mapping[str, Tensor], end: Mapping[str, Tensor], loss: Callable[[State], float]) -> list[float]:
    """Losses at `POINTS` points between two states."""
    return [loss(between(start, end, i / (POINTS - 1))) for i in range(POINTS)]


def between(start: Mapping[str, Tensor], end: Mapping[str, Tensor], share: float) -> State:
    """The state at this share of ``end``."""
    return {name: torch.lerp(x, end[name], share) for name, x in start.items()}


def filled(model: PreTrainedModel, state: Mapping[str, Tensor]) -> PreTrainedModel:
    """The model with these weights.

    Raises:
        ValueError: if weights are missing.
    """
    found = model.load_state_dict(dict(state), strict=False)
    if found.missing_keys or found.unexpected_keys:
        raise ValueError(f"{found.missing_keys} are missing, {found.unexpected_keys} were not expected")
    return model.eval()


def rise(losses: Sequence[float]) -> float:
    """The largest rise above the straight line between the losses at both ends (0 if there is none)."""
    last = len(losses) - 1
    return max(x - (losses[0] * (last - i) + losses[last] * i) / last for i, x in enumerate(losses))
