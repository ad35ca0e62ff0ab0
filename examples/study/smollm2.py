"""Part 5: the same numbers on SmolLM2-135M-Instruct and two fine-tunes of all its weights.

The reference is the pretrained model itself, the skill is the demo's arithmetic adapter (trained from it), the
target is fine-tuned on the ship's log, and a second fine-tune on the Python language reference is averaged with the
target."""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from dataclasses import dataclass
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
from .merging import Merger, available, distances, moved_neurons
from .models import State, load_state
from .settings import HERE
from .store import Row, Store

VARIANTS = ("plain", "weights", "activations", "full")
TEXT_LENGTH = 400  # characters of each held-out piece of the Python reference


@dataclass(frozen=True)
class FineTuning:
    """How long the two models are trained, and how much is measured (``smollm2.yml``)."""

    seeds: tuple[int, ...]
    steps: int
    learning_rate: float
    batch: int
    tokens: int
    problems: int
    texts: int

    @staticmethod
    def read() -> FineTuning:
        content: dict[str, Any] = yaml.safe_load((HERE / "smollm2.yml").read_text())
        return FineTuning(**content | {"seeds": tuple(content["seeds"])})


@dataclass(frozen=True)
class SmolLM2:
    """The models of part 5, trained when they are first wanted, and their merges."""

    settings: FineTuning
    work: Path
    store: Store

    def run(self) -> None:
        models = {"anchor": self.anchor, "skill": self.skill, "target": self.target, "second": self.second}
        for name, folder in models.items():
            self._measure("alone", name, "-", lambda f=folder: self._abilities(load(f())))
        for variant in filter(available, VARIANTS):
            self._measure("merge", "transfer", variant, lambda v=variant: self._transfer(v))
            self._measure("merge", "average", variant, lambda v=variant: self._average(v))

    def anchor(self) -> Path:
        return unpack_smollm2(self.work / "anchor")

    def skill(self) -> Path:
        return adapted(self.anchor(), "arithmetic", self.work)

    def target(self) -> Path:
        return self._tuned("target", style_texts(4000, seed=0, split="train"))

    def second(self) -> Path:
        return self._tuned("second", _pieces(text("reference", "train")))

    def _measure(self, part: str, arm: str, variant: str, measure: Callable[[], Row]) -> None:
        identity = {"part": part, "seed": self.settings.seeds[0], "arm": arm, "variant": variant}
        self.store.measure(identity, measure)

    def _abilities(self, loaded: Loaded) -> Row:
        return {
            "arithmetic": matching_share(loaded, arithmetic_problems(self.settings.problems, seed=1)),
            "log_loss": mean_loss(loaded, style_texts(self.settings.texts, seed=1)),
            "reference_loss": mean_loss(loaded, _pieces(text("reference", "heldout"))[: self.settings.texts]),
        }

    def _transfer(self, variant: str) -> Row:
        models = {"reference": self.anchor(), "reasoner": self.skill(), "target": self.target()}
        return self._merged(Merger(models, self.work, self._prompts()), "transfer", variant)

    def _average(self, variant: str) -> Row:
        models = {"reference": self.second(), "target": self.target()}
        return self._merged(Merger(models, self.work, self._prompts()), "average", variant)

    def _merged(self, merger: Merger, merge: str, variant: str) -> Row:
        started = time.perf_counter()
        state = merger.merge(merge, variant)
        seconds = time.perf_counter() - started
        found = self._abilities(self._loaded(state)) | {"merge_seconds": seconds}
        before = load_state(merger.models["target"])
        after = before if variant == "plain" else merger.merge("rewrite", variant)
        anchor = load_state(merger.models["reference"])
        return found | distances(anchor, after) | {"moved_neurons": moved_neurons(before, after)}

    def _loaded(self, state: State) -> Loaded:
        loaded = load(self.anchor())
        loaded.model.load_state_dict(state, strict=False)  # the output matrix is the embedding
        return loaded

    def _prompts(self) -> Path:
        path = self.work / "prompts.txt"
        path.write_text("\n".join(style_texts(60, seed=2, split="train") + _pieces(text("reference", "train"))[:60]))
        return path

    def _tuned(self, name: str, texts: list[str]) -> Path:
        folder = self.work / name
        if not (folder / "config.json").exists():
            loaded = load(self.anchor())
            _fine_tune(loaded, texts, self.settings)
            loaded.tokenizer.save_pretrained(folder)
            loaded.model.save_pretrained(folder)
        return folder


def _fine_tune(loaded: Loaded, texts: list[str], settings: FineTuning) -> None:
    """Train all weights with AdamW on random windows of the texts."""
    ids = torch.tensor(loaded.tokenizer("\n".join(texts))["input_ids"])
    optimizer = torch.optim.AdamW(loaded.model.parameters(), lr=settings.learning_rate, weight_decay=0.0, fused=True)
    generator = random.Random(0)
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
