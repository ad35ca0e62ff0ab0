"""Part 9: models without a common base: what each alignment leaves of the barrier, and which skills it lets move.

``PYTHONPATH=examples python -m study.apart --text FILE``, with any text; the report is of Tiny Shakespeare. What was
measured before is kept.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import combinations
from pathlib import Path

import torch
from torch import Tensor

from .apart_merges import Pair, arms, filled
from .apart_models import Apart, Models, load, loss
from .apart_older import older
from .apart_published import published
from .apart_skills import Transfers
from .apart_text import Corpus, windows
from .data import text
from .models import State
from .settings import HERE
from .store import Row, Store
from .sweep import reproducible

LENGTH = 700  # characters of a prompt: about a window


def documentation(held_out: float) -> Corpus:
    """The second text: the installed Python's language reference."""
    return Corpus(" ".join((text("reference", "train"), text("reference", "heldout"))), held_out)


@dataclass(frozen=True)
class Study:
    """All pairs of models, what was measured of them, and where they lie."""

    models: Models
    store: Store
    older: Path

    @staticmethod
    def open(settings: Apart, corpus: Path, results: Path, work: Path) -> Study:
        """
        Raises:
            ValueError: if the results were measured on another text.
        """
        text = Corpus.read(corpus, settings.held_out)
        settings = replace(settings, digest=text.digest)
        folder = work / f"apart-{text.digest[:8]}"
        models = Models(settings, text, documentation(settings.held_out), folder)
        return Study(models, Store.open(results, settings), work / settings.lineage)

    def add_published(self, folder: Path, shape: str = "gpt2") -> None:
        for number in range(len(list(combinations(self.models.settings.seeds, 2)))):
            for arm, row in published(folder, number).items():
                self._measure(shape, number, arm, "-", lambda found=row: found)

    def run(self) -> None:
        for shape, number, seeds in self.pairs():
            pair = self.pair(shape, seeds)
            for arm in arms():
                self._measure(shape, number, arm, "-", lambda p=pair, a=arm: p.barrier(a, self._loss(p)))
        for shape, number, (seed, other) in self.pairs():
            if seed == self.models.settings.seeds[0]:  # one model learns the skill
                pair = self.pair(shape, (seed, other))
                Transfers(self.models, shape, seed, number, pair, self._measure).run()
        older(self.models.settings, self.older, self._measure)

    def pairs(self) -> Iterator[tuple[str, int, tuple[int, int]]]:
        """Every pair of initialisations, of every shape; pairs share models."""
        settings = self.models.settings
        for number, seeds in enumerate(combinations(settings.seeds, 2)):
            for shape in settings.shapes:
                yield shape, number, seeds

    def pair(self, shape: str, seeds: tuple[int, int]) -> Pair:
        one, other = (self.models.plain(shape, seed) for seed in seeds)
        work = self.models.work / f"{shape}-{seeds[0]}-{seeds[1]}"
        settings = self.models.settings
        return Pair(one, other, self._prompts(), work, settings.training.length, settings.learning)

    def _measure(self, part: str, seed: int, arm: str, variant: str, measure: Callable[[], Row]) -> Row:
        return self.store.measure({"part": part, "seed": seed, "arm": arm, "variant": variant}, measure)

    def _loss(self, pair: Pair) -> Callable[[State], float]:
        """Of states of the anchor."""
        model, _ = load(pair.anchor)
        return lambda state: loss(filled(model, state), self._windows)

    @cached_property
    def _windows(self) -> Tensor:
        settings = self.models.settings
        found = windows(self.models.tokenizer(), self.models.corpus.part("test"), settings.training.length)
        return found[: settings.windows]

    def _prompts(self) -> Path:
        """Training text as prompts, written once."""
        path = self.models.work / "prompts.jsonl"
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            train = self.models.corpus.part("train")
            generator = torch.Generator().manual_seed(0)
            starts = torch.randint(len(train) - LENGTH, (self.models.settings.prompts,), generator=generator).tolist()
            lines = [json.dumps({"text": train[start : start + LENGTH]}) + "\n" for start in starts]
            path.write_text("".join(lines), "utf-8")
        return path


def apart(corpus: Path, name: str, results: Path, work: Path, theirs: Path | None = None) -> None:
    """Measure what is missing in a results file.

    Args:
        corpus: the text; name: of the settings.
        theirs: a directory with losses that the published code gave (`apart_published`).
    """
    study = Study.open(Apart.read(name), corpus, results, work)
    study.run()
    if theirs is not None:
        study.add_published(theirs)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--text", type=Path, required=True, help="what the models read, a file of UTF-8")
    parser.add_argument("--results", type=Path, default=HERE / "results", help="directory of the results file")
    parser.add_argument("--work", type=Path, default=Path(".cache/study"), help="directory for models and merges")
    parser.add_argument("--published", type=Path, help="directory with losses of the published code")
    args = parser.parse_args()
    reproducible()
    apart(args.text, "apart", args.results / "apart.json", args.work.resolve(), args.published)


if __name__ == "__main__":
    main()
