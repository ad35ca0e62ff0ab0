"""Part 3: the target of part 1 in coordinates that tools leave behind, merged plainly and aligned."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path

from safetensors.torch import save_file

from .coordinates import CHANGES
from .evaluation import abilities, deviation
from .lineage import FINE_TUNED, Lineage, drifts
from .merging import Merger, distances
from .models import WEIGHTS, State, load_state, with_state
from .settings import Settings
from .store import Row, Store


@dataclass(frozen=True)
class Foreign:
    """The experiments of one seed."""

    settings: Settings
    lineage: Lineage
    store: Store

    def run(self) -> None:
        for change in CHANGES:
            for variant in ("plain", "neuron-scaling" if change == "scaled-channels" else "weights"):
                identity = {"part": "foreign", "seed": self.lineage.seed, "arm": change, "variant": variant}
                self.store.measure(identity, lambda c=change, v=variant: self._merge(c, v))

    def _merge(self, change: str, variant: str) -> Row:
        settings, lineage = self.settings, self.lineage
        target = lineage.target(next(d for d in drifts(settings) if d.name == FINE_TUNED))
        original = load_state(target)
        changed = CHANGES[change](original, settings)
        folder = _written(changed, target, lineage.work / f"foreign-{change}")
        models = {"reference": lineage.reference(), "reasoner": lineage.reasoner(), "target": folder}
        merger = Merger(models, lineage.work / "merge", lineage.work / "prompts.jsonl")
        found = abilities(with_state(settings, merger.merge("transfer", variant)), settings)
        after = load_state(merger.aligned(variant).models["target"])
        return {
            **found,
            "deviation": deviation(*(with_state(settings, state) for state in (original, changed)), settings),
            **distances(load_state(models["reference"]), after),
        }


def _written(state: State, like: Path, folder: Path) -> Path:
    """A copy of a checkpoint with other weights. One directory each: MergeKit keeps files open by their path."""
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(like, folder)
    save_file(state, folder / WEIGHTS, {"format": "pt"})
    return folder
