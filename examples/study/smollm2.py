"""Part 5: the same numbers on SmolLM2-135M-Instruct and two fine-tunes of all its weights.

The reference is the pretrained model itself, the skill is the demo's arithmetic adapter (trained from it), the
target is fine-tuned on the ship's log, and a second fine-tune on the Python language reference is averaged with the
target. Seeds differ in the windows of text that the two read, and in their order."""

from __future__ import annotations

import random
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor
from torch.nn.functional import cross_entropy

from mergekit_symalign.demo.data import arithmetic_problems, style_texts
from mergekit_symalign.demo.evaluate import Loaded, load, matching_share, mean_loss
from mergekit_symalign.demo.run import adapted
from mergekit_symalign.demo.source import unpack_smollm2

from .data import text
from .merging import Merger, distances, moved_neurons
from .models import State, load_state
from .settings import HERE
from .store import Row, Store

MERGES = ("transfer", "average")
VARIANTS = ("plain", "weights", "activations")
PROMPTS = 16  # of each of the two texts, for matching from activations
TEXT_LENGTH = 400  # characters of each held-out piece of the Python reference


@dataclass(frozen=True)
class FineTuning:
    """How long the two models are trained, and how much is measured (``smollm2.yml``).

    Attributes:
        steps, batch, tokens: batches, windows per batch, tokens per window.
        problems, texts: held-out problems and texts of each kind.
    """

    seeds: tuple[int, ...]
    steps: int
    learning_rate: float
    batch: int
    tokens: int
    problems: int
    texts: int

    @staticmethod
    def read() -> FineTuning:
        content: dict[str, Any] = yaml.safe_load((HERE / "smollm2.yml").read_text("utf-8"))
        return FineTuning(**content | {"seeds": tuple(content["seeds"])})


@dataclass(frozen=True)
class SmolLM2:
    """The models of part 5, trained when they are first wanted, and their merges."""

    settings: FineTuning
    work: Path
    store: Store

    def run(self) -> None:
        first, *_ = self.settings.seeds
        for name, folder in {"anchor": self.anchor, "skill": self.skill}.items():  # the same for all seeds
            self._measure("alone", first, name, "-", lambda f=folder: self._abilities(load(f())))
        for seed in self.settings.seeds:
            for name, tuned in {"target": self.target, "second": self.second}.items():
                self._measure("alone", seed, name, "-", lambda s=seed, f=tuned: self._abilities(load(f(s))))
        for variant, seed, merge in product(VARIANTS, self.settings.seeds, MERGES):
            self._measure("merge", seed, merge, variant, lambda s=seed, m=merge, v=variant: self._merged(s, m, v))

    def anchor(self) -> Path:
        return unpack_smollm2(self.work / "anchor")

    def skill(self) -> Path:
        return adapted(self.anchor(), "arithmetic", self.work)

    def target(self, seed: int) -> Path:
        return self._tuned("target", style_texts(4000, seed=0, split="train"), seed)

    def second(self, seed: int) -> Path:
        return self._tuned("second", _pieces(text("reference", "train")), seed)

    def _measure(self, part: str, seed: int, arm: str, variant: str, measure: Callable[[], Row]) -> None:
        self.store.measure({"part": part, "seed": seed, "arm": arm, "variant": variant}, measure)

    def _abilities(self, loaded: Loaded) -> Row:
        return {
            "arithmetic": matching_share(loaded, arithmetic_problems(self.settings.problems, seed=1)),
            "log_loss": mean_loss(loaded, style_texts(self.settings.texts, seed=1)),
            "reference_loss": mean_loss(loaded, _pieces(text("reference", "heldout"))[: self.settings.texts]),
        }

    def _merged(self, seed: int, merge: str, variant: str) -> Row:
        """Align the target, merge it plainly, and measure both steps; the files of the merges are deleted again."""
        work = self.work / f"{merge}-{seed}-{variant}"
        merger = Merger(self._models(seed, merge), work, self._prompts())
        started = time.perf_counter()
        aligned = merger.aligned(variant)
        state = aligned.merge(merge, "plain")
        seconds = time.perf_counter() - started
        anchor, before, after = (
            load_state(m.models[name]) for m, name in ((merger, "reference"), (merger, "target"), (aligned, "target"))
        )
        found = self._abilities(self._loaded(state)) | {"merge_seconds": seconds}
        shutil.rmtree(work)
        return found | distances(anchor, after) | {"moved_neurons": moved_neurons(before, after)}

    def _models(self, seed: int, merge: str) -> dict[str, Path]:
        if merge == "transfer":
            return {"reference": self.anchor(), "reasoner": self.skill(), "target": self.target(seed)}
        return {"reference": self.second(seed), "target": self.target(seed)}

    def _loaded(self, state: State) -> Loaded:
        loaded = load(self.anchor())
        loaded.model.load_state_dict(state, strict=False)  # the output matrix is the embedding
        return loaded

    def _prompts(self) -> Path:
        path = self.work / "prompts.txt"
        texts = (style_texts(PROMPTS, seed=2, split="train"), _pieces(text("reference", "train"))[:PROMPTS])
        path.write_text("\n".join(texts[0] + texts[1]), "utf-8")
        return path

    def _tuned(self, name: str, texts: list[str], seed: int) -> Path:
        folder = self.work / f"{name}-{seed}"
        if not (folder / "config.json").exists():
            loaded = load(self.anchor())
            _fine_tune(loaded, texts, self.settings, seed)
            loaded.tokenizer.save_pretrained(folder)
            loaded.model.save_pretrained(folder)
        return folder


def _fine_tune(loaded: Loaded, texts: list[str], settings: FineTuning, seed: int) -> None:
    """Train all weights with AdamW on random windows of the texts."""
    ids = torch.tensor(loaded.tokenizer("\n".join(texts))["input_ids"])
    optimizer = torch.optim.AdamW(loaded.model.parameters(), lr=settings.learning_rate, weight_decay=0.0, fused=True)
    generator = random.Random(seed)
    loaded.model.train()
    for _ in range(settings.steps):
        starts = [generator.randrange(len(ids) - settings.tokens) for _ in range(settings.batch)]
        windows = torch.stack([ids[start : start + settings.tokens] for start in starts])
        _next_token_loss(loaded.model, windows).backward()
        torch.nn.utils.clip_grad_norm_(loaded.model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    loaded.model.eval()


def _next_token_loss(model: Any, ids: Tensor) -> Tensor:
    with torch.autocast("cpu", torch.bfloat16):
        logits = model(ids, use_cache=False).logits[:, :-1]
    return cross_entropy(logits.flatten(0, 1).float(), ids[:, 1:].flatten())


def _pieces(source: str) -> list[str]:
    return [source[i : i + TEXT_LENGTH] for i in range(0, len(source) - TEXT_LENGTH, TEXT_LENGTH)]
