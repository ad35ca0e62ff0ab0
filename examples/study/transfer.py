"""Parts 1 and 2: what alignment does for skill transfer and for averages, by how the target drifted."""

from __future__ import annotations

import json
import random
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from .data import ALPHABET, Mixture
from .evaluation import abilities, deviation, loss
from .lineage import FINE_TUNED, Drift, Lineage
from .merging import Merger, available, distances, moved_heads, moved_neurons
from .models import load_state, with_state
from .settings import Settings
from .store import Row, Store

SWEPT = ("plain", "weights", "activations", "full")  # of every drift; the others of plain fine-tuning only
ABLATED = ("rotation", "scale", "permutation")
OWN = ("copy", "increment", "decrement", "complement")
PROMPTS = 160  # sequences for matching from activations


def own_tasks(row: Row) -> float:
    """What a target can do besides the skill: mean exact match on its tasks."""
    return sum(row[task] for task in OWN) / len(OWN)


@dataclass(frozen=True)
class Transfer:
    """The experiments of one seed.

    Attributes:
        lineage: trains the models, when they are first wanted.
        store: holds what was measured before.
    """

    settings: Settings
    lineage: Lineage
    store: Store

    def run(self, drift: Drift) -> None:
        """Measure what is missing of one drift."""
        lineage = self.lineage
        alone = {"base": lineage.base, "reference": lineage.reference, "reasoner": lineage.reasoner}
        for name, folder in alone.items():
            self._measure("alone", name, "-", lambda f=folder: self._abilities(f()))
        self._measure("alone", drift.name, "-", lambda: self._abilities(lineage.target(drift)))
        for variant in self._wanted(drift):
            self._measure("merge", drift.name, variant, lambda v=variant: self._merge(drift, v))
        for variant in ABLATED:
            self._measure("distance", drift.name, variant, lambda v=variant: self._distance(drift, v))

    def _wanted(self, drift: Drift) -> Sequence[str]:
        names = (*SWEPT, *ABLATED) if drift.name == FINE_TUNED else SWEPT
        return [name for name in names if available(name)]

    def _measure(self, part: str, arm: str, variant: str, measure) -> Row:
        identity = {"part": part, "seed": self.lineage.seed, "arm": arm, "variant": variant}
        return self.store.measure(identity, measure)

    def _abilities(self, folder: Path) -> Row:
        model = with_state(self.settings, load_state(folder))
        return abilities(model, self.settings) | {"base_loss": loss(model, self.settings.base.shares, self.settings)}

    def _merge(self, drift: Drift, variant: str) -> Row:
        merger = self._merger(drift)
        started = time.perf_counter()
        skilled = merger.merge("transfer", variant)
        seconds = time.perf_counter() - started
        aligned = merger.aligned(variant)
        found = abilities(with_state(self.settings, skilled), self.settings)
        return found | self._path(aligned) | self._rewritten(merger, aligned) | {"merge_seconds": seconds}

    def _distance(self, drift: Drift, variant: str) -> Row:
        merger = self._merger(drift)
        return distances(load_state(merger.models["reference"]), merger.merge("rewrite", variant))

    def _merger(self, drift: Drift) -> Merger:
        lineage = self.lineage
        models = {"reference": lineage.reference(), "reasoner": lineage.reasoner(), "target": lineage.target(drift)}
        return Merger(models, lineage.work / "merge", prompts(self.settings, lineage))

    def _path(self, aligned: Merger) -> Row:
        """Loss on the base mixture along the line from the reference to the target."""
        points = []
        for share in self.settings.mixing:
            averaged = with_state(self.settings, aligned.merge("average", "plain", (1 - share, share)))
            points.append(loss(averaged, self.settings.base.shares, self.settings))
        return {"path": [round(point, 5) for point in points]}

    def _rewritten(self, merger: Merger, aligned: Merger) -> Row:
        """Distance of the aligned target to the reference, and what alignment did to the target."""
        anchor, before = (load_state(merger.models[name]) for name in ("reference", "target"))
        after = load_state(aligned.models["target"])
        models = [with_state(self.settings, state) for state in (before, after)]
        return {
            **distances(anchor, after),
            "moved_neurons": moved_neurons(before, after),
            "moved_heads": moved_heads(before, after, self.settings.model["head_dim"]),
            "deviation": deviation(*models, self.settings),
            "alone": own_tasks(abilities(models[1], self.settings)),
        }


def prompts(settings: Settings, lineage: Lineage) -> Path:
    """Training sequences of base and target as prompts, written once."""
    path = lineage.work / "prompts.jsonl"
    if not path.exists():
        ids, _ = Mixture(settings.target.shares, settings.length).batch(PROMPTS, random.Random("prompts"))
        texts = ["".join(ALPHABET[i] for i in row) for row in ids.tolist()]
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), "utf-8")
    return path
