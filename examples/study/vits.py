"""Part 6: Zhang et al.'s table 2 on two vision transformers of different initialisation, and two fine-tunes of one."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import product
from pathlib import Path

import torch

from . import digits
from .store import Row, Store
from .vit_merges import PLAIN, VitMerger
from .vit_models import HALVES, Models, Name, Vits, abilities, load, train

MATCHES = {"apart": (PLAIN, "without-rescale", "match", "activations"), "halves": (PLAIN, "match")}
TABLE_2 = ("simple", "fisher", "regmean", "ot-acts-emd", "ot-acts", "ot-wts")
REBASIN = ("simple", "permutation")
RESPECTED = {"ot-acts": "ot-acts-heads", "ot-wts": "ot-wts-heads"}  # the same transport, heads respected
MERGERS = {
    "apart": TABLE_2,
    "halves": ("simple", "fisher", "regmean", "task-arithmetic", "regmean-task-vectors"),
}
ALONE: dict[str, tuple[Name, ...]] = {"apart": ("one", "other"), "halves": ("base", "low", "high")}


def tried(part: str) -> list[tuple[str, str]]:
    """Every merger with every match, and what is compared beside the table."""
    beside = [REBASIN, *((merger, PLAIN) for merger in RESPECTED.values())]
    return [*product(MERGERS[part], MATCHES[part]), *(beside if part == "apart" else [])]


@dataclass(frozen=True)
class Fusions:
    """The models of all seeds and their merges."""

    settings: Vits
    work: Path
    store: Store

    def run(self) -> None:
        for seed in self.settings.seeds:
            models = Models(self.settings, seed, self.work)
            for part, names in ALONE.items():
                for name in names:
                    self._measure(part, seed, name, "-", lambda m=models, n=name: self._abilities(m.folder(n), m.seed))
        for part in MERGERS:
            for (merger, match), seed in product(tried(part), self.settings.seeds):
                self._measure(
                    part, seed, merger, match, lambda p=part, m=merger, v=match, s=seed: self._merged(p, m, v, s)
                )

    def _measure(self, part: str, seed: int, arm: str, variant: str, measure: Callable[[], Row]) -> None:
        self.store.measure({"part": part, "seed": seed, "arm": arm, "variant": variant}, measure)

    def _merger(self, part: str, models: Models) -> VitMerger:
        names: Mapping[str, Name] = (
            {"reference": "one", "target": "other"}
            if part == "apart"
            else {"base": "base", "reference": "low", "target": "high"}
        )
        images = dict.fromkeys(("reference", "target", "both"), self._images("all"))
        if part == "halves":
            images |= {"reference": self._images("low"), "target": self._images("high")}
        folders = {role: models.folder(name) for role, name in names.items()}
        return VitMerger(folders, images, self.work / f"{part}-{models.seed}")

    def _images(self, shown: str) -> Path:
        """Training images of all digits or of one half, as files."""
        folder = self.work / f"images-{shown}"
        if not folder.exists():
            among = torch.isin(digits.labels("train"), torch.tensor(HALVES.get(shown, range(digits.DIGITS))))
            unfinished = folder.with_name(f"{folder.name}.unfinished")
            shutil.rmtree(unfinished, ignore_errors=True)
            digits.write_images(unfinished, among.nonzero().flatten()[: self.settings.calibration])
            unfinished.rename(folder)
        return folder

    def _merged(self, part: str, name: str, match: str, seed: int) -> Row:
        merger = self._merger(part, Models(self.settings, seed, self.work))
        started = time.perf_counter()
        merged = merger.merge(name, match)
        return {"merge_seconds": time.perf_counter() - started} | self._abilities(merged, seed)

    def _abilities(self, folder: Path, seed: int) -> Row:
        """As it is, and after one more epoch on all the training images."""
        model = load(folder)
        found = abilities(model)
        tuned = abilities(train(model, self.settings.after, self.settings.batch, seed))
        return found | {f"tuned_{name}": tuned[name] for name in ("accuracy", "loss")}
