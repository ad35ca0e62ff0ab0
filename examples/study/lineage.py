"""The models of one seed, and how they descend from each other. Each is trained once and kept on disk."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from transformers import LlamaForCausalLM

from .models import load_state, new_model, save, with_state
from .settings import Lesson, Settings
from .training import Snapshot, Trainer

FINE_TUNED = "branch-100"  # the drift of plain fine-tuning, the target of parts 1 and 3


@dataclass(frozen=True)
class Drift:
    """How a target came to differ from the reference.

    Attributes:
        branch: per cent of the base training that both share; None: nothing, not even the initialisation (the target
            descends from the next seed's base).
        rate, steps: factors on learning rate and steps of the target's own lesson.
    """

    name: str
    branch: int | None
    rate: float = 1.0
    steps: int = 1


def drifts(settings: Settings) -> list[Drift]:
    """Plain fine-tuning first, then the extremes, then what lies between."""
    first, *between = sorted(settings.branches, reverse=True)
    fine_tuned, *branches = (Drift(f"branch-{share}", share) for share in (first, *between[-1:], *between[:-1]))
    hot, long = Drift("hot", 100, rate=settings.hot_factor), Drift("long", 100, steps=settings.long_factor)
    return [fine_tuned, hot, Drift("other-start", None), *branches, long]


@dataclass(frozen=True)
class Lineage:
    """Base → reference → reasoner, and base (or a branch of its training) → targets."""

    settings: Settings
    seed: int
    work: Path

    def reference(self) -> Path:
        return self._kept("reference", lambda: self._taught(self.base(), self.settings.reference, "reference"))

    def reasoner(self) -> Path:
        return self._kept("reasoner", lambda: self._taught(self.reference(), self.settings.reasoner, "reasoner"))

    def target(self, drift: Drift) -> Path:
        own = self.settings.target
        lesson = replace(own, steps=own.steps * drift.steps, learning_rate=own.learning_rate * drift.rate)
        return self._kept(drift.name, lambda: self._taught(self._origin(drift), lesson, "target"))

    def base(self) -> Path:
        """The finished base; its training leaves snapshots at every branch."""
        return self._kept("base", self._train_base)

    def _origin(self, drift: Drift) -> Path:
        """The finished base training that the target starts from: the reference's own, a branch, or the next seed's."""
        if drift.branch is None:
            return self._next().base()
        if drift.branch == 100:
            return self.base()
        share = drift.branch
        return self._kept(f"base-of-{drift.name}", lambda: self._train_branch(share))

    def _next(self) -> Lineage:
        """The models of the next seed, which have another initialisation and other data."""
        seeds = self.settings.seeds
        seed = seeds[(seeds.index(self.seed) + 1) % len(seeds)] if len(seeds) > 1 else self.seed + 1
        return Lineage(self.settings, seed, self.work.with_name(f"seed-{seed}"))

    def _train_base(self) -> LlamaForCausalLM:
        model = new_model(self.settings, self.seed)
        keep = {self._step(share) for share in self.settings.branches if share < 100}
        snapshots = self._trainer(self.settings.base, "base").train(model, keep=keep)
        torch.save(snapshots, self.work / "snapshots.pt")
        return model

    def _train_branch(self, share: int) -> LlamaForCausalLM:
        model = new_model(self.settings, self.seed)
        self._trainer(self.settings.base, "branch").train(model, self._snapshot(share))
        return model

    def _snapshot(self, share: int) -> Snapshot:
        self.base()
        snapshots: dict[int, Snapshot] = torch.load(self.work / "snapshots.pt")
        return snapshots[self._step(share)]

    def _step(self, share: int) -> int:
        return self.settings.base.steps * share // 100

    def _taught(self, start: Path, lesson: Lesson, order: str) -> LlamaForCausalLM:
        model = with_state(self.settings, load_state(start))
        self._trainer(lesson, order).train(model)
        return model

    def _trainer(self, lesson: Lesson, order: str) -> Trainer:
        return Trainer(self.settings, lesson, f"{order}/{self.seed}")

    def _kept(self, name: str, make: Callable[[], LlamaForCausalLM]) -> Path:
        folder = self.work / name
        if not folder.exists():
            self.work.mkdir(parents=True, exist_ok=True)
            save(make(), folder)
        return folder

    def discard(self) -> None:
        """Delete this seed's models, to be trained again when they are wanted."""
        shutil.rmtree(self.work, ignore_errors=True)
